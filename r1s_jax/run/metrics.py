"""What a run writes step by step: metrics.jsonl, TensorBoard, sampled trajectories.

A checkpoint holds how many rows of metrics.jsonl there were when it was saved; a run that resumes
from it cuts the file back to these.
"""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from r1s_jax.types import Trajectory, UserError

METRICS = "metrics.jsonl"


class MetricsWriter:
    """Appends rows to RUN_DIR/metrics.jsonl and mirrors them to RUN_DIR/tensorboard/STAGE.

    A row is `step`, `stage`, `phase` and then numbers, in the order given. Floats are written
    with repr, so equal numbers give equal text; NaN and infinities become null. Opening the
    writer cuts off a last line that a killed run left unfinished. Object stores cannot append:
    there the file is written anew for each row, and TensorBoard files are left out. With `writes`
    false no file is touched: of several hosts, one writes.
    """

    def __init__(self, run_dir: epath.PathLike, *, tensorboard: bool = True, writes: bool = True):
        self._run_dir = epath.Path(run_dir)
        self._path = self._run_dir / METRICS
        self._remote = "://" in str(self._path)
        self._writes, self._tensorboard = writes, tensorboard and not self._remote
        self._lines: list[str] = []
        self._boards: dict[str, Any] = {}
        self._file: Any = None
        if writes:
            self._rewrite(_read(self._path))

    def write(self, step: int, stage: str, phase: str, metrics: Mapping[str, Any]) -> None:
        """Writes and flushes one row; `phase` is "train" or "eval".

        Raises:
            ValueError: a value is neither a number nor None, or a name is taken.
        """
        if not self._writes:
            return
        row: dict[str, Any] = {"step": int(step), "stage": stage, "phase": phase}
        if taken := sorted(row.keys() & metrics.keys()):
            raise ValueError(f"a metric may not be called {taken[0]}")
        row |= {name: _number(name, value) for name, value in metrics.items()}
        line = json.dumps(row, allow_nan=False)
        self._lines.append(line)
        if self._remote:
            self._path.write_text("".join(f"{line}\n" for line in self._lines))
        else:
            self._file.write(f"{line}\n")
            self._file.flush()
        self._mirror([row])

    @property
    def rows(self) -> int:
        """How many rows the file holds; 0 without `writes`."""
        return len(self._lines)

    def cut_back(self, rows: int) -> None:
        """Keeps the first `rows` rows, in the file and in TensorBoard.

        TensorBoard's files are written anew from the rows that stay: those of several killed
        runs overlap, and which of two values is shown would be up to the reader.
        """
        if not self._writes:
            return
        kept = _read(self._path)[:rows]
        self._rewrite(kept)
        board = self._run_dir / "tensorboard"
        if self._tensorboard and board.exists():
            board.rmtree()
        self._mirror([row for _, row in kept])

    def close(self) -> None:
        """Closes the files; a later write is an error."""
        for board in self._boards.values():
            board.close()
        self._boards = {}
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _rewrite(self, kept: Sequence[tuple[str, dict[str, Any]]]) -> None:
        self.close()
        self._lines = [line for line, _ in kept]
        text = "".join(f"{line}\n" for line in self._lines)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if not self._path.exists() or self._path.read_text() != text:
            write_text_atomic(self._path, text)
        if not self._remote:
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115

    def _mirror(self, rows: Sequence[dict[str, Any]]) -> None:
        if not self._tensorboard:
            return
        import tensorboardX  # late: it takes a second, and imports torch where there is one

        for row in rows:
            step, stage, phase = row["step"], row["stage"], row["phase"]
            if stage not in self._boards:
                directory = self._run_dir / "tensorboard" / stage
                # Event files are named by the second: two of one second would be one.
                suffix = f".{len(list(directory.glob('*')))}" if directory.exists() else ".0"
                self._boards[stage] = tensorboardX.SummaryWriter(
                    str(directory), filename_suffix=suffix
                )
            for name, value in row.items():
                if name not in ("step", "stage", "phase") and value is not None:
                    self._boards[stage].add_scalar(f"{phase}/{name}", value, step)
        for stage in {row["stage"] for row in rows}:
            self._boards[stage].flush()


class TrajectoryWriter:
    """Writes a few trajectories of a step to RUN_DIR/trajectories/STAGE_STEP.jsonl.

    With `writes` false no file is touched: of several hosts, one writes.
    """

    def __init__(self, run_dir: epath.PathLike, per_step: int, *, writes: bool = True):
        self._directory = epath.Path(run_dir) / "trajectories"
        self._per_step = per_step if writes else 0
        self._writes = writes

    def write(
        self,
        step: int,
        stage: str,
        trajectories: Sequence[Trajectory],
        rewards: Sequence[Mapping[str, float]],
    ) -> None:
        """Writes `per_step` of them, evenly spread; `rewards` are their reward's parts.

        Raises:
            ValueError: there are not as many rewards as trajectories.
        """
        count = len(trajectories)
        if count != len(rewards):
            raise ValueError(f"{count} trajectories and {len(rewards)} rewards")
        shown = min(count, self._per_step)
        if not shown:
            return
        chosen = [i * count // shown for i in range(shown)]
        lines = [
            json.dumps(trajectory_row(trajectories[i], rewards[i]), ensure_ascii=False)
            for i in chosen
        ]
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"{stage}_{step:06d}.jsonl"
        path.write_text("".join(f"{line}\n" for line in lines))

    def cut_back(self, step: int) -> None:
        """Removes the files of all steps after `step`."""
        if not self._writes or not self._directory.exists():
            return
        for path in self._directory.glob("*_*.jsonl"):
            number = path.stem.rsplit("_", 1)[-1]
            if number.isdigit() and int(number) > step:
                path.unlink()


def read_rows(path: epath.PathLike) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that was never finished is left out.

    Raises:
        UserError: another line is broken.
    """
    return [row for _, row in _read(epath.Path(path))]


def clocked(name: str) -> bool:
    """Whether a metric is a matter of time: no two runs agree in it."""
    return name.endswith("_seconds") or name in ("tokens_per_second", "decode_utilization")


def identical(path_a: epath.PathLike, path_b: epath.PathLike) -> list[str]:
    """How two metrics files differ in anything but the clock's readings; [] if they do not.

    Left out are the keys that `clocked` names.
    """
    rows_a, rows_b = read_rows(path_a), read_rows(path_b)
    differences = []
    for a, b in zip(rows_a, rows_b, strict=False):
        where = f"step {a['step']} {a['stage']} {a['phase']}"
        for name in {**a, **b}:
            if clocked(name):
                continue
            left, right = a.get(name, "absent"), b.get(name, "absent")
            if left != right:
                differences.append(f"{where}: {name} is {left!r} and {right!r}")
    if len(rows_a) != len(rows_b):
        differences.append(f"{len(rows_a)} and {len(rows_b)} rows")
    return differences


def trajectory_row(trajectory: Trajectory, reward: Mapping[str, float]) -> dict[str, Any]:
    """A trajectory as plain JSON values, with the parts of its reward (or what is known of it)."""
    question = trajectory.question
    return {
        "question": question.text,
        "answers": list(question.answers),
        "kind": question.kind,
        "id": question.id,
        "sample": trajectory.sample,
        "attempt": trajectory.attempt,
        "stop_reason": trajectory.stop_reason.value,
        "reward": {name: _number(name, value) for name, value in reward.items()},
        "searches": [
            {"query": search.query, "documents": [document.id for document in search.documents]}
            for search in trajectory.searches
        ],
        "segments": [[s.source.name.lower(), s.text] for s in trajectory.segments],
    }


def write_text_atomic(path: epath.PathLike, text: str) -> None:
    """As `write_bytes_atomic`, in UTF-8."""
    write_bytes_atomic(path, text.encode())


def write_bytes_atomic(path: epath.PathLike, content: bytes) -> None:
    """Replaces a file at once: a kill leaves the old content or the new, never a part."""
    path = epath.Path(path)
    draft = path.parent / f".{path.name}.draft"
    draft.write_bytes(content)
    draft.replace(path)


def _read(path: epath.Path) -> list[tuple[str, dict[str, Any]]]:
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not {"step", "stage", "phase"} <= row.keys():
                raise ValueError("no row")
        except ValueError:
            if number == len(lines):
                break
            raise UserError(f"{path}:{number}: not a row of metrics: {line[:80]!r}") from None
        rows.append((line, row))
    return rows


def _number(name: str, value: Any) -> int | float | None:
    if hasattr(value, "item"):  # a scalar of numpy or JAX
        value = value.item()
    if value is None or isinstance(value, numbers.Integral):
        return None if value is None else int(value)
    if not isinstance(value, float):
        raise ValueError(f"metric {name} is {value!r}, which is no number")
    return value if math.isfinite(value) else None
