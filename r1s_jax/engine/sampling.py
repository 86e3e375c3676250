"""Drawing the next token of every row: exact, keyed by position, cheap at any vocabulary.

A draw is the inverse CDF of one uniform number per row, found in two levels (blocks of the
vocabulary, then inside one block), so no [B, V] of random numbers and no long prefix sum.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, UInt32


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How tokens are drawn. Temperature 0 is greedy; top_p 1 keeps the whole distribution."""

    temperature: float = 1.0
    top_p: float = 1.0
    banned: tuple[str, ...] = ()  # strings the policy cannot complete (controls in evaluation)


def row_seed(
    seed: int, phase: str, step: int, question: str, attempt: int, sample: int
) -> UInt32[np.ndarray, "2"]:
    """The key of one episode; the position of a token is folded in on the device."""
    identity = f"{seed}|{phase}|{step}|{question}|{attempt}|{sample}".encode()
    return np.frombuffer(hashlib.blake2b(identity, digest_size=8).digest(), np.uint32)


def sample(
    logits_BV: Float[Array, "B V"],
    seeds_B2: UInt32[Array, "B 2"],
    positions_B: Int[Array, " B"],
    config: SamplingConfig,
    forbidden_BV: Bool[Array, "B V"] | None = None,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Returns the drawn tokens and their log-probability under the full softmax.

    The log-probability is taken at the sampling temperature (at 1 when greedy) and before
    truncation or bans: it is what the learner recomputes.
    """
    scaled = logits_BV / (config.temperature or 1.0)
    logprobs = jax.nn.log_softmax(scaled, axis=-1)
    drawn_from = logprobs if forbidden_BV is None else jnp.where(forbidden_BV, -jnp.inf, logprobs)
    if config.temperature == 0.0:
        tokens = jnp.argmax(drawn_from, axis=-1)
    else:
        if config.top_p < 1.0:
            drawn_from = truncate_top_p(drawn_from, config.top_p)
        uniform_B = jax.vmap(uniform)(seeds_B2, positions_B)
        tokens = inverse_cdf(jnp.exp(drawn_from), uniform_B)
    tokens = tokens.astype(jnp.int32)
    return tokens, jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]


def uniform(seed_2: UInt32[Array, "2"], position: Int[Array, ""]) -> Float[Array, ""]:
    """One number in [0, 1) of (row seed, position)."""
    key = jax.random.wrap_key_data(seed_2, impl="threefry2x32")  # whatever JAX's default is
    return jax.random.uniform(jax.random.fold_in(key, position))


def truncate_top_p(logprobs_BV: Float[Array, "B V"], top_p: float) -> Float[Array, "B V"]:
    """Keeps the smallest set of tokens whose probability reaches top_p (Holtzman et al. 2019)."""
    ordered = jnp.sort(logprobs_BV, axis=-1, descending=True)
    mass_before = jnp.cumsum(jnp.exp(ordered), axis=-1) - jnp.exp(ordered)
    total = jnp.exp(ordered).sum(axis=-1, keepdims=True)
    kept = jnp.sum(mass_before < top_p * total, axis=-1, keepdims=True)
    threshold = jnp.take_along_axis(ordered, kept - 1, axis=-1)
    return jnp.where(logprobs_BV >= threshold, logprobs_BV, -jnp.inf)


def inverse_cdf(weights_BV: Float[Array, "B V"], uniform_B: Float[Array, " B"]) -> Int[Array, " B"]:
    """Draws an index per row in proportion to its (unnormalised, non-negative) weights."""
    rows, vocab = weights_BV.shape
    block = 1 << math.ceil(math.log2(math.sqrt(vocab)))
    blocks = -(-vocab // block)
    padded = jnp.pad(weights_BV, ((0, 0), (0, blocks * block - vocab)))
    cells = padded.reshape(rows, blocks, block)
    mass = cells.sum(axis=-1)
    which, left = _pick(mass, uniform_B * mass.sum(axis=-1))
    chosen = jnp.take_along_axis(cells, which[:, None, None], axis=1)[:, 0]
    inside, _ = _pick(chosen, left)
    return which * block + inside


def _pick(
    weights: Float[Array, "B n"], target: Float[Array, " B"]
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """First index whose running sum exceeds the target, and what the target has left there.

    An index of weight zero is never returned: XLA's running sums are taken in another order for
    every index, so they may rise where the weight is zero (seen from 512 weights on), and rounding
    can put the target past the last sum; the last positive weight is taken then.
    """
    sums = jnp.cumsum(weights, axis=-1)
    size = weights.shape[-1]
    last = size - 1 - jnp.argmax(weights[:, ::-1] > 0, axis=-1)
    beyond = (sums > target[:, None]) & (weights > 0)
    index = jnp.minimum(jnp.where(beyond, jnp.arange(size), size).min(axis=-1), last)
    at = index[:, None]
    before = jnp.take_along_axis(sums - weights, at, axis=-1)[:, 0]
    return index, jnp.maximum(target - before, 0.0)
