"""Drawing the next token of every row: exact, keyed by position, cheap at any vocabulary.

The vocabulary is cut into blocks of 128. A draw picks a block by its probability, then a token
inside it, each by the inverse CDF of a uniform number of its own: no [B, V] of random numbers,
no long prefix sum. Truncation finds thresholds by reductions over the blocks; nothing of size V
is sorted. All of it reads one row at a time, so a row's token depends on its logits and key alone.

Truncations compose as in transformers: bans, temperature, top-k, top-p of what is left, min-p.
Each keeps every token at or above a threshold, so tokens that tie are kept or dropped together.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, Shaped, UInt32

from r1s_jax.types import UserError

# The lanes of a TPU register. A sharded vocabulary stays where it is if each shard is whole
# blocks; if not, XLA gathers the logits first.
BLOCK = 128
SHORTLIST = 8  # top-p searches one block in 8 before it searches all


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How tokens are drawn. Temperature 0 is greedy and truncates nothing.

    top_k keeps the k likeliest tokens (0: all). top_p keeps the smallest set of likeliest tokens
    whose probability reaches it (Holtzman et al. 2019; 1: all). min_p keeps tokens at least
    min_p times as likely as the likeliest (Nguyen et al. 2024; 0: all).

    Raises UserError for values out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    banned: tuple[str, ...] = ()  # strings the policy cannot complete (controls in evaluation)

    def __post_init__(self) -> None:
        for field, holds, wanted in (
            ("temperature", 0.0 <= self.temperature < math.inf, "0 (greedy) or more"),
            ("top_p", 0.0 < self.top_p <= 1.0, "more than 0, at most 1 (off)"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("min_p", 0.0 <= self.min_p < 1.0, "0 (off) or more, below 1"),
        ):
            if not holds:
                raise UserError(f"sampling.{field} = {getattr(self, field)}: has to be {wanted}")

    @property
    def truncates(self) -> bool:
        """Whether tokens that are not banned can be out of reach."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


class Sampled(NamedTuple):
    """Tokens and two log-probabilities of each, all [B]: see `sample`."""

    tokens_B: Array
    logprobs_B: Array
    drawn_logprobs_B: Array


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
) -> Sampled:
    """Draws a token per row; `forbidden_BV` has to leave each row a token with a finite logit.

    `logprobs_B` is taken under the full softmax at the sampling temperature (at 1 when greedy),
    before bans and truncation: it is what the learner recomputes. `drawn_logprobs_B` is taken
    under the distribution that was drawn from, after both; 0 when greedy.
    """
    temperature = config.temperature or 1.0
    blocks = in_blocks(logits_BV, -jnp.inf)
    peak_B = blocks.max(axis=(1, 2))
    mass_BN = masses(blocks, peak_B, temperature)
    normaliser_B = jnp.log(mass_BN.sum(axis=-1))
    allowed, allowed_peak_B = blocks, peak_B
    if forbidden_BV is not None:
        allowed = jnp.where(in_blocks(forbidden_BV, True), -jnp.inf, blocks)
        allowed_peak_B = allowed.max(axis=(1, 2))
    if config.temperature == 0.0:
        which_B = jnp.argmax(allowed.max(axis=-1), axis=-1)
        inside_B = jnp.argmax(at(allowed, which_B), axis=-1)
    else:
        if config.truncates:
            # The barrier: were exp compiled twice, the copies might differ at the threshold.
            allowed = jax.lax.optimization_barrier(truncate(allowed, allowed_peak_B, config))
        if allowed is not blocks:
            mass_BN = masses(allowed, allowed_peak_B, temperature)
        uniforms_B2 = jax.vmap(uniforms)(seeds_B2, positions_B)
        which_B = inverse_cdf(mass_BN, uniforms_B2[:, 0])
        scores_BL = (at(allowed, which_B) - allowed_peak_B[:, None]) / temperature
        inside_B = inverse_cdf(jnp.exp(scores_BL), uniforms_B2[:, 1])
    tokens_B = (which_B * BLOCK + inside_B).astype(jnp.int32)
    logits_B = jnp.take_along_axis(logits_BV, tokens_B[:, None], axis=-1)[:, 0]
    logprobs_B = (logits_B - peak_B) / temperature - normaliser_B
    if config.temperature == 0.0:
        return Sampled(tokens_B, logprobs_B, jnp.zeros_like(logprobs_B))
    drawn_B = (logits_B - allowed_peak_B) / temperature - jnp.log(mass_BN.sum(axis=-1))
    return Sampled(tokens_B, logprobs_B, drawn_B)


def uniforms(seed_2: UInt32[Array, "2"], position: Int[Array, ""]) -> Float[Array, "2"]:
    """Two numbers in [0, 1) of (row seed, position)."""
    key = jax.random.wrap_key_data(seed_2, impl="threefry2x32")  # whatever JAX's default is
    return jax.random.uniform(jax.random.fold_in(key, position), (2,))


def in_blocks(values_BV: Shaped[Array, "B V"], padding: float | bool) -> Shaped[Array, "B N L"]:
    """[B V] as [B N 128], the last block filled up."""
    rows, vocab = values_BV.shape
    padded = jnp.pad(values_BV, ((0, 0), (0, -vocab % BLOCK)), constant_values=padding)
    return padded.reshape(rows, -1, BLOCK)


def at(blocks_BNL: Float[Array, "B N L"], which_B: Int[Array, " B"]) -> Float[Array, "B L"]:
    """One block of each row."""
    return jnp.take_along_axis(blocks_BNL, which_B[:, None, None], axis=1)[:, 0]


def masses(
    logits_BNL: Float[Array, "B N L"], peak_B: Float[Array, " B"], temperature: float
) -> Float[Array, "B N"]:
    """Each block's sum of exp((logit - peak) / temperature)."""
    mass_BN = jnp.exp((logits_BNL - peak_B[:, None, None]) / temperature).sum(axis=-1)
    # Without the barrier XLA turns a sum of these sums into another pass over everything.
    return jax.lax.optimization_barrier(mass_BN)


def truncate(
    logits_BNL: Float[Array, "B N L"], peak_B: Float[Array, " B"], config: SamplingConfig
) -> Float[Array, "B N L"]:
    """Puts -inf where top-k, top-p and min-p, in this order, drop a token. Peaks are row maxima."""
    peak_B11, kept = peak_B[:, None, None], logits_BNL
    if config.top_k > 0:
        kept = jnp.where(kept >= kth_largest(kept, config.top_k)[:, None, None], kept, -jnp.inf)
    if config.top_p < 1.0:
        weights = jnp.exp((kept - peak_B11) / config.temperature)
        kept = jnp.where(weights >= nucleus(weights, config.top_p)[:, None, None], kept, -jnp.inf)
    if config.min_p > 0.0:
        lowest = peak_B11 + config.temperature * math.log(config.min_p)
        kept = jnp.where(kept >= lowest, kept, -jnp.inf)
    return kept


def kth_largest(values_BNL: Float[Array, "B N L"], k: int) -> Float[Array, " B"]:
    """The k-th largest value of each row, the smallest if there are fewer.

    It is in one of the k blocks with the largest maxima: what is outside these is no larger than
    any of their maxima.
    """
    rows, blocks, _ = values_BNL.shape
    _, which_BK = jax.lax.top_k(values_BNL.max(axis=-1), min(k, blocks))
    few = jnp.take_along_axis(values_BNL, which_BK[:, :, None], axis=1).reshape(rows, -1)
    # The minimum is the last one; a slice would have XLA sort the whole row instead.
    return jax.lax.top_k(few, min(k, few.shape[1]))[0].min(axis=-1)


def nucleus(weights_BNL: Float[Array, "B N L"], top_p: float) -> Float[Array, " B"]:
    """The largest threshold such that the weights at or above it sum to top_p of all or more.

    The weights lie in [0, 1]. Exact but for the rounding of the sums (about 1e-7 of them), which
    may move the end of the nucleus by tokens that weigh no more than that.

    The blocks with the largest maxima are searched first, all of them only where these do not
    hold the whole nucleus. A row takes the one or the other by its own weights alone.
    """
    target_B = top_p * weights_BNL.sum(axis=-1).sum(axis=-1)
    few = -(-weights_BNL.shape[1] // SHORTLIST)
    largest, which = jax.lax.top_k(weights_BNL.max(axis=-1), few)
    short = jnp.take_along_axis(weights_BNL, which[:, :, None], axis=1)
    outside = largest.min(axis=-1)[:, None, None]  # nothing outside the list is larger
    enough_B = jnp.where(short >= outside, short, 0.0).sum(axis=(1, 2)) >= target_B
    found_B = search(short, target_B)
    return jax.lax.cond(
        enough_B.all(),
        lambda: found_B,
        lambda: jnp.where(enough_B, found_B, search(weights_BNL, target_B)),
    )


def search(weights_BNL: Float[Array, "B N L"], target_B: Float[Array, " B"]) -> Float[Array, " B"]:
    """The largest float whose upper set of weights reaches the target, bit by bit.

    Floats that are not negative are ordered as their bits are, and below 2 there are 30 of these.
    A sum in fixed order never grows when its terms do not, rounded or not: so the set of floats
    that reach the target has one end, and this finds it.
    """

    def step(i: Array, bits_B: Array) -> Array:
        trial_B = bits_B | (jnp.int32(1) << (29 - i))
        threshold = jax.lax.bitcast_convert_type(trial_B, jnp.float32)[:, None, None]
        reached_B = jnp.where(weights_BNL >= threshold, weights_BNL, 0.0).sum(axis=(1, 2))
        return jnp.where(reached_B >= target_B, trial_B, bits_B)

    bits_B = jax.lax.fori_loop(0, 30, step, jnp.zeros(target_B.shape, jnp.int32))
    return jax.lax.bitcast_convert_type(bits_B, jnp.float32)


def inverse_cdf(weights_Bn: Float[Array, "B n"], uniform_B: Float[Array, " B"]) -> Int[Array, " B"]:
    """Draws an index per row in proportion to its (unnormalised, non-negative) weights.

    An index of weight zero is never returned: XLA's running sums are taken in another order for
    every index, so they may rise where the weight is zero (seen from 512 weights on), and rounding
    can put the target past the last sum; the last positive weight is taken then. Index 0 where no
    weight is positive.
    """
    target_B = uniform_B * weights_Bn.sum(axis=-1)
    positive = weights_Bn > 0
    beyond = positive & (jnp.cumsum(weights_Bn, axis=-1) > target_B[:, None])
    index = jnp.arange(weights_Bn.shape[-1])
    last_B = jnp.where(positive, index, 0).max(axis=-1)
    return jnp.where(beyond, index, last_B[:, None]).min(axis=-1)
