"""Results as Markdown, beside the published ones, with what they depend on below."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from r1s_jax.evaluation.published import published_conditions, published_results
from r1s_jax.evaluation.records import read_records
from r1s_jax.evaluation.scores import (
    RESAMPLES,
    Figure,
    Report,
    compare_records,
    score_records,
)

_HEADS = {
    "em": "EM",
    "acc_r": "ACC_R",
    "f1": "F1",
    "acc_l": "ACC_L",
    "searches": "searches",
    "answer_shown": "answer shown",
    "gold_shown": "gold shown",
    "answered": "answered",
}
_NOTHING = "–"


def score_file(
    path: str | os.PathLike[str],
    *,
    dataset: str = "",
    against: str | os.PathLike[str] | None = None,
    facts: Mapping[str, Any] | None = None,
    skipped: list[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[Report, str]:
    """Scores a file of results without any model.

    Args:
        path: our output, or a released file (`records.read_records`).
        dataset: whose published rows stand beside it ("hotpotqa", ...), "" for none.
        against: another one, whose scores and differences are shown too.
        facts: what else is known of the results.
        skipped: as `read_records`.
        resamples, seed: of the intervals.

    Returns:
        (report, Markdown).

    Raises:
        UserError: as `read_records` and, with another file, `compare_records`.
    """
    before = len(skipped or ())
    records = read_records(path, skipped=skipped)
    report = score_records(records, resamples=resamples, seed=seed)
    known: dict[str, Any] = {"file": os.fspath(path), **(facts or {})}
    name = os.path.basename(path)
    reports, differences = {name: report}, {}
    if against is not None:
        others = read_records(against, skipped=skipped)
        other = os.path.basename(against)
        other = other if other != name else os.fspath(against)
        reports[other] = score_records(others, resamples=resamples, seed=seed)
        differences = compare_records(records, others, resamples=resamples, seed=seed)
    if skipped is not None and len(skipped) > before:
        known["bad lines left out"] = len(skipped) - before
    text = results_markdown(reports, dataset=dataset, differences=differences, facts=known)
    return report, text


def results_markdown(
    reports: Mapping[str, Report],
    *,
    dataset: str = "",
    differences: Mapping[str, Figure] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> str:
    """Reports by name (of the policy or mode) as tables, and the facts below them.

    Shares are in percent with their 95 % interval; published ones have no interval. `differences`
    are those of the first two reports (`scores.compare_records`).
    """
    heads = ["", "questions", *_HEADS.values()]
    rows = [
        [name, str(report.count), *(_cell(s, report.figures) for s in _HEADS)]
        for name, report in reports.items()
    ]
    published = published_results(dataset)
    for row in published:
        known = {"acc_r": f"{row.acc_r:.1%}"[:-1], "acc_l": f"{row.acc_l:.1%}"[:-1]}
        cells = [known.get(score, _NOTHING) for score in _HEADS]
        rows.append([f"published: {row.method}", _NOTHING, *cells])
    if differences:
        first, second = list(reports)[:2]
        both = max(figure.count for figure in differences.values())
        cells = [_cell(score, differences) for score in _HEADS]
        rows.insert(2, [f"{first} less {second}", str(both), *cells])
    parts = [f"### {dataset or 'Results'}", _markdown_table(heads, rows)]
    for name, report in reports.items():
        if report.kinds:
            parts += [f"#### {name}, by kind of question", _kinds_table(report)]
    notes = [note for name, report in reports.items() for note in _notes(name, report)]
    notes += [f"{name}: {_value(value)}" for name, value in (facts or {}).items()]
    if published:
        notes.append(f"published rows: {published_conditions(dataset)}; arXiv 2503.05592")
    notes.append(
        "shares in percent (95 % percentile bootstrap over questions); ACC_R: cover exact match; "
        "ACC_L: a judge's verdict; answer shown: a gold answer stands in a shown document "
        "(yes/no questions left out); gold shown: all gold passages were shown"
    )
    parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(parts) + "\n"


def _kinds_table(report: Report) -> str:
    rows = [
        [
            kind or _NOTHING,
            str(max(figure.count for figure in figures.values())),
            *(_cell(score, figures) for score in _HEADS),
        ]
        for kind, figures in report.kinds.items()
    ]
    return _markdown_table(["kind", "questions", *_HEADS.values()], rows)


def _notes(name: str, report: Report) -> list[str]:
    stops = ", ".join(f"{reason} {count}" for reason, count in report.stop_reasons.items())
    notes = [f"{name}: episodes ended: {stops}"]
    partly = [
        f"{_HEADS[score]} of {figure.count}"
        for score, figure in report.figures.items()
        if figure.count < report.count
    ]
    if partly:
        notes.append(f"{name}: known of some of {report.count} questions: {', '.join(partly)}")
    if report.judge:
        notes.append(f"{name}: verdicts of ACC_L by {report.judge}")
    if report.punished_for_documents:
        share = report.punished_for_documents / report.count
        notes.append(
            f'{name}: {report.punished_for_documents} transcripts ({share:.1%}) say "assistant" '
            "in retrieved documents and nowhere else; R1-Searcher's reward for Qwen would take 2 "
            "points from each, ours does not"
        )
    return notes


def _cell(score: str, figures: Mapping[str, Figure]) -> str:
    if score not in figures:
        return _NOTHING
    figure = figures[score]
    scale, digits = (1, 2) if score == "searches" else (100, 1)
    mean, low, high = (f"{scale * x:.{digits}f}" for x in (figure.mean, figure.low, figure.high))
    return f"{mean} ({low} to {high})"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in line) + " |"
        for line in lines
    )
