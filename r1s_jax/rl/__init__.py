"""Reinforcement learning: answers are scored, rewards become advantages, batches and a loss."""
