"""The train loop and what it leaves behind: checkpoints, metrics, reports."""
