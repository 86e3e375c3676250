"""The policy loss, as ratio x objective x aggregation (jnp, pure, differentiable).

    ratio        rho = exp(log pi - log pi_old), per token
    objective    PPO clip (1707.06347): -min(rho A, clip(rho, 1 - low, 1 + high) A)
    aggregation  mean over the sampled tokens of a sequence, then mean over sequences

The KL penalty of the recipe (k1 inside the reward) is not a term of this loss: it reaches it
through token-wise advantages, see `advantages.token_advantages`.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def sequence_mean(
    values_BT: Float[Array, "B T"],
    mask_BT: Bool[Array, "B T"],
    total_sequences: int | float | Float[Array, ""],
) -> Float[Array, ""]:
    """Sum over rows of the mean over a row's masked tokens, divided by `total_sequences`.

    With `total_sequences` the number of sequences of the whole batch, the results of its
    micro-batches add up to the batch's result. A row without a masked token adds exactly 0.
    """
    counts_B = mask_BT.sum(axis=1)
    sums_B = jnp.where(mask_BT, values_BT, 0.0).sum(axis=1)
    return (sums_B / jnp.maximum(counts_B, 1)).sum() / total_sequences


def policy_loss(
    logprobs_BT: Float[Array, "B T"],
    old_logprobs_BT: Float[Array, "B T"],
    advantages: Float[Array, " B"] | Float[Array, "B T"],
    mask_BT: Bool[Array, "B T"],
    *,
    total_sequences: int | float | Float[Array, ""],
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """PPO-clip loss of one micro-batch, a scalar to minimise, and its diagnostics.

    The arrays share one alignment: where index t of `logprobs_BT` is the log-probability of a
    token, `mask_BT[:, t]` says whether that very token was sampled (for a `Batch` drop the first
    column of the mask, as no log-probability predicts the first token). `advantages` is one
    number per sequence, or one per token. `old_logprobs_BT` and `advantages` get no gradient.
    Positions off the mask may hold anything, infinities and NaN included.

    `total_sequences` is the number of real sequences of the full optimizer batch, over all
    micro-batches and devices; padding rows are not counted. Loss and diagnostics of the
    micro-batches then *add up* to the full batch's: accumulate by summing, without dividing.

    Diagnostics, aggregated as the loss: `clip_fraction` (tokens on which the clip cuts the
    gradient), `ratio_mean` (of rho), `approx_kl` (k3 = rho - 1 - log rho, at least 0).
    """
    chex.assert_rank([logprobs_BT, old_logprobs_BT, mask_BT], 2)
    chex.assert_equal_shape([logprobs_BT, old_logprobs_BT, mask_BT])
    chex.assert_rank(advantages, {1, 2})
    advantages_BT = advantages[:, None] if advantages.ndim == 1 else advantages
    chex.assert_axis_dimension(advantages_BT, 0, logprobs_BT.shape[0])

    mask_BT = mask_BT.astype(bool)
    advantages_BT = jnp.broadcast_to(jax.lax.stop_gradient(advantages_BT), logprobs_BT.shape)
    # Each input is chosen before it is used: a NaN off the mask would survive a later `where`
    # in the gradient.
    advantages_BT = jnp.where(mask_BT, advantages_BT, 0.0)
    new_BT = jnp.where(mask_BT, logprobs_BT, 0.0)
    old_BT = jnp.where(mask_BT, jax.lax.stop_gradient(old_logprobs_BT), 0.0)

    log_ratio_BT = new_BT - old_BT
    ratio_BT = jnp.exp(log_ratio_BT)
    clipped_BT = jnp.clip(ratio_BT, 1.0 - clip_low, 1.0 + clip_high)
    plain_BT, bounded_BT = ratio_BT * advantages_BT, clipped_BT * advantages_BT
    # `where`, not `minimum`: jnp splits the gradient at ties, and clip has slope 1/2 at its edge.
    cut_BT = bounded_BT < plain_BT
    loss_BT = -jnp.where(cut_BT, jax.lax.stop_gradient(bounded_BT), plain_BT)

    aux_BT = {
        "clip_fraction": cut_BT.astype(loss_BT.dtype),
        "ratio_mean": ratio_BT,
        "approx_kl": ratio_BT - 1.0 - log_ratio_BT,
    }
    aux = {
        name: jax.lax.stop_gradient(sequence_mean(value_BT, mask_BT, total_sequences))
        for name, value_BT in aux_BT.items()
    }
    return sequence_mean(loss_BT, mask_BT, total_sequences), aux
