"""Log-probabilities of given tokens, without ever holding [B, T, V] logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from r1s_jax.models.attention import causal_attend
from r1s_jax.models.decoder import Decoder, DecoderConfig, Params, Remat, bind


def token_logprobs(
    model: DecoderConfig,
    params: Params,
    tokens_BT: Int[Array, "B T"],
    *,
    temperature: float = 1.0,
    dtype: DTypeLike | None = None,
    scan: bool = False,
    remat: Remat = "none",
    positions_per_chunk: int = 1024,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probability of every token given those before it, and the entropy of its distribution.

    Index t speaks of token t; index 0, which nothing predicts, is 0 in both. Rows are padded on
    the right, so causality keeps padding out. Logits live for `positions_per_chunk` positions
    at a time and are computed again in the backward pass. The entropy carries no gradient.
    `dtype` is what the layers compute in; `scan` and `remat` as in `Decoder`.
    """
    rows, length = tokens_BT.shape
    decoder = bind(model, params, dtype)
    positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
    hidden, _ = decoder(tokens_BT, positions, causal_attend(length), scan=scan, remat=remat)
    count = rows * (length - 1)
    chunks = -(-count // positions_per_chunk)
    pad = chunks * positions_per_chunk - count
    hidden_ND = jnp.pad(hidden[:, :-1].reshape(count, -1), ((0, pad), (0, 0)))
    targets_N = jnp.pad(tokens_BT[:, 1:].reshape(count), (0, pad))
    logprobs, entropy = jax.lax.map(
        jax.checkpoint(lambda xs: _score(decoder, temperature, *xs)),
        (
            hidden_ND.reshape(chunks, positions_per_chunk, -1),
            targets_N.reshape(chunks, positions_per_chunk),
        ),
    )

    def shape(x: Array) -> Array:
        return jnp.pad(x.reshape(-1)[:count].reshape(rows, length - 1), ((0, 0), (1, 0)))

    return shape(logprobs), shape(entropy)


def _score(
    decoder: Decoder,
    temperature: float,
    hidden_ND: Float[Array, "N D"],
    targets_N: Int[Array, " N"],
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    logits = decoder.unembed(hidden_ND) / temperature
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets_N[:, None], axis=-1)[:, 0]
    frozen = jax.lax.stop_gradient(logits)
    level = jax.lax.stop_gradient(normaliser)
    entropy = level - (jnp.exp(frozen - level[:, None]) * frozen).sum(axis=-1)
    return picked - normaliser, entropy
