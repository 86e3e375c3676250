"""Packing, by hand-written rows and by what must hold of every packing."""

import jax
import numpy as np
import pytest

from r1s_jax.rl.batching import Batch, minibatches, pack, unpack
from r1s_jax.types import Question, StopReason, TokenSource, Trajectory

P, S, O = TokenSource.PROMPT, TokenSource.SAMPLED, TokenSource.OBSERVATION  # noqa: E741
PAD = 99


def _trajectory(sources, first=1, stop_reason=StopReason.ANSWER, logprobs=None):
    sources = np.array(sources, np.int8)
    if logprobs is None:
        logprobs = np.where(sources == S, -0.5 * np.arange(len(sources)), 0.0)
    return Trajectory(
        question=Question(id="q", text="?", answers=("a",)),
        attempt=0,
        sample=3,
        weights_version=0,
        token_ids_T=np.arange(first, first + len(sources), dtype=np.int32),
        sources_T=sources,
        logprobs_T=np.asarray(logprobs, np.float32),
        drawn_logprobs_T=np.asarray(logprobs, np.float32),
        segments=(),
        searches=(),
        stop_reason=stop_reason,
    )


def _of_length(length):
    return _trajectory([P] + [S] * (length - 1), first=length)


def test_rows_by_hand():
    trajectories = [
        _trajectory([P, P, S], first=10),
        _trajectory([P, S, O, O, S], first=20),
        _trajectory([P, S, S], first=30),
    ]
    long, short = pack(
        trajectories, np.array([0.5, -1.0, 2.0]), rows=2, length_buckets=(4, 8), pad_id=PAD
    )
    np.testing.assert_array_equal(long.episode_B, [1, 0])
    np.testing.assert_array_equal(
        long.tokens_BT, [[20, 21, 22, 23, 24, PAD, PAD, PAD], [10, 11, 12] + [PAD] * 5]
    )
    np.testing.assert_array_equal(
        long.mask_BT, np.array([[0, 1, 0, 0, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0, 0]], bool)
    )
    np.testing.assert_array_equal(
        long.sampler_logprobs_BT, [[0, -0.5, 0, 0, -2.0, 0, 0, 0], [0, 0, -1.0, 0, 0, 0, 0, 0]]
    )
    np.testing.assert_array_equal(long.advantages_B, [-1.0, 0.5])
    np.testing.assert_array_equal(long.lengths_B, [5, 3])

    np.testing.assert_array_equal(short.episode_B, [2, -1])
    np.testing.assert_array_equal(short.tokens_BT, [[30, 31, 32, PAD], [PAD] * 4])
    np.testing.assert_array_equal(short.mask_BT, np.array([[0, 1, 1, 0], [0] * 4], bool))
    np.testing.assert_array_equal(short.advantages_B, [2.0, 0.0])
    np.testing.assert_array_equal(short.lengths_B, [3, 0])

    dtypes = [str(a.dtype) for a in jax.tree.leaves(short)]
    assert sorted(dtypes) == ["bool", "float32", "float32", "int32", "int32", "int32"]


def test_every_packing_keeps_every_episode_once_in_its_smallest_bucket():
    rng = np.random.default_rng(0)
    buckets = (16, 4, 8)  # any order
    trajectories = [_of_length(int(n)) for n in rng.integers(2, 17, size=21)]
    advantages = rng.normal(size=21).astype(np.float32)
    batches = pack(trajectories, advantages, rows=4, length_buckets=buckets, pad_id=PAD)
    assert len(batches) == 6
    assert all(b.tokens_BT.shape[0] == 4 for b in batches)
    order = np.concatenate([b.episode_B for b in batches])
    assert sorted(order[order >= 0].tolist()) == list(range(21))
    assert (order[21:] == -1).all()
    lengths = [len(trajectories[i].token_ids_T) for i in order[:21]]
    assert lengths == sorted(lengths, reverse=True)
    ties = [(lengths[i], order[i]) for i in range(21)]
    assert ties == sorted(ties, key=lambda pair: (-pair[0], pair[1]))  # the sort is stable
    for batch in batches:
        assert batch.tokens_BT.shape[1] == min(b for b in buckets if b >= batch.lengths_B.max())
        for row, episode in enumerate(batch.episode_B):
            if episode >= 0:
                length = batch.lengths_B[row]
                np.testing.assert_array_equal(
                    batch.tokens_BT[row, :length], trajectories[episode].token_ids_T
                )
                assert batch.mask_BT[row].sum() == trajectories[episode].sampled_count
                assert batch.advantages_B[row] == advantages[episode]


def test_unpack_restores_the_order():
    trajectories = [_of_length(n) for n in (3, 8, 2, 5, 2)]
    batches = pack(trajectories, np.zeros(5), rows=2, length_buckets=(4, 8), pad_id=0)
    values = unpack(batches, [jax.numpy.float32(b.tokens_BT) for b in batches], 5)
    assert values.shape == (5, 8)
    assert values.dtype == np.float32
    for row, trajectory in zip(values, trajectories, strict=True):
        ids = trajectory.token_ids_T
        np.testing.assert_array_equal(row, np.pad(ids, (0, 8 - len(ids))))


def test_logprobs_of_tokens_that_were_not_sampled_are_left_out():
    trajectory = _trajectory([P, O, S], logprobs=[-7.0, -7.0, -7.0])
    (batch,) = pack([trajectory], np.zeros(1), rows=1, length_buckets=(3,), pad_id=0)
    np.testing.assert_array_equal(batch.sampler_logprobs_BT, [[0.0, 0.0, -7.0]])


def test_batch_is_a_pytree_that_jit_takes_and_returns():
    (batch,) = pack([_of_length(3)], np.ones(1), rows=2, length_buckets=(4,), pad_id=0)
    out = jax.jit(lambda b: b)(batch)
    assert isinstance(out, Batch)
    jax.tree.map(np.testing.assert_array_equal, out, batch)


def test_no_episode_no_batch():
    assert pack([], np.zeros(0), rows=2, length_buckets=(4,), pad_id=0) == []


def test_refusals():
    def attempt(trajectory, advantages=(1.0,), rows=1, buckets=(4,)):
        pack([trajectory], np.array(advantages), rows=rows, length_buckets=buckets, pad_id=0)

    with pytest.raises(ValueError, match="9 tokens, the largest bucket holds 8"):
        attempt(_of_length(9), buckets=(8, 4))
    with pytest.raises(ValueError, match=r"1 episodes but advantages of \(2,\)"):
        attempt(_of_length(3), advantages=(1.0, 2.0))
    with pytest.raises(ValueError, match="retrieval_failed"):
        attempt(_trajectory([P, S], stop_reason=StopReason.RETRIEVAL_FAILED))
    with pytest.raises(ValueError, match=r"lengths \(2, 2, 3\)"):
        attempt(_trajectory([P, S], logprobs=[0.0, 0.0, 0.0]))
    with pytest.raises(ValueError, match="token 0"):
        attempt(_trajectory([S, S]))
    with pytest.raises(ValueError, match="rows = 0"):
        attempt(_of_length(3), rows=0)


@pytest.mark.parametrize(
    ("episodes", "count", "sizes"),
    [
        (1024, 4, [256] * 4),
        (1021, 4, [256, 255, 255, 255]),  # three episodes lost
        (5, 4, [2, 1, 1, 1]),
        (3, 4, [1, 1, 1]),
        (7, 1, [7]),
        (0, 4, []),
    ],
)
def test_minibatches(episodes, count, sizes):
    slices = minibatches(episodes, count)
    assert [s.stop - s.start for s in slices] == sizes
    assert [i for s in slices for i in range(episodes)[s]] == list(range(episodes))


def test_minibatches_refuses_none():
    with pytest.raises(ValueError, match="count = 0"):
        minibatches(4, 0)
