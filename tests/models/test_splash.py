"""The kernel for TPUs, interpreted, against the jnp path that test_packed holds against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1s_jax.models import packed, splash

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    "length, heads, kv_heads, segmented",
    [(256, 2, 1, True), (130, 4, 2, True), (128, 2, 2, False)],
    ids=["two blocks", "a row that is padded", "whole rows"],
)
def test_kernel(monkeypatch, length, heads, kv_heads, segmented):
    """Values and gradients, heads narrower than a register, an episode across two blocks."""
    monkeypatch.setattr(splash, "BLOCKS", (128,))
    q, d = jnp.asarray(RNG.normal(size=(2, 2, length, heads, 16)), jnp.float32)
    k, v = jnp.asarray(RNG.normal(size=(2, 2, length, kv_heads, 16)), jnp.float32)
    ends = np.array([[length // 3, length - 20], [length // 2 + 9, length]])
    ids = jnp.asarray((np.arange(length) >= ends[:, :, None]).sum(1)) if segmented else None

    def run(attend):
        out, back = jax.vjp(lambda *qkv: attend(*qkv, ids), q, k, v)
        return out, *back(d)

    expected = jax.jit(lambda: run(packed.packed_attention))()
    got = jax.jit(lambda: run(lambda *x: splash.attention(*x, interpret=True)))()
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
