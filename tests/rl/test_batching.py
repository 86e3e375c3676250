"""Packing, by hand-written rows and by what must hold of every packing."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from r1s_jax.rl.batching import (
    EPISODES_PER_ROW,
    Batch,
    empty_batch,
    fill_rows,
    minibatches,
    pack,
    token_weights,
)
from r1s_jax.types import Question, StopReason, TokenSource, Trajectory

P, S, O = TokenSource.PROMPT, TokenSource.SAMPLED, TokenSource.OBSERVATION  # noqa: E741
PAD = 99


def _trajectory(sources, first=1, stop_reason=StopReason.ANSWER, logprobs=None, drawn=None):
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
        drawn_logprobs_T=np.asarray(logprobs if drawn is None else drawn, np.float32),
        segments=(),
        searches=(),
        stop_reason=stop_reason,
    )


def _random_trajectories(seed, count, longest):
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        sources = rng.choice([P, S, O], rng.integers(1, longest + 1))
        sources[0] = P
        logprobs, drawn = -rng.random((2, len(sources)))
        first = 1000 * (number + 1)  # every token of all is unlike the others
        made.append(_trajectory(sources, first=first, logprobs=logprobs, drawn=drawn))
    return made


# ---------------------------------------------------------------- rows


def test_rows_by_hand():
    trajectories = [
        _trajectory([P, P, S], first=10, drawn=[7, 7, -0.25]),
        _trajectory([P, S, O, O, S], first=20),
        _trajectory([P, S, S], first=30),
        _trajectory([P, S], first=40),
    ]
    packed = pack(trajectories, rows=2, row_tokens=8, pad_id=PAD)
    # The longest first; then 3 beside it; the next 3 and the 2 find no room there.
    (batch,) = packed.batches
    np.testing.assert_array_equal(
        batch.tokens_BT,
        [[20, 21, 22, 23, 24, 10, 11, 12], [30, 31, 32, 40, 41, PAD, PAD, PAD]],
    )
    np.testing.assert_array_equal(
        batch.positions_BT, [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 0, 1, 0, 0, 0]]
    )
    np.testing.assert_array_equal(
        batch.segments_BT, [[1, 1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 2, 2, 0, 0, 0]]
    )
    mask = np.array([[0, 1, 0, 0, 1, 0, 0, 1], [0, 1, 1, 0, 1, 0, 0, 0]], bool)
    np.testing.assert_array_equal(batch.mask_BT, mask)
    logprobs = np.array([[0, -0.5, 0, 0, -2, 0, 0, -1], [0, -0.5, -1, 0, -0.5, 0, 0, 0]])
    np.testing.assert_array_equal(batch.sampler_logprobs_BT, logprobs)
    logprobs[0, 7] = -0.25
    np.testing.assert_array_equal(batch.drawn_logprobs_BT, logprobs)
    columns = [(p.batch, p.row, p.columns.start, p.columns.stop) for p in packed.places]
    assert columns == [(0, 0, 5, 8), (0, 0, 0, 5), (0, 1, 0, 3), (0, 1, 3, 5)]
    dtypes = {f.name: str(getattr(batch, f.name).dtype) for f in dataclasses.fields(Batch)}
    assert dtypes == {
        "tokens_BT": "int32", "positions_BT": "int32", "segments_BT": "int32", "mask_BT": "bool",
        "sampler_logprobs_BT": "float32", "drawn_logprobs_BT": "float32",
    }  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("rows", "row_tokens"), [(1, 40), (4, 40), (3, 12), (64, 500)])
def test_every_token_is_there_once(seed, rows, row_tokens):
    trajectories = _random_trajectories(seed, 40, longest=12)
    packed = pack(trajectories, rows=rows, row_tokens=row_tokens, pad_id=PAD)
    flat = {
        f.name: np.concatenate([getattr(b, f.name).reshape(-1) for b in packed.batches])
        for f in dataclasses.fields(Batch)
    }
    assert all(b.tokens_BT.shape == (rows, row_tokens) for b in packed.batches)
    there = flat["segments_BT"] > 0
    assert sorted(flat["tokens_BT"][there]) == sorted(
        np.concatenate([t.token_ids_T for t in trajectories])
    )
    nothing = empty_batch(1, int((~there).sum()), PAD)
    for name, values in flat.items():
        np.testing.assert_array_equal(values[~there], getattr(nothing, name)[0], err_msg=name)
    for trajectory, place in zip(trajectories, packed.places, strict=True):
        batch = packed.batches[place.batch]
        mine = {name: getattr(batch, name)[place.row, place.columns] for name in flat}
        sampled = trajectory.sources_T == S
        np.testing.assert_array_equal(mine["tokens_BT"], trajectory.token_ids_T)
        np.testing.assert_array_equal(mine["positions_BT"], np.arange(len(sampled)))
        np.testing.assert_array_equal(mine["mask_BT"], sampled)
        for name, values in (
            ("sampler_logprobs_BT", trajectory.logprobs_T),
            ("drawn_logprobs_BT", trajectory.drawn_logprobs_T),
        ):
            np.testing.assert_array_equal(mine[name], np.where(sampled, values, 0))
        # The segment is this episode's and nobody else's in the row.
        (number,) = set(mine["segments_BT"].tolist())
        assert (batch.segments_BT[place.row] == number).sum() == len(sampled)
    for batch in packed.batches:
        for row in batch.segments_BT:
            numbers = row[row > 0]
            assert (np.diff(numbers) >= 0).all() and (row[len(numbers) :] == 0).all()
            assert sorted(set(numbers)) == list(range(1, 1 + numbers.max(initial=0)))
    # Only the last micro-batch has rows without an episode.
    for batch in packed.batches[:-1]:
        assert (batch.segments_BT[:, 0] == 1).all()
    assert packed.batches[-1].segments_BT[0, 0] == 1


def test_layout_is_a_function_of_the_episodes():
    one, two = (
        pack(_random_trajectories(5, 30, longest=9), rows=2, row_tokens=20, pad_id=PAD)
        for _ in range(2)
    )
    assert one.places == two.places
    for a, b in zip(one.batches, two.batches, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_scatter_and_gather_are_inverse():
    trajectories = _random_trajectories(6, 25, longest=9)
    packed = pack(trajectories, rows=2, row_tokens=20, pad_id=PAD)
    assert len(packed.batches) > 2
    rng = np.random.default_rng(6)
    values = [rng.random(len(t.token_ids_T)).astype(np.float32) for t in trajectories]
    arrays = packed.scatter(values)
    assert [a.dtype for a in arrays] == [np.float32] * len(packed.batches)
    for back, value in zip(packed.gather(arrays), values, strict=True):
        np.testing.assert_array_equal(back, value)
    for array, batch in zip(arrays, packed.batches, strict=True):
        assert not array[batch.segments_BT == 0].any()
    tokens = packed.gather([jax.numpy.asarray(b.tokens_BT) for b in packed.batches])
    for back, trajectory in zip(tokens, trajectories, strict=True):
        np.testing.assert_array_equal(back, trajectory.token_ids_T)
    numbers = np.arange(1, 26)  # one an episode, on all of its tokens
    for back, number, value in zip(
        packed.gather(packed.scatter(numbers)), numbers, values, strict=True
    ):
        np.testing.assert_array_equal(back, np.full(len(value), number))
    with pytest.raises(ValueError):
        packed.scatter(values[1:])


def test_batch_is_a_pytree_that_jit_takes_and_returns():
    (batch,) = pack([_trajectory([P, S, S])], rows=2, row_tokens=4, pad_id=0).batches
    out = jax.jit(lambda b: b)(batch)
    assert isinstance(out, Batch)
    jax.tree.map(np.testing.assert_array_equal, out, batch)


def test_no_episode_no_batch():
    packed = pack([], rows=2, row_tokens=4, pad_id=0)
    assert (packed.batches, packed.places) == ((), ())
    assert packed.scatter([]) == [] and packed.gather([]) == []


def test_refusals():
    def attempt(trajectory, row_tokens=4):
        pack([_trajectory([P, S]), trajectory], rows=1, row_tokens=row_tokens, pad_id=0)

    with pytest.raises(ValueError, match="'q' sample 3 has 9 tokens, a row holds 8"):
        attempt(_trajectory([P] + [S] * 8), row_tokens=8)
    attempt(_trajectory([P] + [S] * 7), row_tokens=8)
    with pytest.raises(ValueError, match="retrieval_failed"):
        attempt(_trajectory([P, S], stop_reason=StopReason.RETRIEVAL_FAILED))
    with pytest.raises(ValueError, match=r"lengths \(2, 2, 3, 3\)"):
        attempt(_trajectory([P, S], logprobs=[0.0, 0.0, 0.0]))
    with pytest.raises(ValueError, match=r"lengths \(2, 2, 2, 1\)"):
        attempt(_trajectory([P, S], drawn=[-1.0]))
    with pytest.raises(ValueError, match="token 0"):
        attempt(_trajectory([S, S]))
    with pytest.raises(ValueError, match="0 tokens"):
        attempt(_trajectory([]))


# ---------------------------------------------------------------- which episodes share a row


def _fewest_rows(lengths, row_tokens):
    """By trying: episode after episode into each row so far, or into a new one."""
    best = len(lengths)

    def place(i, left):
        nonlocal best
        if len(left) >= best:
            return
        if i == len(lengths):
            best = len(left)
            return
        for room in {r for r in left if r >= lengths[i]}:
            rest = list(left)
            rest.remove(room)
            place(i + 1, [*rest, room - lengths[i]])
        place(i + 1, [*left, row_tokens - lengths[i]])

    place(0, [])
    return best


def test_rows_are_near_the_fewest():
    rng = np.random.default_rng(0)
    exact = 0
    for _ in range(60):
        lengths = rng.integers(1, 15, rng.integers(1, 10))
        rows, fewest = fill_rows(lengths, 14), _fewest_rows(lengths.tolist(), 14)
        assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
        assert all(lengths[row].sum() <= 14 for row in rows)
        assert fewest <= len(rows) <= fewest + 1
        # The first row is as full as any can be that holds the longest episode.
        others = np.delete(lengths, rows[0][0])
        best = max(
            sum(c)
            for n in range(len(others) + 1)
            for c in itertools.combinations(others, n)
            if sum(c) + lengths[rows[0][0]] <= 14
        )
        assert lengths[rows[0]].sum() == lengths.max() + best
        exact += len(rows) == fewest
    assert exact > 50


def test_rows_are_filled_by_hand():
    """The longest left, what fills it best, longer ones first; ties in the order given."""
    assert fill_rows(np.array([2, 5, 3, 5, 4, 1]), 8) == [[1, 2], [3, 0, 5], [4]]
    assert fill_rows(np.array([6, 3, 5, 4, 2]), 10) == [[0, 3], [2, 1, 4]]
    assert fill_rows(np.array([4, 4, 4, 4]), 8) == [[0, 1], [2, 3]]
    assert fill_rows(np.zeros(0, int), 8) == []


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rows_are_dense_where_lengths_are_an_episode_s(seed):
    """Prompt, one to four turns with documents: 95 % of the rows' tokens are episodes'."""
    rng = np.random.default_rng(seed)
    turns = rng.integers(1, 5, 256)
    written = [np.minimum(rng.lognormal(np.log(60), 0.9, n), 512).sum() for n in turns]
    lengths = (180 + np.array(written) + rng.normal(420, 60, 256) * (turns - 1)).astype(int)
    assert lengths.max() > 3 * lengths.min()
    rows = fill_rows(lengths, 8192)
    assert lengths.sum() / (8192 * len(rows)) >= 0.95
    assert len(rows) <= 1 + -(-lengths.sum() // 8192)  # fewer than the latter cannot be


def test_a_row_takes_so_many_episodes_and_no_more():
    many = [_trajectory([P, S], first=10 * i) for i in range(2 * EPISODES_PER_ROW + 1)]
    (batch,) = pack(many, rows=4, row_tokens=1000, pad_id=PAD).batches
    assert batch.segments_BT.max(1).tolist() == [EPISODES_PER_ROW, EPISODES_PER_ROW, 1, 0]
    # Room is left in the first row for neither of the last two, though they would fit by length.
    lengths = np.array([3] * EPISODES_PER_ROW + [2, 1])
    assert fill_rows(lengths, 1000)[1:] == [[EPISODES_PER_ROW, EPISODES_PER_ROW + 1]]


# ---------------------------------------------------------------- minibatches and weights


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


def test_weights_of_a_minibatch_are_plain_means():
    """Summed with the weights, any number a token becomes the mean that each name says."""
    rng = np.random.default_rng(0)
    counts = np.array([3, 1, 0, 7, 2])
    values = [rng.normal(size=n) for n in counts]
    want = {
        "sequence_mean": sum(v.mean() for v in values if len(v)) / 5,
        "token_mean": np.concatenate(values).mean(),
        "fixed_length": sum(v.sum() for v in values) / 100 / 5,
    }
    for name, number in want.items():
        weights = token_weights(counts, name, 100)
        assert weights.shape == (5,) and np.isfinite(weights).all()
        got = sum(w * v.sum() for w, v in zip(weights, values, strict=True))
        np.testing.assert_allclose(got, number, rtol=1e-12)
        assert np.isfinite(token_weights(np.zeros(2, int), name, 100)).all()
