"""Attention in plain jnp under any mask: the reference for every platform (rows: `packed`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

# Finite, so that a row with nothing to attend to gives an average and not NaN.
MASKED = -1e30


def attention(
    q_BTHh: Float[Array, "B T H h"],
    k_BSKh: Float[Array, "B S K h"],
    v_BSKh: Float[Array, "B S K h"],
    mask_BTS: Bool[Array, "#B T S"],
) -> Float[Array, "B T H h"]:
    """Grouped-query attention; softmax in f32. `mask` is True where a query may look."""
    rows, length, heads, width = q_BTHh.shape
    groups = k_BSKh.shape[2]
    q = q_BTHh.reshape(rows, length, groups, heads // groups, width) * width**-0.5
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k_BSKh, preferred_element_type=jnp.float32)
    scores = jnp.where(mask_BTS[:, None, None], scores, MASKED)
    peak = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores - peak)
    total = weights.sum(axis=-1)
    mixed = jnp.einsum("bkgts,bskh->btkgh", weights.astype(v_BSKh.dtype), v_BSKh)
    mixed = mixed / jnp.moveaxis(total, 3, 1)[..., None].astype(mixed.dtype)
    return mixed.reshape(rows, length, heads, width)


def causal_mask(length: int) -> Bool[Array, "1 T T"]:
    """True on and below the diagonal."""
    return jnp.tril(jnp.ones((length, length), bool))[None]


def causal_attend(length: int) -> Callable[[Any, Any, Array, Array, Array], tuple[Array, Any]]:
    """The decoder's `attend` callback for whole sequences from their start; needs no cache."""
    mask = causal_mask(length)
    return lambda _, cache, q, k, v: (attention(q, k, v, mask), cache)
