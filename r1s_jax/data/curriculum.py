"""The order in which questions are asked: an endless iterator that can be saved and resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from r1s_jax.types import Question, UserError


class QuestionStream(Iterator[list[Question]]):
    """Batches of questions, reshuffled each epoch by a key of (seed, epoch).

    Every question is asked once per epoch, also where an epoch ends within a batch: the
    batch is filled from the next epoch, and a question of that next epoch which the batch
    already holds is put off to just behind it. The stream after `restore(state())` is the
    stream from there on, exactly.

    Raises:
        UserError: fewer questions than a batch holds, or an id twice.
    """

    def __init__(self, questions: Sequence[Question], *, batch_size: int, seed: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, must be at least 1")
        if len(questions) < batch_size:
            raise UserError(
                f"there are {len(questions)} questions, fewer than the batch_size of {batch_size}"
            )
        ids = [q.id for q in questions]
        if len(set(ids)) < len(ids):
            twice = next(i for n, i in enumerate(ids) if i in ids[:n])
            raise UserError(f"question id {twice!r} occurs twice among {len(ids)} questions")
        self._questions = tuple(questions)
        self._batch_size = batch_size
        self._seed = seed
        self._fingerprint = hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]
        self._start_epoch(0, [])

    def __next__(self) -> list[Question]:
        stop = self._position + self._batch_size
        chosen = self._order[self._position : stop]
        self._position = stop
        missing = self._batch_size - len(chosen)
        if missing:
            self._start_epoch(self._epoch + 1, chosen)
            chosen = chosen + self._order[:missing]
            self._position = missing
        return [self._questions[i] for i in chosen]

    @property
    def epoch(self) -> int:
        """The epoch, from 0, of the last question given."""
        return self._epoch

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as plain JSON values."""
        return {
            "seed": self._seed,
            "batch_size": self._batch_size,
            "questions": self._fingerprint,
            "epoch": self._epoch,
            "position": self._position,
            "carried": list(self._carried),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to where `state` was taken.

        Raises:
            UserError: the state belongs to other questions, another batch size or seed.
        """
        mine = self.state()
        for field in ("questions", "batch_size", "seed"):
            if state.get(field) != mine[field]:
                raise UserError(
                    f'the saved state of the question stream has "{field}" {state.get(field)!r}, '
                    f"this run has {mine[field]!r}"
                )
        self._start_epoch(int(state["epoch"]), [int(i) for i in state["carried"]])
        self._position = int(state["position"])

    def _start_epoch(self, epoch: int, carried: list[int]) -> None:
        """Sets the epoch's order; `carried` are the last epoch's questions in its first batch."""
        count = len(self._questions)
        order = np.random.default_rng((self._seed, epoch)).permutation(count).tolist()
        if carried:
            held = set(carried)
            missing = self._batch_size - len(carried)
            first = [i for i in order if i not in held][:missing]
            rest = set(first)
            order = first + [i for i in order if i not in rest]
        self._epoch, self._carried, self._order, self._position = epoch, carried, order, 0
