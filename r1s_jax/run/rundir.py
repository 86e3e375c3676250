"""The run directory: its layout, and the check that a resumed run is the run it was."""

from __future__ import annotations

import dataclasses
import json
import time
import uuid
from typing import Any

import jax
from etils import epath

from r1s_jax.rollout.hosts import from_all_hosts, from_first_host
from r1s_jax.run.metrics import METRICS, write_text_atomic
from r1s_jax.types import UserError

CONFIG = "config.gin"
_SHARED_WITHIN = 10.0  # seconds until a file of one host is seen by all: network folders lag


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunDir:
    """Where everything of a run lies; `resumed` says whether it was there before."""

    path: epath.Path
    resumed: bool

    @property
    def config(self) -> epath.Path:
        """The resolved configuration."""
        return self.path / CONFIG

    @property
    def metrics(self) -> epath.Path:
        """One row per step."""
        return self.path / METRICS

    @property
    def tensorboard(self) -> epath.Path:
        """Event files, a folder per stage."""
        return self.path / "tensorboard"

    @property
    def trajectories(self) -> epath.Path:
        """Sampled trajectories, a file per step."""
        return self.path / "trajectories"

    @property
    def checkpoints(self) -> epath.Path:
        """Orbax's folder."""
        return self.path / "checkpoints"

    @property
    def hf(self) -> epath.Path:
        """The export."""
        return self.path / "hf"

    @property
    def summary(self) -> epath.Path:
        """The figures at the end."""
        return self.path / "summary.json"


def open_run_dir(path: epath.PathLike, config_text: str) -> RunDir:
    """Makes a run directory, or opens that of an interrupted run of the same configuration.

    A configuration that did not come as far as its first figure is replaced. Several hosts open
    it together: host 0 makes it, and all have to see it.

    Raises:
        UserError: it cannot be made, or belongs to another configuration or to something else;
            nothing in it is touched. Or the hosts do not share it.
    """
    resumed = from_first_host(lambda: _open(path, config_text))
    run = RunDir(path=epath.Path(path), resumed=resumed)
    if jax.process_count() > 1:
        _require_shared(run.path)
    return run


def config_bindings(text: str) -> dict[str, str]:
    """`name = value` of each line of a config.gin; others, such as imports, count as names."""
    found = {}
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            name, equals, value = line.partition(" = ")
            found[name] = value if equals else "set"
    return found


def _open(path: epath.PathLike, config_text: str) -> bool:
    """Makes or checks the directory; returns whether it was there before."""
    run = RunDir(path=epath.Path(path), resumed=(epath.Path(path) / CONFIG).exists())
    if run.resumed and _started(run):
        _same_config(run.config, config_text)
    elif run.resumed:  # nothing was done with the other configuration yet
        write_text_atomic(run.config, config_text)
    elif run.path.exists() and not run.path.is_dir():
        raise UserError(f"{run.path}: is a file, not a run directory")
    elif run.path.exists():
        strangers = sorted(child.name for child in run.path.iterdir() if child.name[0] != ".")
        if strangers:
            raise UserError(
                f"{run.path}: not empty and no run directory: has {strangers[0]}, lacks {CONFIG}"
            )
    try:
        run.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{run.path}: cannot be made: {error.strerror}") from error
    if not run.resumed:
        write_text_atomic(run.config, config_text)  # first: it is what makes this a run directory
    for folder in (run.tensorboard, run.trajectories, run.checkpoints, run.hf):
        folder.mkdir(exist_ok=True)
    return run.resumed


def _require_shared(path: epath.Path) -> None:
    """Raises UserError on all hosts where one does not see what host 0 writes."""
    name = from_first_host(lambda: f".{uuid.uuid4().hex}")
    if jax.process_index() == 0:
        (path / name).write_text("")
    from_all_hosts(None)
    end = time.monotonic() + _SHARED_WITHIN
    while not (seen := (path / name).exists()) and time.monotonic() < end:
        time.sleep(0.1)
    sight = from_all_hosts(seen)
    if jax.process_index() == 0:
        (path / name).unlink()
    if not all(sight):
        raise UserError(
            f"{path}: host {sight.index(False)} does not see what host 0 writes there; several "
            "hosts need a --run_dir that all of them share"
        )


def write_json_atomic(path: epath.PathLike, value: Any) -> None:
    """Replaces a JSON file at once; refuses NaN and infinities, which JSON has not.

    Raises:
        ValueError: the value holds one of them.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_text_atomic(path, f"{text}\n")


def _started(run: RunDir) -> bool:
    """Whether anything was measured or saved."""
    written = run.metrics.exists() and bool(run.metrics.read_text().strip())
    return written or (run.checkpoints.exists() and any(run.checkpoints.iterdir()))


def _same_config(file: epath.Path, text: str) -> None:
    stored, wanted = config_bindings(file.read_text()), config_bindings(text)
    for name in sorted({**stored, **wanted}):
        if stored.get(name) != wanted.get(name):
            raise UserError(
                f"{file}: {name} is {stored.get(name, 'not set')} in this run directory"
                f" and {wanted.get(name, 'not set')} now; choose another --run_dir"
            )
