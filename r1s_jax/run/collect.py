"""A step's episodes: played, scored and, where asked for, replaced until enough groups differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from r1s_jax.data.curriculum import Stream
from r1s_jax.engine.sampling import row_seed
from r1s_jax.rl.advantages import has_contrast
from r1s_jax.rl.answers import cover_exact_match
from r1s_jax.rl.rewards import Reward, RewardFunction, judge, pays_for_answer
from r1s_jax.rollout.loop import Call, Rollout, RolloutResult
from r1s_jax.run.config import RunConfig, StageConfig
from r1s_jax.types import Group, Trajectory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collected:
    """All episodes that were played, in order of attempt, question and sample."""

    results: tuple[RolloutResult, ...]  # of the attempts
    trajectories: list[Trajectory]
    rewards: list[Reward]
    totals_N: np.ndarray
    group_ids_N: np.ndarray
    chosen_N: np.ndarray  # bool: to be learned from
    contrast_rate: float  # share of groups whose rewards differ


def collect(
    rollout: Rollout,
    stream: Stream,
    reward: RewardFunction,
    config: RunConfig,
    stage: StageConfig,
    step: int,
) -> Collected:
    """Plays `questions_per_step` questions, and tells the stream how they did.

    With `max_refills` (dynamic sampling, 2503.14476) groups of equal rewards are not learned
    from, and new questions are played until as many groups differ or the refills are used up;
    groups beyond that number are left out, the last ones first.
    """
    results: list[RolloutResult] = []
    trajectories: list[Trajectory] = []
    rewards: list[Reward] = []
    totals: list[np.ndarray] = []
    group_ids: list[int] = []
    differing = 0
    for attempt in range(config.max_refills + 1):
        result = rollout.run(
            next(stream),
            samples=config.samples_per_question,
            sampling=config.sampling,
            call=Call(seed=config.seed, phase=f"train/{stage.name}", step=step, attempt=attempt),
            min_survivors=2,  # a group baseline compares
        )
        results.append(result)
        played = [t for group in result.groups for t in group.trajectories]
        first = group_ids[-1] + 1 if group_ids else 0
        ids = [first + i for i, g in enumerate(result.groups) for _ in g.trajectories]
        ids_M = np.array(ids, np.int64)
        found = [reward(t) for t in played]
        totals.append(_totals(found, config, stage, step, attempt))
        trajectories, rewards, group_ids = trajectories + played, rewards + found, group_ids + ids
        stream.observe(*_successes(result.groups, found, by_answer=pays_for_answer(stage.reward)))
        differing += len(np.unique(ids_M[has_contrast(totals[-1], ids_M)]))
        if differing >= config.questions_per_step:
            break
    totals_N, ids_N = np.concatenate(totals), np.array(group_ids, np.int64)
    chosen_N = np.ones(len(ids_N), bool)
    if config.max_refills:
        contrast_N = has_contrast(totals_N, ids_N)
        wanted = np.unique(ids_N[contrast_N])[: config.questions_per_step]
        chosen_N = np.isin(ids_N, wanted)
    return Collected(
        results=tuple(results),
        trajectories=trajectories,
        rewards=rewards,
        totals_N=totals_N,
        group_ids_N=ids_N,
        chosen_N=chosen_N,
        contrast_rate=differing / max(1, len(np.unique(ids_N))),
    )


def _totals(
    rewards: Sequence[Reward], config: RunConfig, stage: StageConfig, step: int, attempt: int
) -> np.ndarray:
    totals = np.array([r.total for r in rewards], np.float64)
    if stage.permute_rewards:
        key = row_seed(config.seed, f"permute/{stage.name}", step, "", attempt, 0)
        totals = np.random.default_rng(key).permutation(totals)
    return totals


def _successes(
    groups: Sequence[Group], rewards: Sequence[Reward], *, by_answer: bool
) -> tuple[list[str], list[float], list[int]]:
    """(question ids, mean success, samples), a group each.

    A success is a right answer by cover-EM; where the stage does not pay for answers, the reward
    itself, cut to [0, 1].
    """
    scored, rates = iter(rewards), []
    for group in groups:
        found = [(t, next(scored)) for t in group.trajectories]
        wins = [
            float(cover_exact_match(judge(t).answer, group.question.answers))
            if by_answer
            else min(max(reward.total, 0.0), 1.0)
            for t, reward in found
        ]
        rates.append(float(np.mean(wins)))
    return [g.question.id for g in groups], rates, [len(g.trajectories) for g in groups]
