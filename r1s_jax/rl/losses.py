"""The policy loss of packed rows (jnp, pure, differentiable); `algorithm` has the formulas.

A row holds several episodes one after the other. `segments_BT` numbers them from 1, in the order
of the row, and is 0 on padding; a sum over an episode is a sum over its segment.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from r1s_jax.rl.algorithm import AlgorithmConfig
from r1s_jax.rl.batching import EPISODES_PER_ROW


def policy_loss(
    config: AlgorithmConfig,
    logprobs_BT: Float[Array, "B T"],
    entropy_BT: Float[Array, "B T"],
    old_logprobs_BT: Float[Array, "B T"],
    drawn_logprobs_BT: Float[Array, "B T"],
    ref_logprobs_BT: Float[Array, "B T"] | None,
    advantages_BT: Float[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    mask_BT: Bool[Array, "B T"],
    segments_BT: Int[Array, "B T"],
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Loss of one micro-batch, a scalar to minimise, and sums over its sampled tokens.

    Index t of every array speaks of token t. `drawn_logprobs_BT` are the sampler's, under what it
    drew from; `weights_BT` is w_t of the whole minibatch (`batching.token_weights`), so that the
    losses of its micro-batches *add up*. Only `logprobs_BT` and `entropy_BT` get a gradient.
    Positions off the mask may hold anything, infinities and NaN included.

    The second result has sums over sampled tokens, to be divided by their number: `clip_fraction`
    (the clip takes the gradient away, or bounds its weight), `ratio_mean` (of rho), `approx_kl`
    (k3 of the token ratios, at least 0), `entropy`, where they are in use `importance_weight`
    (of c_t), `sequence_masked` (tokens), `kl_ref` and `llds`.
    """
    chex.assert_equal_shape(
        [
            *(logprobs_BT, entropy_BT, old_logprobs_BT, drawn_logprobs_BT),
            *(advantages_BT, weights_BT, mask_BT, segments_BT),
        ]
    )
    frozen = jax.lax.stop_gradient

    def keep(x: Array) -> Array:
        # Chosen before it is used: a NaN off the mask would survive a later `where` in the
        # gradient.
        return jnp.where(mask_BT, x, 0.0)

    new, entropy, old = keep(logprobs_BT), keep(entropy_BT), keep(frozen(old_logprobs_BT))
    advantages, weights = keep(frozen(advantages_BT)), keep(frozen(weights_BT))
    counts = jnp.maximum(segment_sums(mask_BT.astype(new.dtype), segments_BT), 1)
    sums: dict[str, Array] = {}

    # ---- ratio
    change = new - old
    log_ratio = change
    if config.ratio == "sequence":
        log_ratio = keep(segment_sums(change, segments_BT) / counts)
    ratio = jnp.exp(log_ratio)

    # ---- objective
    clipped = jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
    if config.objective == "cispo":
        cut = clipped != ratio
        each = -frozen(clipped) * advantages * new
    else:
        # `where`, not `minimum`: jnp splits the gradient at ties, and clip has slope 1/2 at its
        # edge.
        cut = clipped * advantages < ratio * advantages
        each = -jnp.where(cut, frozen(clipped), ratio) * advantages

    # ---- corrections for the sampler
    off = old - keep(drawn_logprobs_BT)
    if config.importance_cap:
        correction = frozen(jnp.minimum(jnp.exp(off), config.importance_cap))
        sums["importance_weight"] = correction
        each = correction * each
    if config.sequence_band is not None:
        low, high = (jnp.log(edge) for edge in config.sequence_band)
        mean = segment_sums(off, segments_BT) / counts
        outside = (mean < low) | (mean > high)
        sums["sequence_masked"] = outside
        weights = jnp.where(outside, 0.0, weights)

    # ---- extras
    if config.needs_reference and not config.kl_in_reward:
        if ref_logprobs_BT is None:
            raise ValueError(f"kl_weight = {config.kl_weight} needs the reference's log-probs")
        k1 = new - keep(frozen(ref_logprobs_BT))
        sums["kl_ref"] = k1**2 / 2 if config.kl == "k2" else jnp.expm1(-k1) + k1
        each = each + config.kl_weight * sums["kl_ref"]
    if config.entropy_weight:
        each = each - config.entropy_weight * entropy
    if config.llds_weight:
        fallen = jnp.where(advantages >= 0, -change, 0.0)
        displaced = frozen(segment_sums(fallen, segments_BT)) > 0
        # No `maximum` here either: a token that kept its log-prob is not pushed.
        sums["llds"] = jnp.where(displaced & (fallen > 0), fallen, 0.0)
        each = each + config.llds_weight * sums["llds"]

    sums |= {
        "clip_fraction": cut,
        "ratio_mean": ratio,
        "approx_kl": jnp.expm1(change) - change,  # exp(x) - 1 would be noise near 0
        "entropy": entropy,
    }
    total = {k: frozen(keep(v.astype(new.dtype)).sum()) for k, v in sums.items()}
    return (weights * each).sum(), total


def sum_names(config: AlgorithmConfig) -> tuple[str, ...]:
    """Names of the sums that `policy_loss` gives."""
    in_loss = config.needs_reference and not config.kl_in_reward
    extras = {
        "importance_weight": config.importance_cap > 0,
        "sequence_masked": config.sequence_band is not None,
        "kl_ref": in_loss,
        "llds": config.llds_weight > 0,
    }
    used = (name for name, on in extras.items() if on)
    return ("clip_fraction", "ratio_mean", "approx_kl", "entropy", *used)


def segment_sums(
    values_BT: Float[Array, "B T"], segments_BT: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """At every token the sum of its episode's values; padding (segment 0) sums by itself."""

    def of_row(values_T: Array, segments_T: Array) -> Array:
        sums = jax.ops.segment_sum(values_T, segments_T, num_segments=EPISODES_PER_ROW + 1)
        return sums[segments_T]

    return jax.vmap(of_row)(values_BT, segments_BT)
