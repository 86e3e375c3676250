"""Refills until enough groups differ, in the order and with the keys that a resumed run repeats."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from r1s_jax.data.curriculum import QuestionStream
from r1s_jax.engine.state import EngineConfig
from r1s_jax.rl.config import LearnerConfig
from r1s_jax.rl.rewards import Reward
from r1s_jax.rollout.loop import Call, Rollout, RolloutConfig, RolloutResult
from r1s_jax.run.collect import collect
from r1s_jax.run.config import PolicyConfig, RunConfig, StageConfig, WorldConfig
from r1s_jax.types import Group, Question, Segment, StopReason, TokenSource, Trajectory, UserError

STAGE = StageConfig(name="s", reward="paper_stage2", steps=1)
CONFIG = RunConfig(
    policy=PolicyConfig(checkpoint="x"),
    world=WorldConfig(train_questions="x", eval_questions="x"),
    stages=(STAGE,),
    engine=EngineConfig(),
    rollout=RolloutConfig(),
    learner=LearnerConfig(),
    questions_per_step=2,
    samples_per_question=2,
    seed=5,
)
QUESTIONS = [Question(id=str(i), text="?", answers=("yes it is",)) for i in range(12)]


class Stream(QuestionStream):
    """Questions in their own order; what it is told is kept."""

    def __init__(self):
        super().__init__(QUESTIONS, batch_size=2, seed=0)
        self._order = list(range(12))
        self.told = []

    def observe(self, question_ids, pass_rates, counts):
        self.told.append((list(question_ids), list(pass_rates), list(counts)))


class Script(Rollout):
    """Plays a question as the list of its samples' rewards says; None loses the sample."""

    def __init__(self, rewards):
        self.rewards, self.calls = rewards, []

    def run(self, questions, *, samples, sampling, call, min_survivors=1, watch=None):
        assert samples == 2 and min_survivors == 2
        self.calls.append(call)
        groups = []
        for question in questions:
            played = [
                _trajectory(question, call.attempt, sample, reward)
                for sample, reward in enumerate(self.rewards[question.id])
                if reward is not None
            ]
            if len(played) >= min_survivors:
                groups.append(Group(question=question, trajectories=tuple(played)))
        return RolloutResult(
            groups=tuple(groups),
            failed=0,
            failure="",
            dropped_groups=len(questions) - len(groups),
            sampled_tokens=1,
            prefilled_tokens=1,
            seconds=1.0,
            retrieval_seconds=0.0,
            retrieval_wait_seconds=0.0,
            row_steps=1,
        )


def _trajectory(question, attempt, sample, reward):
    right = "<answer>It is, yes</answer>" if reward > 0.5 else "<answer>no idea</answer>"
    return Trajectory(
        question=question,
        attempt=attempt,
        sample=sample,
        weights_version=0,
        token_ids_T=np.array([sample]),
        sources_T=np.array([TokenSource.PROMPT]),
        logprobs_T=np.array([reward]),  # carries the reward to `reward_of`
        drawn_logprobs_T=np.zeros(1),
        segments=(Segment(source=TokenSource.SAMPLED, text=right),),
        searches=(),
        stop_reason=StopReason.ANSWER,
    )


def reward_of(trajectory):
    return Reward(parts={"r": float(trajectory.logprobs_T[0])})


def play(rewards, **changes):
    script, stream = Script(rewards), Stream()
    config = dataclasses.replace(CONFIG, **changes)
    return collect(script, stream, reward_of, config, STAGE, 7), script, stream


EQUAL, DIFFER = (1.0, 1.0), (0.0, 1.0)


def test_without_refills_everything_is_learned_from():
    played, script, stream = play({"0": EQUAL, "1": DIFFER})
    assert script.calls == [Call(seed=5, phase="train/s", step=7, attempt=0)]
    assert played.chosen_N.all() and played.totals_N.tolist() == [1, 1, 0, 1]
    assert played.group_ids_N.tolist() == [0, 0, 1, 1] and played.contrast_rate == 0.5
    # The share of right answers by cover-EM, and how many samples say so.
    assert stream.told == [(["0", "1"], [1.0, 0.5], [2, 2])]


def test_where_answers_do_not_count_the_reward_says_what_succeeded():
    stage = dataclasses.replace(STAGE, reward="paper_stage1")
    stream = Stream()
    collect(Script({"0": (1.0, 0.5), "1": (-2.0, 3.0)}), stream, reward_of, CONFIG, stage, 7)
    assert stream.told == [(["0", "1"], [0.75, 0.5], [2, 2])]


def test_refills_go_on_until_enough_groups_differ():
    """New questions each time, a new attempt in the key; a surplus group is left out."""
    rewards = {"0": EQUAL, "1": DIFFER, "2": EQUAL, "3": EQUAL, "4": DIFFER, "5": DIFFER}
    played, script, stream = play(rewards, max_refills=5)
    assert [c.attempt for c in script.calls] == [0, 1, 2]
    assert [t.attempt for t in played.trajectories] == [0] * 4 + [1] * 4 + [2] * 4
    assert played.group_ids_N.tolist() == np.repeat(np.arange(6), 2).tolist()
    kept = [t.question.id for t, c in zip(played.trajectories, played.chosen_N, strict=True) if c]
    assert kept == ["1", "1", "4", "4"] and played.contrast_rate == 0.5
    assert len(stream.told) == 3 and len(played.results) == 3


def test_a_batch_that_stays_short_is_learned_from_as_it_is():
    rewards = {"0": DIFFER, **{str(i): EQUAL for i in range(1, 4)}}
    played, script, _ = play(rewards, max_refills=1)
    assert len(script.calls) == 2
    assert played.chosen_N.tolist() == [True, True] + [False] * 6


def test_lost_groups_and_empty_rollouts():
    """A group that lost a member is not there; nothing at all is an empty batch, not an error."""
    played, _, _ = play({"0": (1.0, None), "1": DIFFER})
    assert [t.question.id for t in played.trajectories] == ["1", "1"]
    played, _, stream = play({"0": (1.0, None), "1": (None, None)})
    assert len(played.trajectories) == len(played.totals_N) == 0 and played.contrast_rate == 0.0
    assert stream.told == [([], [], [])]


def test_permuted_rewards_are_the_same_numbers_and_come_back_the_same():
    rewards = {"0": (0.1, 0.2), "1": (0.3, 0.4)}
    stage = dataclasses.replace(STAGE, permute_rewards=True)
    config = dataclasses.replace(CONFIG, stages=(stage,))
    runs = [
        collect(Script(rewards), Stream(), reward_of, config, stage, step) for step in (0, 0, 1, 2)
    ]
    assert all(sorted(r.totals_N.tolist()) == [0.1, 0.2, 0.3, 0.4] for r in runs)
    assert runs[0].totals_N.tolist() == runs[1].totals_N.tolist()
    assert len({tuple(r.totals_N.tolist()) for r in runs}) > 1


def test_refills_are_not_negative():
    with pytest.raises(UserError, match=r"max_refills = -1"):
        dataclasses.replace(CONFIG, max_refills=-1)
