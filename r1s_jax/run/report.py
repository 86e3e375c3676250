"""The tables at the end of a run and of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from r1s_jax.run.evaluate import CONTROLS
from r1s_jax.run.progress import final_table

_COLUMNS = {
    "em": "EM",
    "f1": "F1",
    "retrieval_rate": "search rate",
    "searches_mean": "queries",
    "format_rate": "format",
    "em_given_search": "EM given search",
    "gold_found": "gold found",
    "em_one_hop": "EM 1 hop",
    "em_two_hop": "EM 2 hops",
    "answered_rate": "answer rate",
}


def final_report(
    results: Mapping[str, Mapping[str, float]],
    floors: Mapping[str, float],
    stages: Sequence[str],
) -> str:
    """Prints base, stages, controls and floors as one table; returns it as markdown."""
    order = [
        "base",
        "base/forced",
        *stages,
        *(f"final/{mode}" for mode in CONTROLS),
    ]
    known = {_label(name): results[name] for name in order if name in results}
    return _table("policy", known, floors)


def evaluation_report(
    results: Mapping[str, Mapping[str, float]], floors: Mapping[str, float]
) -> str:
    """Prints one policy's figures, a row per mode of evaluation; returns them as markdown."""
    return _table("mode", {mode.replace("_", " "): r for mode, r in results.items()}, floors)


def _table(
    first: str, results: Mapping[str, Mapping[str, float]], floors: Mapping[str, float]
) -> str:
    rows: list[list[object]] = [
        [name, *(figures.get(column) for column in _COLUMNS)] for name, figures in results.items()
    ]
    blank = [None] * (len(_COLUMNS) - 1)
    rows += [[f"floor: {name}", value, *blank] for name, value in floors.items()]
    return final_table("held-out questions, greedy", [first, *_COLUMNS.values()], rows)


def _label(name: str) -> str:
    policy, _, mode = name.partition("/")
    policy = {"base": "base", "final": "final"}.get(policy, f"after {policy}")
    return f"{policy}, {mode.replace('_', ' ')}" if mode else policy
