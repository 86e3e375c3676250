"""A cache of 8-bit integers: one scale for every channel of every layer, measured on a text.

A channel's scale is the same for all tokens, so it never meets the cache: queries are multiplied by
the keys' scales before they look, what they bring back by the values'. Any attention that can
read integers will do, kernels included. Keys are spread very unevenly over channels (Liu et al.
2024, KIVI), and rotation mixes the two channels of a pair, so these share their larger size.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Int8

from r1s_jax.models.attention import attention, causal_mask
from r1s_jax.models.decoder import DecoderConfig, Params, hidden_states

# How far beyond the largest number of the measured text the integers reach.
HEADROOM = 1.5
LARGEST = 127


def measure(
    model: DecoderConfig, params: Params, tokens_T: Int[Array, " T"]
) -> tuple[Float[Array, "L K h"], Float[Array, "L K h"]]:
    """The scales of keys and values, from what the channels hold on this text."""
    mask = causal_mask(tokens_T.shape[0])

    def attend(
        layer: Any, seen: tuple[Array, Array], q: Array, k: Array, v: Array
    ) -> tuple[Array, tuple[Array, Array]]:
        first, second = jnp.split(k.astype(jnp.float32), 2, axis=-1)
        turned = jnp.tile(jnp.hypot(first, second), 2)  # at any angle
        largest = (jnp.abs(x.astype(jnp.float32)).max(axis=(0, 1)) for x in (turned, v))
        k_seen, v_seen = (s.at[layer].set(new) for s, new in zip(seen, largest, strict=True))
        return attention(q, k, v, mask), (k_seen, v_seen)

    shape = (model.num_hidden_layers, model.num_key_value_heads, model.head_dim)
    positions = jnp.arange(tokens_T.shape[0])[None]
    nothing = (jnp.zeros(shape), jnp.zeros(shape))
    scan = isinstance(params["layers"], dict)
    _, seen = hidden_states(model, params, tokens_T[None], positions, attend, nothing, scan=scan)
    # A channel that is silent in this text still needs a scale to divide by.
    k_scale, v_scale = (jnp.maximum(s, 1e-6) * (HEADROOM / LARGEST) for s in seen)
    return k_scale, v_scale


def rounded(
    x_RTKh: Float[Array, "R T K h"], scale_Kh: Float[Array, "K h"]
) -> Int8[Array, "R T K h"]:
    """Keys or values in units of their channels' scales, cut at the largest integer."""
    units = jnp.round(x_RTKh.astype(jnp.float32) / scale_Kh)
    return jnp.clip(units, -LARGEST, LARGEST).astype(jnp.int8)


def scaled(
    x_RTHh: Float[Array, "R T H h"], scale_Kh: Float[Array, "K h"]
) -> Float[Array, "R T H h"]:
    """Each query head times the scales of the key/value head it looks at."""
    per_group = x_RTHh.shape[2] // scale_Kh.shape[0]
    return (x_RTHh * jnp.repeat(scale_Kh, per_group, axis=0)).astype(x_RTHh.dtype)
