"""The end of a run whose gradients stay broken, without a run; with one: see test_train.py."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from r1s_jax.run.collect import Collected
from r1s_jax.run.rundir import open_run_dir
from r1s_jax.run.train import Position, _Run
from r1s_jax.types import Question, StopReason, TokenSource, Trajectory, UserError

FIELDS = {
    "token_ids_T": np.int32,
    "sources_T": np.int8,
    "logprobs_T": np.float32,
    "drawn_logprobs_T": np.float32,
}


def trajectory(sample, length):
    rng = np.random.default_rng(sample)
    sources_T = np.full(length, TokenSource.SAMPLED, np.int8)
    sources_T[0] = TokenSource.PROMPT
    drawn_T = rng.normal(size=length).astype(np.float32)
    drawn_T[-1] = (np.nan, np.inf, -np.inf)[sample % 3]
    return Trajectory(
        question=Question(id="q", text="?", answers=("a",)),
        attempt=0,
        sample=sample,
        weights_version=0,
        token_ids_T=rng.integers(0, 99, length).astype(np.int32),
        sources_T=sources_T,
        logprobs_T=rng.normal(size=length).astype(np.float32),
        drawn_logprobs_T=drawn_T,
        segments=(),
        searches=(),
        stop_reason=StopReason.EOS,
    )


PLAYED = Collected(
    results=(),
    trajectories=[trajectory(sample, length) for sample, length in enumerate((3, 5, 2, 7))],
    rewards=[],
    totals_N=np.array([0.5, -2.0, 1.0, 0.25]),
    group_ids_N=np.array([0, 0, 3, 3]),
    chosen_N=np.array([True, False, True, True]),
    contrast_rate=1.0,
)


def run_with(tmp_path, most, step=0):
    """A run's books, without its parts."""
    run: Any = object.__new__(_Run)
    run.config = SimpleNamespace(max_skipped_updates=most)
    run.run_dir = open_run_dir(tmp_path / "run", "x")
    run.at = Position(rows=0, step=step)
    return run


def update(run, updates, skipped_at_end):
    def given(trajectories, rewards_N, group_ids_N):
        assert [t.sample for t in trajectories] == [0, 2, 3]
        assert (rewards_N.tolist(), group_ids_N.tolist()) == ([0.5, 1.0, 0.25], [0, 3, 3])
        return {"updates": float(updates), "skipped_at_end": float(skipped_at_end)}

    run.learner = SimpleNamespace(update=given)
    run._update(PLAYED)
    return run.at.skipped_in_a_row


def test_skipped_updates_are_counted_over_steps(tmp_path):
    """Those in a row: a good update ends the row, a step without updates does not."""
    run, steps = (
        run_with(tmp_path, 3),
        ((4, 0), (4, 2), (4, 4), (0, np.nan), (2, 2), (4, 3), (1, 0)),
    )
    assert [update(run, *step) for step in steps] == [0, 2, 6, 6, 8, 3, 0]


def test_the_count_is_part_of_a_checkpoint(tmp_path):
    run = run_with(tmp_path, 5)
    update(run, 2, 2)
    run.at = Position(**dataclasses.asdict(run.at))
    assert update(run, 2, 2) == 4


def test_too_many_stop_the_run_and_leave_the_batch(tmp_path):
    run = run_with(tmp_path, 3, step=7)
    file = tmp_path / "run" / "offending_batch.npz"
    update(run, 2, 2)
    run._require_finite(PLAYED)
    assert not file.exists()
    update(run, 1, 1)
    with pytest.raises(UserError) as caught:
        run._require_finite(PLAYED)
    assert str(caught.value) == (
        "step 7: 3 updates in a row had a gradient that is not finite (max_skipped_updates = 3); "
        f"the batch is in {file}"
    )
    chosen = [PLAYED.trajectories[i] for i in (0, 2, 3)]
    with np.load(file) as batch:  # refuses pickles
        assert set(batch) == {*FIELDS, "step", "rewards_N", "group_ids_N", "lengths_N"}
        assert batch["step"] == 7
        np.testing.assert_array_equal(batch["lengths_N"], [3, 2, 7])
        np.testing.assert_array_equal(batch["rewards_N"], [0.5, 1.0, 0.25])
        np.testing.assert_array_equal(batch["group_ids_N"], [0, 3, 3])
        for field, dtype in FIELDS.items():
            assert batch[field].dtype == dtype
            for piece, t in zip(np.split(batch[field], [3, 5]), chosen, strict=True):
                np.testing.assert_array_equal(piece, getattr(t, field))  # NaN is NaN here
        assert np.isnan(batch["drawn_logprobs_T"]).any()
    assert not list((tmp_path / "run").glob(".*draft"))
