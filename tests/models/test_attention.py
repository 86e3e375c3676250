"""Attention, norm and rotation against numpy in float64."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from r1s_jax.models.attention import attention, causal_mask
from r1s_jax.models.decoder import rms_norm, rope_frequencies, rope_table, rotate
from tests import tiny

RNG = np.random.default_rng(0)


def reference(q, k, v, mask):
    """One head, one query at a time."""
    out = np.zeros(q.shape)
    for b, t, h in np.ndindex(q.shape[:3]):
        group = h // (q.shape[2] // k.shape[2])
        seen = np.nonzero(mask[b, t])[0]
        scores = k[b, seen, group] @ q[b, t, h] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights / weights.sum() @ v[b, seen, group]
    return out


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_query_attention(groups):
    """Each KV head serves its own run of query heads, whatever the mask."""
    q = RNG.normal(size=(2, 5, 4, 8)).astype(np.float32)
    k, v = RNG.normal(size=(2, 2, 7, groups, 8)).astype(np.float32)
    mask = RNG.random((2, 5, 7)) < 0.5
    mask[..., 0] = True
    expected = reference(q.astype(float), k, v, mask)
    got = attention(*map(jnp.asarray, (q, k, v, mask)))
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_a_query_that_sees_nothing_is_finite():
    """A fully masked row (padding) must not spread NaN through gradients."""
    q, k, v = jnp.asarray(RNG.normal(size=(3, 1, 2, 2, 4)), jnp.float32)
    assert np.isfinite(attention(q, k, v, jnp.zeros((1, 2, 2), bool))).all()


def test_causal_mask():
    """A hand-written mask."""
    np.testing.assert_array_equal(causal_mask(3)[0], [[1, 0, 0], [1, 1, 0], [1, 1, 1]])


def test_rotation_turns_pairs_by_position():
    """(x_i, x_{i+h/2}) as a complex number is turned by position * theta^(-2i/h)."""
    x = RNG.normal(size=(1, 3, 2, 6)).astype(np.float32)
    positions = np.array([[0, 1, 100]])
    config = dataclasses.replace(tiny.MODEL, head_dim=6, rope_theta=50.0)
    cos, sin = rope_table(jnp.asarray(positions), rope_frequencies(config))
    angles = positions[0][:, None] * 50.0 ** -(np.arange(0, 6, 2) / 6)
    turned = (x[..., :3] + 1j * x[..., 3:]) * np.exp(1j * angles)[None, :, None]
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(rotate(jnp.asarray(x), cos, sin), expected, atol=1e-5)


def test_rms_norm():
    """x / sqrt(mean(x²) + eps) * scale; statistics in f32 also for bf16."""
    x = RNG.normal(size=(2, 8)).astype(np.float32) * 100
    scale = RNG.normal(size=8).astype(np.float32)
    expected = x / np.sqrt((x.astype(float) ** 2).mean(-1, keepdims=True) + 1e-3) * scale
    got = rms_norm(jnp.asarray(x), jnp.asarray(scale), 1e-3)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
