"""What an algorithm adds to a stage's reward, and which episodes it leaves out.

Penalties are further parts of a reward, pure functions of the episode, each off by default:

    overlong    0 while |y| <= M - C, then (M - C - |y|) / C, and -1 where |y| > M
                (soft overlong punishment of DAPO, 2503.14476, eq. 13; |y| sampled tokens,
                M = `overlong_max`, C = `overlong_cache`)
    no_answer   -`no_answer` without an answer pair, else 0
    no_search   -`no_search` where no documents came back, else 0
                (2602.19526: F1 alone lets a policy avoid acting)

Departure from DAPO: its |y| is the whole response; here documents, which the policy did not
write, do not count.

The filter is SimpleTIR's (2509.02479): `has_void_turn`.
"""

from __future__ import annotations

import dataclasses
import math

from r1s_jax.protocol.parse import extract_answer, extract_query
from r1s_jax.protocol.tags import ANSWER_CLOSE
from r1s_jax.rl.rewards import Reward, RewardFunction, judge
from r1s_jax.types import TokenSource, Trajectory, UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapingConfig:
    """Penalties beside the reward; the two of actions are amounts, 0 or more.

    UserError for an amount that is negative or not finite, or a cache that is not within 1 and
    `overlong_max` where that is on.
    """

    overlong_max: int = 0  # sampled tokens from which on the whole penalty is due; 0: off
    overlong_cache: int = 0  # tokens before that over which it grows from 0 to 1
    no_answer: float = 0.0
    no_search: float = 0.0

    def __post_init__(self) -> None:
        if self.overlong_max < 0:
            raise UserError(f"shaping.overlong_max = {self.overlong_max}: expected 0 (off) or more")
        if self.overlong_max and not 1 <= self.overlong_cache <= self.overlong_max:
            raise UserError(
                f"shaping.overlong_cache = {self.overlong_cache}: expected 1 to overlong_max = "
                f"{self.overlong_max}"
            )
        for name in ("no_answer", "no_search"):
            amount = getattr(self, name)
            if not (math.isfinite(amount) and amount >= 0.0):
                raise UserError(
                    f"shaping.{name} = {amount}: a penalty is subtracted, give 0 (off) or more"
                )


def shaped(reward_function: RewardFunction, config: ShapingConfig) -> RewardFunction:
    """The reward with a part for every penalty that is on; the very same one if none is.

    Raises as the reward does: ValueError for a RETRIEVAL_FAILED episode.
    """
    if not (config.overlong_max or config.no_answer or config.no_search):
        return reward_function

    def reward(trajectory: Trajectory) -> Reward:
        parts = dict(reward_function(trajectory).parts)
        verdict = judge(trajectory)
        if config.overlong_max:
            parts["overlong"] = overlong(
                trajectory.sampled_count, config.overlong_max, config.overlong_cache
            )
        if config.no_answer:
            parts["no_answer"] = 0.0 if verdict.has_answer else -config.no_answer
        if config.no_search:
            parts["no_search"] = 0.0 if verdict.searched else -config.no_search
        return Reward(parts=parts)

    return reward


def overlong(length: int, longest: int, cache: int) -> float:
    """DAPO's soft punishment, 0 to -1, of `length` tokens: linear over the last `cache` ones."""
    return min(0.0, max(-1.0, (longest - cache - length) / cache))


def has_void_turn(trajectory: Trajectory) -> bool:
    """Whether the policy in some turn neither asked a query nor gave an answer.

    A turn is one SAMPLED segment. It asks where `protocol.parse` finds a query in it, and answers
    where it closes an answer that was opened there or before. All turns but the last asked, else
    they would have been the last; of that one the stop reason says

        answer            not void, unless `</answer>` closes what was never opened
        eos               void: it broke off by itself
        turn_length       void: it was cut off
        context_full      void if it was cut off; not if it asked and its documents had no room
        empty_query       void: it closed a query that it had not opened, or asked nothing
        max_searches      not void: it asked, and was refused
        retrieval_failed  not void: it asked (such episodes are left out anyway)
    """
    written = ""
    for segment in trajectory.segments:
        if segment.source != TokenSource.SAMPLED:
            continue
        turn = segment.text
        written += turn
        answered = ANSWER_CLOSE in turn and extract_answer(written) is not None
        if not answered and not extract_query(turn):
            return True
    return False
