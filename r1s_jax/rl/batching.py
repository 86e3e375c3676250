"""Trajectories -> learner batches of static shape (host, numpy).

An optimizer minibatch of episodes becomes micro-batches of exactly `rows` rows. Episodes are
sorted by length, longest first, so that a row stands beside rows of about its own length and a
micro-batch is padded only to the smallest bucket that holds its longest row; the empty rows that
fill the last micro-batch are thus the shortest. The sort is stable and episodes come in
(question, sample) order: the batches are a function of the episodes alone, not of arrival order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from r1s_jax.types import StopReason, TokenSource, Trajectory


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch, a jax pytree: numpy arrays from `pack`, whatever a tree map makes of them.

    Index t of every [B, T] array refers to token t itself, not to the prediction made at t:
    `mask_BT[b, t]` is True where `tokens_BT[b, t]` was sampled, and the logits at t - 1 predict
    it. A loss on the log-probabilities of `tokens_BT[:, 1:]` uses `mask_BT[:, 1:]`. Token 0 is
    never sampled (checked by `pack`), so nothing is lost.
    """

    tokens_BT: Any  # int32, pad_id after the end
    mask_BT: Any  # bool, True where the policy sampled the token
    sampler_logprobs_BT: Any  # float32, 0.0 where not sampled
    advantages_B: Any  # float32, 0.0 in padding rows
    lengths_B: Any  # int32, tokens of the row before padding, 0 in padding rows
    episode_B: Any  # int32, index into the list given to `pack`, -1 in padding rows


def pack(
    trajectories: Sequence[Trajectory],
    advantages: Float[np.ndarray, " N"],
    *,
    rows: int,
    length_buckets: Sequence[int],
    pad_id: int,
) -> list[Batch]:
    """One optimizer minibatch as ceil(N / rows) micro-batches of shape [rows, a bucket].

    Raises ValueError, quoting both numbers, for an episode longer than the largest bucket,
    another number of advantages than of episodes, arrays of different lengths within an episode;
    and for an episode that ended RETRIEVAL_FAILED or whose first token is marked as sampled.
    """
    if rows < 1:
        raise ValueError(f"rows = {rows}, at least 1 needed")
    advantages = np.asarray(advantages, np.float32)
    if advantages.shape != (len(trajectories),):
        raise ValueError(f"{len(trajectories)} episodes but advantages of {advantages.shape}")
    for trajectory in trajectories:
        _check(trajectory, longest=max(length_buckets))
    lengths_N = np.array([len(t.token_ids_T) for t in trajectories], np.int32)
    order_N = np.argsort(-lengths_N, kind="stable")
    batches = []
    for start in range(0, len(order_N), rows):
        episodes = order_N[start : start + rows]
        length = min(b for b in length_buckets if b >= lengths_N[episodes[0]])
        batch = empty_batch(rows, length, pad_id)
        for row, episode in enumerate(episodes):
            _fill(batch, row, trajectories[episode])
        batch.episode_B[: len(episodes)] = episodes
        batch.advantages_B[: len(episodes)] = advantages[episodes]
        batches.append(batch)
    return batches


def unpack(batches: Sequence[Batch], values_BT: Sequence[Any], episodes: int) -> np.ndarray:
    """[N, T] of per-token results of the micro-batches, back in the order given to `pack`.

    `values_BT` holds one [rows, T] array (numpy or jax) per batch; T of the result is the largest
    of theirs. Columns beyond a micro-batch's bucket are 0.
    """
    width = max((v.shape[1] for v in values_BT), default=0)
    dtype = values_BT[0].dtype if values_BT else np.float32
    values_NT = np.zeros((episodes, width), dtype)
    for batch, values in zip(batches, values_BT, strict=True):
        real = np.asarray(batch.episode_B) >= 0
        values_NT[batch.episode_B[real], : values.shape[1]] = np.asarray(values)[real]
    return values_NT


def minibatches(n_episodes: int, count: int) -> list[slice]:
    """Contiguous slices that cut a rollout into `count` minibatches, one per optimizer update.

    Sizes are equal, or differ by one where episodes went missing (the larger ones come first);
    never an empty one, so fewer than `count` only when there are fewer episodes.
    """
    if count < 1:
        raise ValueError(f"count = {count} minibatches, at least 1 needed")
    if n_episodes == 0:
        return []
    size, larger = divmod(n_episodes, count)
    ends = np.cumsum([size + (i < larger) for i in range(min(count, n_episodes))]).tolist()
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _check(trajectory: Trajectory, longest: int) -> None:
    name = f"question {trajectory.question.id!r} sample {trajectory.sample}"
    length = len(trajectory.token_ids_T)
    if trajectory.stop_reason == StopReason.RETRIEVAL_FAILED:
        raise ValueError(f"{name} ended {StopReason.RETRIEVAL_FAILED}: it has no place in a loss")
    parallel = length, len(trajectory.sources_T), len(trajectory.logprobs_T)
    if len(set(parallel)) != 1:
        raise ValueError(f"{name}: token ids, sources and logprobs have lengths {parallel}")
    if length > longest:
        raise ValueError(f"{name} has {length} tokens, the largest bucket holds {longest}")
    if length == 0 or trajectory.sources_T[0] == TokenSource.SAMPLED:
        raise ValueError(f"{name} has {length} tokens and no prompt: token 0 cannot be sampled")


def empty_batch(rows: int, length: int, pad_id: int) -> Batch:
    """A micro-batch of padding rows alone."""
    return Batch(
        tokens_BT=np.full((rows, length), pad_id, np.int32),
        mask_BT=np.zeros((rows, length), bool),
        sampler_logprobs_BT=np.zeros((rows, length), np.float32),
        advantages_B=np.zeros(rows, np.float32),
        lengths_B=np.zeros(rows, np.int32),
        episode_B=np.full(rows, -1, np.int32),
    )


def _fill(batch: Batch, row: int, trajectory: Trajectory) -> None:
    length = len(trajectory.token_ids_T)
    sampled_T = np.asarray(trajectory.sources_T) == TokenSource.SAMPLED
    batch.tokens_BT[row, :length] = trajectory.token_ids_T
    batch.mask_BT[row, :length] = sampled_T
    batch.sampler_logprobs_BT[row, :length] = np.where(sampled_T, trajectory.logprobs_T, 0.0)
    batch.lengths_B[row] = length
