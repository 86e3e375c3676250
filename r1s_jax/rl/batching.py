"""Trajectories -> packed learner batches of one static shape (host, numpy).

An optimizer minibatch of episodes is laid into rows of `row_tokens` tokens, several episodes to a
row, and the rows are cut into micro-batches of `rows` rows. Episodes in a row do not see each
other: each has a segment number of its own and positions that start at 0. The layout is a function
of the episodes alone, in the order given: (question, sample), not arrival.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from r1s_jax.types import StopReason, TokenSource, Trajectory

# Of a row, whatever its length: a static number, because sums over episodes have a static shape.
# Shorter episodes than row_tokens / 64 are rare, and a row that has so many is simply full.
EPISODES_PER_ROW = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch, a jax pytree: numpy arrays from `pack`, whatever a tree map makes of them.

    Index t of every [B, T] array refers to token t itself, not to the prediction made at t:
    `mask_BT[b, t]` is True where `tokens_BT[b, t]` was sampled, and the logits at t - 1 predict
    it. The first token of an episode is never sampled (checked by `pack`), so no prediction across
    the border of two episodes is ever used.
    """

    tokens_BT: Any  # int32, pad_id where there is no episode
    positions_BT: Any  # int32, from 0 in every episode
    segments_BT: Any  # int32, 1, 2, ... in the order of the row; 0 where there is no episode
    mask_BT: Any  # bool, True where the policy sampled the token
    sampler_logprobs_BT: Any  # float32, under the full softmax; 0.0 where not sampled
    drawn_logprobs_BT: Any  # float32, under what was drawn from; 0.0 where not sampled


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where an episode lies: micro-batch, row, and its tokens' columns."""

    batch: int
    row: int
    columns: slice


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed:
    """The micro-batches of a minibatch, and where each episode lies, in the order given."""

    batches: tuple[Batch, ...]
    places: tuple[Place, ...]

    def scatter(self, values: Iterable[Any]) -> list[Float[np.ndarray, "B T"]]:
        """An array a micro-batch: each episode's values (a number, or one a token) at its place."""
        arrays = [np.zeros(batch.tokens_BT.shape, np.float32) for batch in self.batches]
        for place, value in zip(self.places, values, strict=True):
            arrays[place.batch][place.row, place.columns] = value
        return arrays

    def gather(self, arrays: Sequence[Any]) -> list[np.ndarray]:
        """The other way round: each episode's part of per-token results, one array a batch."""
        host = [np.asarray(array) for array in arrays]
        return [host[p.batch][p.row, p.columns] for p in self.places]


def pack(trajectories: Sequence[Trajectory], *, rows: int, row_tokens: int, pad_id: int) -> Packed:
    """One optimizer minibatch as micro-batches of shape [rows, row_tokens].

    Raises ValueError, quoting both numbers, for an episode longer than a row, arrays of different
    lengths within an episode; and for an episode that ended RETRIEVAL_FAILED or whose first token
    is marked as sampled.
    """
    for trajectory in trajectories:
        _check(trajectory, longest=row_tokens)
    lengths_N = np.array([len(t.token_ids_T) for t in trajectories], np.int32)
    filled = fill_rows(lengths_N, row_tokens)
    # The last micro-batch may have empty rows.
    count = -(-len(filled) // rows)
    batches = [empty_batch(rows, row_tokens, pad_id) for _ in range(count)]
    places: list[Place | None] = [None] * len(trajectories)
    for number, episodes in enumerate(filled):
        which, row = divmod(number, rows)
        start = 0
        for segment, episode in enumerate(episodes, start=1):
            columns = slice(start, start + int(lengths_N[episode]))
            _fill(batches[which], row, columns, segment, trajectories[episode])
            places[episode] = Place(batch=which, row=row, columns=columns)
            start = columns.stop
    return Packed(batches=tuple(batches), places=tuple(p for p in places if p is not None))


def fill_rows(lengths_N: Int[np.ndarray, " N"], row_tokens: int) -> list[list[int]]:
    """Episodes of every row: the longest that is left, and those of the rest that fill it best.

    (The subset-sum heuristic of bin packing, Caprara & Pferschy 2004.) Longer ones are preferred
    where two choices fill a row alike, of equal ones the first.
    """
    left = np.argsort(-lengths_N, kind="stable").tolist()
    rows: list[list[int]] = []
    while left:
        longest, *others = left
        room = row_tokens - int(lengths_N[longest])
        # Bit s of sums[i]: some of the first i others have s tokens together.
        sums, within = [1], (1 << room + 1) - 1
        for episode in others:
            sums.append(sums[-1] | sums[-1] << int(lengths_N[episode]) & within)
        total, chosen = sums[-1].bit_length() - 1, []
        for i in range(len(others) - 1, -1, -1):
            if not sums[i] >> total & 1:  # not to be had without this one
                chosen.append(others[i])
                total -= int(lengths_N[others[i]])
        rows.append([longest, *reversed(chosen)][:EPISODES_PER_ROW])
        taken = set(rows[-1])
        left = [episode for episode in left if episode not in taken]
    return rows


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


def token_weights(
    counts_M: Int[np.ndarray, " M"], aggregation: str, length_norm: int
) -> Float[np.ndarray, " M"]:
    """w_t of every episode's tokens (`algorithm`); `counts_M` are the minibatch's sampled tokens.

    An episode without a sampled token counts among the episodes.
    """
    counts_M = np.asarray(counts_M, np.float64)
    episodes = len(counts_M)
    if aggregation == "token_mean":
        return np.full(episodes, 1 / max(counts_M.sum(), 1))
    if aggregation == "fixed_length":
        return np.full(episodes, 1 / (length_norm * episodes))
    return 1 / (np.maximum(counts_M, 1) * episodes)


def empty_batch(rows: int, row_tokens: int, pad_id: int) -> Batch:
    """A micro-batch of padding alone."""
    shape = rows, row_tokens
    return Batch(
        tokens_BT=np.full(shape, pad_id, np.int32),
        positions_BT=np.zeros(shape, np.int32),
        segments_BT=np.zeros(shape, np.int32),
        mask_BT=np.zeros(shape, bool),
        sampler_logprobs_BT=np.zeros(shape, np.float32),
        drawn_logprobs_BT=np.zeros(shape, np.float32),
    )


def _check(trajectory: Trajectory, longest: int) -> None:
    name = f"question {trajectory.question.id!r} sample {trajectory.sample}"
    length = len(trajectory.token_ids_T)
    if trajectory.stop_reason == StopReason.RETRIEVAL_FAILED:
        raise ValueError(f"{name} ended {StopReason.RETRIEVAL_FAILED}: it has no place in a loss")
    arrays = (trajectory.sources_T, trajectory.logprobs_T, trajectory.drawn_logprobs_T)
    parallel = length, *(len(values_T) for values_T in arrays)
    if len(set(parallel)) != 1:
        raise ValueError(f"{name}: token ids, sources and log-probs have lengths {parallel}")
    if length > longest:
        raise ValueError(f"{name} has {length} tokens, a row holds {longest}")
    if length == 0 or trajectory.sources_T[0] == TokenSource.SAMPLED:
        raise ValueError(f"{name} has {length} tokens and no prompt: token 0 cannot be sampled")


def _fill(batch: Batch, row: int, columns: slice, segment: int, trajectory: Trajectory) -> None:
    sampled_T = np.asarray(trajectory.sources_T) == TokenSource.SAMPLED
    batch.tokens_BT[row, columns] = trajectory.token_ids_T
    batch.positions_BT[row, columns] = np.arange(len(sampled_T))
    batch.segments_BT[row, columns] = segment
    batch.mask_BT[row, columns] = sampled_T
    batch.sampler_logprobs_BT[row, columns] = np.where(sampled_T, trajectory.logprobs_T, 0.0)
    batch.drawn_logprobs_BT[row, columns] = np.where(sampled_T, trajectory.drawn_logprobs_T, 0.0)
