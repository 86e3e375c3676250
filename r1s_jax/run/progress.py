"""What a person sees while a run goes on: a live line, messages, and tables at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

# Name in metrics.jsonl -> (label, format).
_SHOWN = {
    "reward_mean": ("reward", "{:.3f}"),
    "retrieval_rate": ("search", "{:.0%}"),
    "em": ("EM", "{:.3f}"),
    "tokens_per_second": ("tok/s", "{:,.0f}"),
}
_HALF_LIFE = 10  # steps after which a step's time counts half in the ETA


class Progress:
    """A progress bar on a terminal; elsewhere at most one plain line in `every` seconds.

    Use as a context manager: `update` after each step, `note` for messages. The last value seen
    of each figure stays, so that EM, known only after an evaluation, does not flicker. With
    `shown` false it says nothing: of several hosts, one speaks.
    """

    def __init__(
        self,
        *,
        every: float = 30.0,
        shown: bool = True,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._console = console or Console(stderr=True, highlight=False)
        self._shown, self._live = shown, shown and self._console.is_terminal
        self._every, self._clock = every, clock
        self._figures: dict[str, str] = {}
        self._stage = ""
        self._last: tuple[int, float] | None = None  # step and time of the last update
        self._seconds_per_step: float | None = None
        self._printed: float | None = None
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[eta]}  {task.fields[figures]}"),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None, eta="", figures="", visible=False)

    def __enter__(self) -> Progress:
        self._last = None
        if self._live:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._bar.stop()

    def update(self, stage: str, step: int, total: int, metrics: Mapping[str, object]) -> None:
        """Shows that `step` of `total` steps of the stage are done, with the latest metrics."""
        now = self._clock()
        if stage != self._stage:
            self._stage, self._last, self._seconds_per_step = stage, None, None
        if self._last is not None and step > self._last[0]:
            took = (now - self._last[1]) / (step - self._last[0])
            weight = 1.0 if self._seconds_per_step is None else 1 - 0.5 ** (1 / _HALF_LIFE)
            before = self._seconds_per_step or 0.0
            self._seconds_per_step = before + weight * (took - before)
        self._last = (step, now)
        for name, (label, form) in _SHOWN.items():
            value = metrics.get(name)
            if isinstance(value, int | float) and math.isfinite(value):
                self._figures[label] = form.format(value)
        figures = "  ".join(f"{label} {text}" for label, text in self._figures.items())
        eta = self._eta(total - step)
        if self._live:
            self._bar.update(
                self._task,
                description=stage,
                completed=step,
                total=total,
                eta=eta,
                figures=figures,
                visible=True,
            )
        elif self._printed is None or now - self._printed >= self._every or step == total:
            self._printed = now
            self._plain("  ".join(filter(None, (f"{stage} {step}/{total}", eta, figures))))

    def note(self, text: str) -> None:
        """Prints a message above the bar."""
        self._plain(text)

    def _plain(self, text: str) -> None:
        # Never as markup: brackets in questions and paths are not colours.
        if self._shown:
            self._console.print(Text(text), soft_wrap=True)

    def _eta(self, steps: int) -> str:
        if self._seconds_per_step is None:
            return ""
        seconds = round(max(steps, 0) * self._seconds_per_step)
        hours, minutes = divmod(seconds // 60, 60)
        if hours:
            return f"{hours} h {minutes:02d} min left"
        return f"{minutes}:{seconds % 60:02d} min left"


def final_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    console: Console | None = None,
) -> str:
    """Prints a table and returns it as markdown. Floats are shown with three digits.

    Raises:
        ValueError: a row has not as many cells as there are columns.
    """
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0)
    for i, column in enumerate(columns):
        table.add_column(
            column, justify="left" if i == 0 else "right", min_width=8 if i == 0 else None
        )
    lines = [f"| {' | '.join(columns)} |"]
    lines.append(f"| {' | '.join('---' if i == 0 else '---:' for i in range(len(columns)))} |")
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"{len(row)} cells for {len(columns)} columns: {row!r}")
        cells = [_cell(value) for value in row]
        table.add_row(*(Text(cell) for cell in cells))
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    if console is None:
        console = Console(highlight=False)
        if not console.is_terminal:  # rich takes a file or a pipe to be 80 columns wide
            console.width = 140
    console.print(table)
    return f"**{title}**\n\n" + "\n".join(lines) + "\n"


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
