"""How hard a question is: how many rollouts a reference policy needs to get it right once.

The paper (arXiv 2503.05592) counts with Qwen2.5-7B-Instruct: fewer than 10 is easy, 10 to 20
medium, more than 20 hard.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from r1s_jax.types import Question, UserError

DIFFICULTIES: tuple[str, ...] = ("easy", "medium", "hard")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Where easy ends and hard begins, in rollouts needed; the paper's by default.

    Raises UserError where they do not leave each other room.
    """

    easy_below: int = 10
    hard_above: int = 20

    def __post_init__(self) -> None:
        if not 1 <= self.easy_below <= self.hard_above + 1:
            raise UserError(
                f"easy_below = {self.easy_below}, hard_above = {self.hard_above}: easy_below has "
                "to be at least 1 and at most hard_above + 1"
            )

    def difficulty(self, needed: int | None) -> str:
        """One of DIFFICULTIES; `needed` is None where `hard_above` rollouts or more all failed."""
        if needed is None or needed > self.hard_above:
            return "hard"
        return "easy" if needed < self.easy_below else "medium"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Graded:
    """A question and whether each of its rollouts, in their order, got it right."""

    question: Question
    right: tuple[bool, ...]

    @property
    def needed(self) -> int | None:
        """Rollouts up to and with the first right one; None if there was none."""
        return self.right.index(True) + 1 if any(self.right) else None


def graded_row(graded: Graded, thresholds: Thresholds) -> dict[str, Any]:
    """One line of a file of graded questions, which `data.questions.read_questions` reads too.

    `rollouts` is how many were needed (null: none was right), `passes` how many were right of
    the `played`; those after the first right one are what its wave had left.
    """
    q = graded.question
    row: dict[str, Any] = {"idx": q.id, "question": q.text, "answer": list(q.answers)}
    if q.kind:
        row["kind"] = q.kind
    if q.gold_documents:
        row["gold_documents"] = list(q.gold_documents)
    return {
        **row,
        "rollouts": graded.needed,
        "played": len(graded.right),
        "passes": sum(graded.right),
        "difficulty": thresholds.difficulty(graded.needed),
    }


def count_difficulties(graded: Sequence[Graded], thresholds: Thresholds) -> dict[str, int]:
    """How many questions there are of each of DIFFICULTIES."""
    counts = dict.fromkeys(DIFFICULTIES, 0)
    for each in graded:
        counts[thresholds.difficulty(each.needed)] += 1
    return counts
