"""Finding passages: the interface, a light embedder, the dense index and control wrappers."""
