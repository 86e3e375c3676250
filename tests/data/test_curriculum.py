import collections
import itertools
import json
import time

import numpy as np
import pytest
from scipy import stats

import launch
from r1s_jax.data.curriculum import (
    CurriculumConfig,
    QuestionStream,
    VarianceStream,
    question_stream,
)
from r1s_jax.types import Question, UserError

SAMPLERS = ("shuffled", "variance")


def _questions(count):
    return [Question(id=f"q{i}", text="?", answers=("a",)) for i in range(count)]


def _take(stream, batches):
    return [[q.id for q in next(stream)] for _ in range(batches)]


def _stream(sampler, count, size, seed):
    config = CurriculumConfig(sampler=sampler)
    return question_stream(config, _questions(count), batch_size=size, seed=seed)


def _variance(count, size, seed=0, **config):
    return VarianceStream(
        _questions(count), batch_size=size, seed=seed, config=CurriculumConfig(**config)
    )


# ---------------------------------------------------------------- both


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("before", range(9))
def test_n_and_n_batches_are_two_n(sampler, before):
    """Also when the state is taken right after a batch that spans two epochs."""

    def play(stream, batches, first=0):
        given = []
        for number in range(first, first + batches):
            ids = [q.id for q in next(stream)]
            given.append(ids)
            # Only half of a batch is heard of: groups can be lost.
            rates = [(int(i[1:]) * 7 + number) % 5 / 4 for i in ids]
            stream.observe(ids[:2], np.array(rates[:2]), [8, 3])
        return given

    whole = play(_stream(sampler, 10, 4, seed=5), before + 9)
    first = _stream(sampler, 10, 4, seed=5)
    play(first, before)
    state = json.loads(json.dumps(first.state()))
    second = _stream(sampler, 10, 4, seed=5)
    play(second, 2, first=100)
    second.restore(state)
    assert second.state() == state
    assert play(second, 9, first=before) == whole[before:]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_state_of_another_stream_is_refused(sampler):
    state = _stream(sampler, 10, 4, seed=5).state()
    for other, count, size, seed, field in (
        (sampler, 9, 4, 5, "questions"),
        (sampler, 10, 5, 5, "batch_size"),
        (sampler, 10, 4, 6, "seed"),
        (*{*SAMPLERS} - {sampler}, 10, 4, 5, "sampler"),
    ):
        with pytest.raises(UserError, match=f'"{field}"'):
            _stream(other, count, size, seed).restore(state)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_too_few_or_repeated_questions_are_user_errors(sampler):
    config = CurriculumConfig(sampler=sampler)
    with pytest.raises(UserError, match=r"3 questions, questions_per_step = 4"):
        question_stream(config, _questions(3), batch_size=4, seed=0)
    with pytest.raises(UserError, match="'q0' occurs twice"):
        question_stream(config, _questions(3) + _questions(1), batch_size=2, seed=0)
    with pytest.raises(ValueError, match="batch_size is 0"):
        question_stream(config, _questions(3), batch_size=0, seed=0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_seeds_differ_and_runs_do_not(sampler):
    def ids(seed):
        return _take(_stream(sampler, 8, 4, seed), 4)

    assert ids(0) == ids(0) != ids(1)
    assert ids(0)[:2] != ids(0)[2:]


# ---------------------------------------------------------------- shuffled


@pytest.mark.parametrize(("count", "size"), [(10, 4), (7, 7), (5, 4), (12, 4), (9, 1), (11, 6)])
def test_every_epoch_asks_everything_once_and_no_batch_twice(count, size):
    batches = _take(QuestionStream(_questions(count), batch_size=size, seed=3), 5 * count)
    assert all(len(b) == len(set(b)) == size for b in batches)
    flat = [i for b in batches for i in b]
    for epoch in range(len(flat) // count):
        assert len(set(flat[epoch * count : (epoch + 1) * count])) == count
    assert set(collections.Counter(flat).values()) == {5 * size}


def test_a_state_from_before_there_were_samplers_is_understood():
    stream = QuestionStream(_questions(10), batch_size=4, seed=5)
    _take(stream, 3)
    state = stream.state()
    del state["sampler"]
    again = QuestionStream(_questions(10), batch_size=4, seed=5)
    again.restore(state)
    assert _take(again, 5) == _take(stream, 5)


# ---------------------------------------------------------------- variance


def _chance(batch, weights):
    """Of drawing these questions in this order, one after the other, without replacement."""
    chance, left = 1.0, sum(weights)
    for i in batch:
        chance *= weights[i] / left
        left -= weights[i]
    return chance


def test_batches_are_drawn_by_weight_without_replacement():
    """Every ordered batch of 2 of 5 against its chance by brute force."""
    stream = _variance(5, 2, floor=0.2, half_life=1e12)
    # Rates 0, 1/4, 1/2, 1 of 4 samples and one unseen: p = 1/10, 3/10, 1/2, 9/10 and 1/2.
    stream.observe(["q0", "q1", "q2", "q3"], [0.0, 0.25, 0.5, 1.0], [4] * 4)
    weights = [0.2 + 0.8 * 4 * p * (1 - p) for p in (0.1, 0.3, 0.5, 0.9, 0.5)]
    np.testing.assert_allclose(stream.weights(), weights, rtol=1e-6)
    counts = collections.Counter(tuple(int(q.id[1:]) for q in next(stream)) for _ in range(20_000))
    orders = list(itertools.permutations(range(5), 2))
    chances = np.array([_chance(order, weights) for order in orders])
    assert set(counts) <= set(orders)
    observed = np.array([counts[order] for order in orders])
    assert stats.chisquare(observed, 20_000 * chances).pvalue > 1e-3


def test_successive_draws_are_independent():
    """With equal weights every pair of two draws in a row is as frequent as any other."""
    stream = _variance(4, 1, floor=1.0)
    pairs = collections.Counter((next(stream)[0].id, next(stream)[0].id) for _ in range(8_000))
    assert len(pairs) == 16
    assert stats.chisquare(list(pairs.values())).pvalue > 1e-3


def test_old_evidence_fades_and_new_evidence_adds_up():
    """Against the sum over all observations, each halved by its age, in exact fractions."""
    stream = _variance(3, 1, half_life=2.0, prior_samples=0.5, floor=0.1)
    seen = []  # (draw, rate, count) of q1
    for draw, (rate, count) in enumerate([(0.25, 4), (1.0, 16), (0.0, 2), (0.5, 8)]):
        next(stream)
        stream.observe(["q1"], [rate], [count])
        seen.append((draw + 1, rate, count))
    for now in range(4, 40):
        passes = sum(r * c * 2 ** (-(now - at) / 2) for at, r, c in seen)
        samples = sum(c * 2 ** (-(now - at) / 2) for at, _, c in seen)
        p = (passes + 0.25) / (samples + 0.5)
        expected = 0.1 + 0.9 * 4 * p * (1 - p)
        np.testing.assert_allclose(stream.weights(), [1.0, expected, 1.0], rtol=1e-6)
        next(stream)
    assert stream.weights()[1] > 0.999  # forgotten: as good as unseen


def test_two_groups_of_one_question_in_one_step_both_count():
    one, two = _variance(2, 1), _variance(2, 1)
    one.observe(["q0", "q0"], [1.0, 0.0], [4, 4])
    two.observe(["q0"], [0.5], [8])
    assert one.weights().tolist() == two.weights().tolist()


def test_the_floor_keeps_every_question_alive():
    stream = _variance(40, 4, floor=0.05, half_life=1e9)
    ids = [f"q{i}" for i in range(40)]
    for _ in range(2):
        stream.observe(ids, [0.5] * 8 + [1.0] * 16 + [0.0] * 16, [10**6] * 40)
    weights = stream.weights()
    np.testing.assert_allclose(weights[:8], 1.0)
    np.testing.assert_allclose(weights[8:], 0.05, rtol=1e-4)
    asked = collections.Counter(i for batch in _take(stream, 1500) for i in batch)
    assert set(asked) == set(ids)
    assert min(asked[i] for i in ids[:8]) > 5 * max(asked[i] for i in ids[8:])


def test_a_batch_can_be_all_questions():
    assert sorted(_take(_variance(6, 6), 1)[0]) == [f"q{i}" for i in range(6)]


def test_wrong_observations_and_constants_are_refused():
    stream = _variance(3, 1)
    for ids, rates, counts, words in (
        (["q9"], [0.5], [1], "'q9' is not of this stream"),
        (["q1"], [1.5], [1], "pass rate 1.5"),
        (["q1"], [float("nan")], [1], "pass rate nan"),
        (["q1"], [0.5], [0], "of 0 samples"),
        (["q1", "q2"], [0.5], [1], "shorter"),
    ):
        with pytest.raises(ValueError, match=words):
            stream.observe(ids, rates, counts)
    for field, value in (
        ("half_life", 0.0),
        ("prior_samples", 0.0),
        ("floor", 0.0),
        ("floor", 1.1),
        ("floor", float("nan")),
    ):
        with pytest.raises(UserError, match=rf"curriculum\.{field} = {value}"):
            CurriculumConfig(**{field: value})


def test_ten_thousand_questions_are_quick_to_draw_and_small_to_save():
    stream, rng = _variance(10_000, 64), np.random.default_rng(0)
    stream.observe([f"q{i}" for i in range(10_000)], rng.random(10_000), [16] * 10_000)
    best = min(_timed(lambda: next(stream)) for _ in range(20))
    assert best < 0.01
    assert len(json.dumps(stream.state())) < 170_000
    assert len(json.dumps(_variance(10_000, 64).state())) < 1_000


def _timed(call):
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


# ---------------------------------------------------------------- the preset


def test_the_preset_chooses_the_sampler():
    run = launch.load_config("tiny", ['include "samplers/variance.gin"']).value
    assert run.curriculum == CurriculumConfig(sampler="variance")
    assert launch.load_config("tiny").value.curriculum == CurriculumConfig(sampler="shuffled")
