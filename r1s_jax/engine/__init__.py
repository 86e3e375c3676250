"""The sampler: KV cache, jitted decoding in chunks, exact stops, slots."""
