"""r1s_jax: search-augmented RL (R1-Searcher, arXiv 2503.05592) in JAX."""
