import collections
import json

import pytest

from r1s_jax.data.curriculum import QuestionStream
from r1s_jax.types import Question, UserError


def _questions(count):
    return [Question(id=f"q{i}", text="?", answers=("a",)) for i in range(count)]


def _take(stream, batches):
    return [[q.id for q in next(stream)] for _ in range(batches)]


@pytest.mark.parametrize(("count", "size"), [(10, 4), (7, 7), (5, 4), (12, 4), (9, 1), (11, 6)])
def test_every_epoch_asks_everything_once_and_no_batch_twice(count, size):
    batches = _take(QuestionStream(_questions(count), batch_size=size, seed=3), 5 * count)
    assert all(len(b) == len(set(b)) == size for b in batches)
    flat = [i for b in batches for i in b]
    for epoch in range(len(flat) // count):
        assert len(set(flat[epoch * count : (epoch + 1) * count])) == count
    assert set(collections.Counter(flat).values()) == {5 * size}


def test_epochs_and_seeds_differ_and_runs_do_not():
    def ids(seed):
        return _take(QuestionStream(_questions(8), batch_size=4, seed=seed), 4)

    assert ids(0) == ids(0) != ids(1)
    assert ids(0)[:2] != ids(0)[2:]


@pytest.mark.parametrize("before", range(9))
def test_n_and_n_batches_are_two_n(before):
    """Also when the state is taken right after a batch that spans two epochs."""
    whole = _take(QuestionStream(_questions(10), batch_size=4, seed=5), before + 9)
    first = QuestionStream(_questions(10), batch_size=4, seed=5)
    _take(first, before)
    state = json.loads(json.dumps(first.state()))
    second = QuestionStream(_questions(10), batch_size=4, seed=5)
    _take(second, 2)
    second.restore(state)
    assert second.state() == state
    assert _take(second, 9) == whole[before:]


def test_the_state_of_another_stream_is_refused():
    state = QuestionStream(_questions(10), batch_size=4, seed=5).state()
    for count, size, seed, field in (
        (9, 4, 5, "questions"),
        (10, 5, 5, "batch_size"),
        (10, 4, 6, "seed"),
    ):
        with pytest.raises(UserError, match=f'"{field}"'):
            QuestionStream(_questions(count), batch_size=size, seed=seed).restore(state)


def test_too_few_or_repeated_questions_are_user_errors():
    with pytest.raises(UserError, match=r"3 questions.*batch_size of 4"):
        QuestionStream(_questions(3), batch_size=4, seed=0)
    with pytest.raises(UserError, match="'q0' occurs twice"):
        QuestionStream(_questions(3) + _questions(1), batch_size=2, seed=0)
    with pytest.raises(ValueError, match="batch_size is 0"):
        QuestionStream(_questions(3), batch_size=0, seed=0)
