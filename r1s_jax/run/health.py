"""Alarms on the figures of a run: what collapses, why, and what to do, said when it begins.

    alarm              on while
    entropy_collapsed  entropy below a share of its level at the stage's start, and below a floor
    entropy_exploded   entropy above a multiple of that level, and above a ceiling
    logprob_gap        learner and sampler differ by more than the dtype explains
    searches_stopped   hardly a search per question
    searches_at_limit  searches near the most that are allowed
    grad_norm          a large multiple of its running median
    not_finite         updates were skipped, or a figure of the update is not finite
    format_alone       the format is right and the answer is not, where the answer is paid for
    rewarded_logprob   rewarded tokens become less likely: precedes collapse (LLDS, 2512.04220)
    truncated          many episodes run out of tokens
    retrieval_failed   the search engine loses episodes
    no_contrast        hardly a group whose rewards differ: nothing left to learn from

Alarms speak and count, they never stop a run. A figure that is unknown (missing, NaN where a step
learned nothing, or a mean over no episodes) leaves its alarm as it was.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any, Literal

from r1s_jax.types import UserError

_MEDIAN_OF = 20  # steps back that the usual gradient norm is taken from
_MEDIAN_NEEDS = 5  # steps of a stage before it has a usual norm: the first are often large
_FORMAT_RIGHT = 0.8  # a format_rate from which on the format is learned
# With `not_finite`; rewarded_logprob is left out, NaN where no episode was better than another.
_OF_UPDATE = ("policy_loss", "entropy", "grad_norm", "kl_ref", "logprob_gap")

ADVICE = {
    "entropy_collapsed": "it no longer explores: raise clip_high, add an entropy bonus",
    "entropy_exploded": "it writes at random: lower the learning rate, go back to a checkpoint",
    "logprob_gap": "sampler and learner are not one policy: check dtypes, weights, temperature",
    "searches_stopped": "penalise no_search, or train on the reward that pays for searching",
    "searches_at_limit": "look at the queries in trajectories/; raise max_searches if they are new",
    "grad_norm": "look at the step's trajectories; lower clip_norm or the learning rate",
    "not_finite": "lower the learning rate, or compute in float32",
    "format_alone": "questions too hard, or documents without answers: see gold_found",
    "rewarded_logprob": "add the LLDS term, lower the learning rate",
    "truncated": "raise max_new_tokens or the context, or penalise overlong responses",
    "retrieval_failed": "look after the search engine; these episodes are not learned from",
    "no_contrast": "take harder or easier questions, or more samples of each",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """When an alarm is on. UserError for a threshold that makes no sense.

    The defaults leave a healthy run of `tiny` silent. Those of the gap: in float32 a healthy run
    has 6e-7, a hundredfold is no rounding any more; in bfloat16 the field takes a mean of
    exp |difference| up to 1.05 for sound (0.03 is what SmolLM2-135M in bfloat16 is off float32
    over technical prose).
    """

    patience: int = 5  # steps in a row before a drifting figure counts, and before any is over
    entropy_share: float = 0.1  # of its level at the stage's start
    entropy_floor: float = 0.05  # nats per token
    entropy_rise: float = 3.0  # multiple of its level at the stage's start
    entropy_ceiling: float = 1.0  # nats per token
    logprob_gap_float32: float = 1e-4  # nats per token, both sides computing in float32
    logprob_gap_bfloat16: float = 0.05  # nats per token, a side computing in bfloat16
    fewest_searches: float = 0.05  # per question
    most_searches: float = 0.9  # share of max_searches
    grad_norm_multiple: float = 10.0  # of the median
    lowest_f1: float = 0.05
    rewarded_fall: float = 0.25  # nats per token below the stage's best, means of `patience` steps
    truncated_rate: float = 0.3
    failed_share: float = 0.05  # of all episodes
    lowest_contrast: float = 0.05  # share of groups whose rewards differ

    def __post_init__(self) -> None:
        if not isinstance(self.patience, int) or self.patience < 1:
            raise UserError(f"health.patience = {self.patience}: expected a whole number from 1 on")
        shares = {
            "entropy_share", "most_searches", "lowest_f1", "truncated_rate", "failed_share",
            "lowest_contrast",
        }  # fmt: skip
        for name, value in dataclasses.asdict(self).items():
            if name in shares and not 0.0 < value < 1.0:
                raise UserError(f"health.{name} = {value}: a share, expected between 0 and 1")
            if not (math.isfinite(value) and value > 0.0):
                raise UserError(f"health.{name} = {value}: expected a number above 0")
        for name in ("entropy_rise", "grad_norm_multiple"):
            if getattr(self, name) <= 1.0:
                raise UserError(f"health.{name} = {getattr(self, name)}: expected more than 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Reading:
    """Whether a figure is bad, and the two numbers that say so."""

    bad: bool
    says: str


class Health:
    """Watches the train rows of a run, step by step and stage by stage."""

    def __init__(
        self,
        config: HealthConfig,
        *,
        max_searches: int,
        dtype: Literal["float32", "bfloat16"],
    ):
        """`max_searches` of a training episode; `dtype`: the coarser of engine's and learner's."""
        self._config, self._max_searches = config, max_searches
        self._gap = (
            config.logprob_gap_float32 if dtype == "float32" else config.logprob_gap_bfloat16
        )
        self._pays_for_answer = False
        # Name -> reading of a row. Drift needs patience, the others are on at once.
        self._drifting: dict[str, Callable[[_Row], _Reading | None]] = {
            "entropy_collapsed": self._entropy_collapsed,
            "entropy_exploded": self._entropy_exploded,
            "searches_stopped": self._searches_stopped,
            "searches_at_limit": self._searches_at_limit,
            "format_alone": self._format_alone,
            "truncated": self._truncated,
            "no_contrast": self._no_contrast,
        }
        self._sudden: dict[str, Callable[[_Row], _Reading | None]] = {
            "logprob_gap": self._logprob_gap,
            "grad_norm": self._grad_norm,
            "not_finite": self._not_finite,
            "rewarded_logprob": self._rewarded_logprob,
            "retrieval_failed": self._retrieval_failed,
        }
        self._forget("")

    def begin_stage(self, stage: str, *, pays_for_answer: bool) -> None:
        """To be called whenever a stage's steps begin or go on.

        A new stage has levels of its own and starts without alarms; the stage that a restored
        state speaks of goes on. `pays_for_answer`: whether its reward does (`rl.rewards`).
        """
        self._pays_for_answer = pays_for_answer
        if stage != self._stage:
            self._forget(stage)

    @property
    def active(self) -> tuple[str, ...]:
        """The alarms that are on; their number is the metric `alarms`."""
        return tuple(self._on)

    def check(self, row: Mapping[str, Any]) -> list[str]:
        """Takes the metrics of a train step; one line for each alarm that this step turned on.

        An alarm is over, and can be raised anew, after `patience` good steps.
        """
        figures = _Row(row)
        raised = []
        for rules, steps in ((self._drifting, self._config.patience), (self._sudden, 1)):
            for name, rule in rules.items():
                reading = rule(figures)
                if reading is None:
                    continue
                on = name in self._on
                against = self._against.get(name, 0) + 1 if reading.bad != on else 0
                if against == (self._config.patience if on else steps):
                    against = 0
                    if on:
                        self._on.remove(name)
                    else:
                        self._on.append(name)
                        raised.append(f"{name}: {reading.says}; {ADVICE[name]}")
                self._against[name] = against
        return raised

    def state(self) -> dict[str, Any]:
        """Plain JSON: with it a resumed run raises the alarms of an uninterrupted one."""
        return {
            "stage": self._stage,
            "on": list(self._on),
            "against": dict(self._against),
            "entropy": self._entropy,
            "grad_norms": list(self._grad_norms),
            "rewarded": list(self._rewarded),
            "rewarded_best": self._rewarded_best,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes what `state()` gave."""
        self._stage = state["stage"]
        self._on = list(state["on"])
        self._against = dict(state["against"])
        self._entropy = state["entropy"]
        self._grad_norms = list(state["grad_norms"])
        self._rewarded = list(state["rewarded"])
        self._rewarded_best = state["rewarded_best"]

    def _forget(self, stage: str) -> None:
        self._stage = stage
        self._on: list[str] = []
        self._against: dict[str, int] = {}  # steps in a row that spoke against the present state
        self._entropy: float | None = None  # at the stage's start
        self._grad_norms: list[float] = []
        self._rewarded: list[float] = []
        self._rewarded_best: float | None = None

    # ---- the rules; None where a figure is unknown ----

    def _entropy_collapsed(self, row: _Row) -> _Reading | None:
        entropy = row.of_update("entropy")
        if entropy is None:
            return None
        if self._entropy is None:
            self._entropy = entropy
        limit = min(self._config.entropy_share * self._entropy, self._config.entropy_floor)
        return _below("entropy", entropy, limit, f"{self._entropy:.3g} at the stage's start")

    def _entropy_exploded(self, row: _Row) -> _Reading | None:
        entropy = row.of_update("entropy")
        if entropy is None or self._entropy is None:
            return None
        limit = max(self._config.entropy_rise * self._entropy, self._config.entropy_ceiling)
        return _above("entropy", entropy, limit, f"{self._entropy:.3g} at the stage's start")

    def _logprob_gap(self, row: _Row) -> _Reading | None:
        gap = row.of_update("logprob_gap")
        return None if gap is None else _above("logprob_gap", gap, self._gap)

    def _searches_stopped(self, row: _Row) -> _Reading | None:
        searches = row.of_episodes("searches_mean")
        if searches is None or self._max_searches == 0:
            return None
        return _below("searches_mean", searches, self._config.fewest_searches)

    def _searches_at_limit(self, row: _Row) -> _Reading | None:
        searches = row.of_episodes("searches_mean")
        # Where one search is all there is, every question should take it.
        if searches is None or self._max_searches < 2:
            return None
        limit = self._config.most_searches * self._max_searches
        return _above("searches_mean", searches, limit, f"max_searches {self._max_searches}")

    def _grad_norm(self, row: _Row) -> _Reading | None:
        norm = row.of_update("grad_norm")
        if norm is None:
            return None
        before = self._grad_norms
        self._grad_norms = [*before, norm][-_MEDIAN_OF:]
        if len(before) < _MEDIAN_NEEDS:
            return None
        usual = statistics.median(before)
        if usual == 0.0:  # where no group had contrast, the next that has is no excess
            return None
        limit = self._config.grad_norm_multiple * usual
        return _above("grad_norm", norm, limit, f"median {usual:.3g}")

    def _not_finite(self, row: _Row) -> _Reading | None:
        if not row.learned:
            return None
        skipped = row.known("skipped_updates") or 0.0
        broken = [name for name in _OF_UPDATE if row.broken(name)]
        says = f"skipped_updates {skipped:g} above 0"
        if broken:
            says += f", {', '.join(broken)} not finite"
        return _Reading(bad=skipped > 0.0 or bool(broken), says=says)

    def _format_alone(self, row: _Row) -> _Reading | None:
        form, f1 = row.of_episodes("format_rate"), row.of_episodes("f1")
        if not self._pays_for_answer or form is None or f1 is None:
            return None
        reading = _below("f1", f1, self._config.lowest_f1, f"format_rate {form:.3g}")
        return dataclasses.replace(reading, bad=reading.bad and form >= _FORMAT_RIGHT)

    def _rewarded_logprob(self, row: _Row) -> _Reading | None:
        logprob = row.of_update("rewarded_logprob")
        if logprob is None:
            return None
        self._rewarded = [*self._rewarded, logprob][-self._config.patience :]
        if len(self._rewarded) < self._config.patience:
            return None
        mean = statistics.fmean(self._rewarded)
        self._rewarded_best = max(mean, mean if (best := self._rewarded_best) is None else best)
        limit = self._rewarded_best - self._config.rewarded_fall
        beside = f"best {self._rewarded_best:.3g}, means of {self._config.patience} steps"
        return _below("rewarded_logprob", mean, limit, beside)

    def _truncated(self, row: _Row) -> _Reading | None:
        rate = row.of_episodes("truncated_rate")
        return None if rate is None else _above("truncated_rate", rate, self._config.truncated_rate)

    def _retrieval_failed(self, row: _Row) -> _Reading | None:
        failed, episodes = row.known("retrieval_failed"), row.known("episodes")
        if failed is None or episodes is None or failed + episodes == 0.0:
            return None
        share = failed / (failed + episodes)
        return _above("share of retrieval_failed", share, self._config.failed_share)

    def _no_contrast(self, row: _Row) -> _Reading | None:
        rate = row.of_episodes("contrast_rate")
        return None if rate is None else _below("contrast_rate", rate, self._config.lowest_contrast)


class _Row:
    """A row of metrics, and which of its figures are known."""

    def __init__(self, row: Mapping[str, Any]):
        self._row = row
        # Rows without these two names are taken to have played and learned.
        self.learned = self._row.get("learned_episodes", 1.0) > 0.0
        self._played = self._row.get("episodes", 1.0) > 0.0

    def known(self, name: str) -> float | None:
        value = self._row.get(name)
        return None if value is None or not math.isfinite(value) else float(value)

    def of_update(self, name: str) -> float | None:
        return self.known(name) if self.learned else None

    def of_episodes(self, name: str) -> float | None:
        return self.known(name) if self._played else None

    def broken(self, name: str) -> bool:
        """Whether the row has the figure, and it is no finite number."""
        return name in self._row and self.known(name) is None


def _above(name: str, value: float, limit: float, beside: str = "") -> _Reading:
    return _Reading(bad=value > limit, says=_says(name, value, "above", limit, beside))


def _below(name: str, value: float, limit: float, beside: str = "") -> _Reading:
    return _Reading(bad=value < limit, says=_says(name, value, "below", limit, beside))


def _says(name: str, value: float, side: str, limit: float, beside: str) -> str:
    return f"{name} {value:.3g} {side} {limit:.3g}" + (f" ({beside})" if beside else "")
