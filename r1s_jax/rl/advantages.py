"""Rewards of a whole rollout -> advantages (host, float64 inside, float32 out; pure functions).

An estimator is two choices: what a group of samples of one question does to its rewards, and
whether the result is whitened over the batch.

    reinforce_plus_plus_baseline   r - mean_g, whitened                  (the paper's; 2501.03262)
    grpo                           (r - mean_g) / (std_g + 1e-9)         (unbiased std; 2402.03300)
    rloo                           r - mean of the others in the group   (2402.14740)
    dr_grpo                        r - mean_g                            (2503.20783)

The reward sits on the last token and gamma = 1, so the return-to-go is the same number on every
token of an episode: the advantage is one scalar per episode, broadcast by the loss over its
sampled tokens. Whitening is over *tokens*: an episode counts as often as it has sampled tokens.
It is over the whole rollout batch, so the caller passes all episodes of all hosts at once.

A KL penalty of kind k1 is part of the reward: -beta * (log pi_old - log pi_ref) on each sampled
token. Its return-to-go differs from token to token, so it enters between the group baseline and
the whitening and makes the advantages token-wise: `token_advantages`.

Conventions and departures from the released code:
  - rewards are clamped to +-10 before the group baseline;
  - sigma of the whitening is the population one over tokens, sqrt(max(variance, 1e-8));
  - whitening moves a group whose rewards are all equal by -mu/sigma (faithful). Who wants it
    gone keeps the episodes of such groups out: `has_contrast`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from r1s_jax.types import UserError

REWARD_CLAMP = 10.0
MINIMUM_VARIANCE = 1e-8
STANDARD_DEVIATION_EPSILON = 1e-9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimator:
    """How the rewards of a group [G] become advantages, and whether the batch is whitened."""

    of_group: Callable[[np.ndarray], np.ndarray]
    whitened: bool


def _minus_mean(rewards_G: np.ndarray) -> np.ndarray:
    return rewards_G - rewards_G.mean()


def _standardised(rewards_G: np.ndarray) -> np.ndarray:
    deviation = rewards_G.std(ddof=1) + STANDARD_DEVIATION_EPSILON
    return (rewards_G - rewards_G.mean()) / deviation


def _minus_others(rewards_G: np.ndarray) -> np.ndarray:
    others = (rewards_G.sum() - rewards_G) / (len(rewards_G) - 1)
    return rewards_G - others


ESTIMATORS: dict[str, Estimator] = {
    "reinforce_plus_plus_baseline": Estimator(of_group=_minus_mean, whitened=True),
    "grpo": Estimator(of_group=_standardised, whitened=False),
    "rloo": Estimator(of_group=_minus_others, whitened=False),
    "dr_grpo": Estimator(of_group=_minus_mean, whitened=False),
}


def estimator_by_name(name: str) -> Estimator:
    """The estimator called `name`; UserError listing the names if there is none."""
    if name not in ESTIMATORS:
        raise UserError(f"estimator = {name!r}: unknown, choose one of {', '.join(ESTIMATORS)}")
    return ESTIMATORS[name]


def check_group_size(samples_per_question: int, estimator: str) -> None:
    """Refuse at start a group too small for a group baseline (UserError, one line)."""
    estimator_by_name(estimator)
    if samples_per_question < 2:
        raise UserError(
            f"samples_per_question = {samples_per_question}, but estimator = {estimator!r} "
            "compares the samples of one question and needs at least 2"
        )


def has_contrast(
    rewards_N: Float[np.ndarray, " N"], group_ids_N: Int[np.ndarray, " N"]
) -> Bool[np.ndarray, " N"]:
    """True for the episodes of groups whose clamped rewards differ; arrays as in `advantages`.

    The others say nothing about which sample was better (dynamic sampling of 2503.14476). Raises
    ValueError for a reward that is not finite.
    """
    clamped_N = _clamped(rewards_N)
    contrast_N = np.zeros(clamped_N.shape, bool)
    for group_id in np.unique(group_ids_N):
        members = group_ids_N == group_id
        contrast_N[members] = clamped_N[members].min() < clamped_N[members].max()
    return contrast_N


def advantages(
    rewards_N: Float[np.ndarray, " N"],
    group_ids_N: Int[np.ndarray, " N"],
    token_counts_N: Int[np.ndarray, " N"],
    *,
    estimator: str,
    kept_N: Bool[np.ndarray, " N"] | None = None,
) -> Float[np.ndarray, " N"]:
    """Advantage of each episode, to be broadcast over its sampled tokens (float32).

    `group_ids_N` are equal for samples of the same question and attempt, in any order;
    `token_counts_N` are the numbers of sampled tokens. Episodes that are not kept count in their
    group's baseline, but not in the whitening, and have 0. An empty rollout gives an empty array.

    Raises UserError for an unknown estimator, ValueError for arrays of different lengths, a
    reward that is not finite, or a group of fewer than two episodes.
    """
    chosen = estimator_by_name(estimator)
    counts_N = np.asarray(token_counts_N, np.float64)
    grouped_N = _group_advantages(rewards_N, group_ids_N, chosen)
    if counts_N.shape != grouped_N.shape:
        raise ValueError(f"{grouped_N.shape} rewards_N but {counts_N.shape} token_counts_N")
    kept_N = np.ones(grouped_N.shape, bool) if kept_N is None else kept_N
    if chosen.whitened:
        grouped_N = _whiten(grouped_N, np.where(kept_N, counts_N, 0.0))
    return np.where(kept_N, grouped_N, 0.0).astype(np.float32)


def token_advantages(
    rewards_N: Float[np.ndarray, " N"],
    group_ids_N: Int[np.ndarray, " N"],
    returns: Sequence[Float[np.ndarray, " _"] | None],
    masks: Sequence[Bool[np.ndarray, " _"] | None],
    *,
    estimator: str,
) -> list[Float[np.ndarray, " _"] | None]:
    """Token-wise advantages: every episode's returns-to-go come on top of its group's baseline.

    `returns` (see `kl_returns`) and `masks`, True on sampled tokens, are one array an episode, or
    None where it is not kept (see `advantages`); so is the result (float32, 0 off the mask). With
    returns of 0 it is `advantages`. Raises as `advantages`, and ValueError for another number of
    arrays than of rewards.
    """
    chosen = estimator_by_name(estimator)
    grouped_N = _group_advantages(rewards_N, group_ids_N, chosen)
    if not len(returns) == len(masks) == len(grouped_N):
        raise ValueError(f"{len(grouped_N)} rewards, {len(returns)} returns, {len(masks)} masks")
    sums = [None if r is None else a + r for a, r in zip(grouped_N, returns, strict=True)]
    if chosen.whitened:
        there = [(s, m) for s, m in zip(sums, masks, strict=True) if s is not None]
        sampled = np.concatenate([s[m] for s, m in there]) if there else np.zeros(0)
        if len(sampled):
            mean, deviation = _moments(sampled, np.ones(len(sampled)))
            sums = [None if s is None else (s - mean) / deviation for s in sums]
    return [
        None if s is None or m is None else np.where(m, s, 0.0).astype(np.float32)
        for s, m in zip(sums, masks, strict=True)
    ]


def kl_returns(
    old_logprobs_T: Float[np.ndarray, " T"],
    ref_logprobs_T: Float[np.ndarray, " T"],
    mask_T: Bool[np.ndarray, " T"],
    kl_weight: float,
) -> Float[np.ndarray, " T"]:
    """Return-to-go (gamma = 1) of the reward -beta * k1, k1 = log pi_old - log pi_ref.

    Tokens off the mask (prompt, documents) earn nothing; a token's return holds its own penalty
    and those of all sampled tokens of the episode after it, across documents in between. Float64.
    Raises ValueError for shapes that differ or a negative weight.
    """
    shapes = np.shape(old_logprobs_T), np.shape(ref_logprobs_T), np.shape(mask_T)
    if len(set(shapes)) != 1:
        raise ValueError(f"old log-probs, reference log-probs and mask have shapes {shapes}")
    if kl_weight < 0.0:
        raise ValueError(f"kl_weight = {kl_weight}, expected at least 0")
    # Off the mask the two may hold anything, infinities included: choose before subtracting.
    old_T = np.where(mask_T, old_logprobs_T, 0.0).astype(np.float64)
    ref_T = np.where(mask_T, ref_logprobs_T, 0.0).astype(np.float64)
    return np.cumsum((-kl_weight * (old_T - ref_T))[::-1])[::-1]


def _group_advantages(
    rewards_N: np.ndarray, group_ids_N: np.ndarray, chosen: Estimator
) -> np.ndarray:
    rewards_N = _clamped(rewards_N)
    group_ids_N = np.asarray(group_ids_N)
    if group_ids_N.shape != rewards_N.shape:
        raise ValueError(f"{rewards_N.shape} rewards_N but {group_ids_N.shape} group_ids_N")
    grouped_N = np.zeros_like(rewards_N)
    for group_id in np.unique(group_ids_N):
        members = group_ids_N == group_id
        size = int(members.sum())
        if size < 2:
            raise ValueError(f"group {group_id} has {size} episode, a group baseline needs 2")
        rewards_G = rewards_N[members]
        # Else exactly 0: the rounded mean of equal numbers need not equal them.
        if rewards_G.min() < rewards_G.max():
            grouped_N[members] = chosen.of_group(rewards_G)
    return grouped_N


def _clamped(rewards_N: np.ndarray) -> np.ndarray:
    rewards_N = np.asarray(rewards_N, np.float64)
    if not np.isfinite(rewards_N).all():
        raise ValueError(f"reward {rewards_N[~np.isfinite(rewards_N)][0]} is not finite")
    return np.clip(rewards_N, -REWARD_CLAMP, REWARD_CLAMP)


def _whiten(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(values - mu) / sigma with weighted population statistics; all zeros without weight."""
    if weights.sum() == 0.0:
        return np.zeros_like(values)
    mean, deviation = _moments(values, weights)
    return (values - mean) / deviation


def _moments(values: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    total = weights.sum()
    mean = (weights * values).sum() / total
    variance = (weights * (values - mean) ** 2).sum() / total
    return mean, np.sqrt(max(variance, MINIMUM_VARIANCE))
