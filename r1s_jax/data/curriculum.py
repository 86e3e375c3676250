"""Which questions are asked next: endless iterators that can be saved and resumed.

`shuffled` asks every question once per epoch. `variance` prefers questions that the policy gets
right now and then: a group whose rewards are all equal teaches nothing to an estimator with a
group baseline.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import math
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from r1s_jax.types import Question, UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """Which stream of questions; the numbers are those of `VarianceStream`.

    Raises UserError for an unknown sampler or a number out of range.
    """

    sampler: Literal["shuffled", "variance"] = "shuffled"
    half_life: float = 50.0  # draws (a step, or a refill of it) after which evidence counts half
    prior_samples: float = 1.0  # imagined samples of every question, half of them passed
    floor: float = 0.05  # least weight of a question; an unseen one has 1

    def __post_init__(self) -> None:
        for field, holds, wanted in (
            ("sampler", self.sampler in ("shuffled", "variance"), '"shuffled" or "variance"'),
            ("half_life", 0.0 < self.half_life < math.inf, "more than 0, and finite"),
            ("prior_samples", 0.0 < self.prior_samples < math.inf, "more than 0, and finite"),
            ("floor", 0.0 < self.floor <= 1.0, "more than 0, at most 1"),
        ):
            if not holds:
                raise UserError(
                    f"curriculum.{field} = {getattr(self, field)!r}: has to be {wanted}"
                )


@runtime_checkable
class Stream(Protocol):
    """Batches of distinct questions without end. After `restore(state())` it goes on exactly."""

    def __next__(self) -> list[Question]: ...

    def observe(
        self,
        question_ids: Sequence[str],
        pass_rates: Sequence[float] | np.ndarray,
        counts: Sequence[int] | np.ndarray,
    ) -> None:
        """Tells how groups did: the mean of a success in [0, 1], and the number of samples."""
        ...

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as plain JSON values."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to where `state` was taken; UserError if that was another stream."""
        ...


def question_stream(
    config: CurriculumConfig, questions: Sequence[Question], *, batch_size: int, seed: int
) -> Stream:
    """The stream that `config` asks for.

    Raises:
        UserError: fewer questions than a batch holds, or an id twice.
    """
    if config.sampler == "variance":
        return VarianceStream(questions, batch_size=batch_size, seed=seed, config=config)
    return QuestionStream(questions, batch_size=batch_size, seed=seed)


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
        self._fingerprint = _check(questions, batch_size)
        self._questions = tuple(questions)
        self._batch_size = batch_size
        self._seed = seed
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

    def observe(
        self,
        question_ids: Sequence[str],
        pass_rates: Sequence[float] | np.ndarray,
        counts: Sequence[int] | np.ndarray,
    ) -> None:
        """Nothing: the order does not depend on how the policy does."""

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as plain JSON values."""
        return {
            "sampler": "shuffled",
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
            UserError: the state belongs to another sampler, other questions, another batch size
                or seed.
        """
        # States from before there were two samplers do not name theirs.
        _same_stream({"sampler": "shuffled", **state}, self.state())
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


class VarianceStream(Iterator[list[Question]]):
    """Draws questions by the variance p (1 - p) of a success that the policy has at rate p.

    A batch is drawn without replacement, one question after the other, each with a chance in
    proportion to its weight among those not yet drawn:

        weight = floor + (1 - floor) * 4 p (1 - p)             in [floor, 1]
        p      = (passes + prior / 2) / (samples + prior)      prior = prior_samples

    `passes` and `samples` are sums over all that was observed, each halved for every `half_life`
    draws that have gone by since: the policy changes, so old evidence fades and p goes back to
    1/2. A question never seen has p = 1/2 too, hence the greatest weight. For a success between 0
    and 1 p (1 - p) is the greatest variance it can have. With prior_samples = 1 p is the mean
    under Jeffreys' prior, Beta(1/2, 1/2).

    A draw's random numbers are keyed by (seed, number of the draw). They are exponential clocks
    of which the first to ring are taken: the smallest E / weight with E ~ Exp(1), which is the
    same as drawing one after the other (Efraimidis and Spirakis 2006, algorithm A-ES).

    Raises:
        UserError: fewer questions than a batch holds, or an id twice.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        *,
        batch_size: int,
        seed: int,
        config: CurriculumConfig,
    ) -> None:
        self._fingerprint = _check(questions, batch_size)
        self._questions = tuple(questions)
        self._batch_size = batch_size
        self._seed = seed
        self._config = config
        self._index = {q.id: i for i, q in enumerate(questions)}
        self._draws = 0
        # f32 is what a state holds, so that nothing is rounded by saving.
        self._passes = np.zeros(len(questions), np.float32)
        self._samples = np.zeros(len(questions), np.float32)
        self._since = np.zeros(len(questions), np.int32)  # draw of the last observation

    def __next__(self) -> list[Question]:
        rng = np.random.default_rng((self._seed, self._draws))
        rings = rng.standard_exponential(len(self._questions)) / self.weights()
        self._draws += 1
        return [self._questions[i] for i in np.argsort(rings)[: self._batch_size]]

    def observe(
        self,
        question_ids: Sequence[str],
        pass_rates: Sequence[float] | np.ndarray,
        counts: Sequence[int] | np.ndarray,
    ) -> None:
        """Adds what groups did: the mean of a success in [0, 1], and the number of samples.

        Raises:
            ValueError: an id is unknown, a rate is outside [0, 1] or a count below 1.
        """
        for id, rate, count in zip(question_ids, pass_rates, counts, strict=True):
            if id not in self._index:
                raise ValueError(f"question {id!r} is not of this stream")
            if not (0.0 <= rate <= 1.0 and count >= 1):
                raise ValueError(f"question {id!r}: pass rate {rate} of {count} samples")
            i = self._index[id]
            kept = 0.5 ** ((self._draws - int(self._since[i])) / self._config.half_life)
            self._passes[i] = float(self._passes[i]) * kept + float(rate) * float(count)
            self._samples[i] = float(self._samples[i]) * kept + float(count)
            self._since[i] = self._draws

    def weights(self) -> np.ndarray:
        """The weights of the next draw, [questions], in the order of the questions."""
        kept = np.exp2(-(self._draws - self._since) / self._config.half_life)
        prior, floor = self._config.prior_samples, self._config.floor
        rate = (kept * self._passes + prior / 2) / (kept * self._samples + prior)
        return floor + (1.0 - floor) * 4.0 * rate * (1.0 - rate)

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as plain JSON values; some 12 bytes for a question seen."""
        arrays = (self._passes.astype("<f4"), self._samples.astype("<f4"))
        evidence = b"".join(a.tobytes() for a in (*arrays, self._since.astype("<i4")))
        return {
            "sampler": "variance",
            "seed": self._seed,
            "batch_size": self._batch_size,
            "questions": self._fingerprint,
            "draws": self._draws,
            "evidence": base64.b64encode(zlib.compress(evidence)).decode(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to where `state` was taken.

        Raises:
            UserError: the state belongs to another sampler, other questions, another batch size
                or seed.
        """
        _same_stream({"sampler": "shuffled", **state}, self.state())
        evidence = zlib.decompress(base64.b64decode(state["evidence"]))
        size = 4 * len(self._questions)
        self._passes = np.frombuffer(evidence[:size], "<f4").astype(np.float32)
        self._samples = np.frombuffer(evidence[size : 2 * size], "<f4").astype(np.float32)
        self._since = np.frombuffer(evidence[2 * size :], "<i4").astype(np.int32)
        self._draws = int(state["draws"])


def _check(questions: Sequence[Question], batch_size: int) -> str:
    """A fingerprint of the ids in their order; what cannot be a stream is refused."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, must be at least 1")
    if len(questions) < batch_size:
        raise UserError(f"there are {len(questions)} questions, questions_per_step = {batch_size}")
    ids = [q.id for q in questions]
    if len(set(ids)) < len(ids):
        twice = next(i for n, i in enumerate(ids) if i in ids[:n])
        raise UserError(f"question id {twice!r} occurs twice among {len(ids)} questions")
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]


def _same_stream(state: dict[str, Any], mine: dict[str, Any]) -> None:
    for field in ("sampler", "questions", "batch_size", "seed"):
        if state.get(field) != mine[field]:
            raise UserError(
                f'the saved state of the question stream has "{field}" {state.get(field)!r}, '
                f"this run has {mine[field]!r}"
            )
