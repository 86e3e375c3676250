"""What every script shares: command line, gin configuration, exit codes.

A script is `python tpu_scripts/NAME.py`, so this folder is on the path and scripts say

    import launch

    def main() -> int | None:
        args = launch.parse_args(__doc__)
        config = launch.load_config(args.config, args.gin)
        from r1s_jax.run import train  # after run_main has set the environment
        ...

    if __name__ == "__main__":
        launch.run_main(main)

Only this folder knows gin. The files under configs/ use gin's dynamic registration on plain
keyword-only dataclasses; the dataclass at the top is `r1s_jax.run.config.RunConfig`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util  # gin needs it, and does not import it itself
import os
import pathlib
import re
import select
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import gin
from gin import config as gin_config

ROOT = pathlib.Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # r1s_jax need not be installed, whatever the working directory
    sys.path.insert(0, str(ROOT))

from gin_checks import Scan, named, shown
from r1s_jax.types import UserError

CONFIGS = ROOT / "configs"
SKIP_BAD = "run.WorldConfig.skip_bad = True"
_PATHS = (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedConfig:
    """A built configuration and its canonical text.

    `text` is gin again: one binding a line, defaults included, sorted, with includes and
    overrides flattened; equal settings give equal text whatever order they were written in.
    """

    name: str
    value: Any
    text: str


# ---------------------------------------------------------------- command line and exit codes


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are UserErrors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def parse_args(
    description: str | None,
    argv: Sequence[str] | None = None,
    *,
    add: Callable[[argparse.ArgumentParser], None] | None = None,
) -> argparse.Namespace:
    """The options all scripts have (`config`, `run_dir`, `gin`) and those that `add` declares.

    Raises:
        UserError: an unknown option or a missing value.
    """
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="NAME", help="reads configs/NAME.gin")
    parser.add_argument("--run_dir", metavar="DIR", help="where the run is written; may be gs://")
    parser.add_argument(
        "--preset",
        action="append",
        default=[],
        dest="gin",
        type=_included,
        metavar="NAME",
        help="includes configs/NAME.gin on top, such as algorithms/grpo or meshes/v5e_64",
    )
    parser.add_argument(
        "--gin",
        action="append",
        default=[],
        metavar="'BINDING'",
        help="one more binding, after those of the file; may be given several times",
    )
    parser.add_argument(
        "--skip_bad",
        action="append_const",
        dest="gin",
        const=SKIP_BAD,
        help="leave broken lines of question files out, and count them",
    )
    if add is not None:
        add(parser)
    return parser.parse_args(argv)


def _included(preset: str) -> str:
    """A preset as a binding: presets and bindings take effect in the order they are given in."""
    if not (CONFIGS / f"{preset}.gin").is_file():
        kinds = ("algorithms", "samplers", "meshes", "adapters")
        known = sorted(f"{k}/{p.stem}" for k in kinds for p in (CONFIGS / k).glob("*.gin"))
        raise UserError(
            f"--preset {preset}: no such file in configs; there are: {', '.join(known)}"
        )
    return f'include "{preset}.gin"'


def prepare_environment() -> None:
    """Settings that packages read when they are imported. What the user has set is left alone.

    Compiled programs are kept under ~/.cache/r1s_jax (R1S_JAX_CACHE moves it, empty turns it
    off), so that a second start of the same run does not compile again.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch is missing
    default = pathlib.Path.home() / ".cache" / "r1s_jax"
    cache = os.environ.get("R1S_JAX_CACHE", str(default))
    if cache:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(cache, "xla"))
        # The tiny config's programs compile in less than JAX's threshold of one second each.
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def run_main(fn: Callable[[], int | None]) -> NoReturn:
    """Runs a script's main and leaves with its exit code.

    A UserError is one line on stderr and code 2, and so is a path that cannot be written; Ctrl-C
    is 130, a reader of stdout that left (`| head`) a silent 141, as a shell calls SIGPIPE, and `fn`
    may return a code of its own; anything else is a bug and shows its traceback. jax must not be
    imported before.
    """
    prepare_environment()
    code, line = 0, ""
    try:
        code = fn() or 0
        print(end="", flush=True)
    except BaseException as error:
        gone = _reader_is_gone() and isinstance(error, BrokenPipeError)
        known = (code or 141, "") if gone else explain(error)
        if known is None:
            raise
        code, line = known
    if line:
        print(line, file=sys.stderr)
    sys.exit(code)


def _reader_is_gone() -> bool:
    """Whether stdout is a pipe that nobody reads any more; then what is left is thrown away.

    Else Python, which writes it at the exit, would complain.
    """
    with contextlib.suppress(BrokenPipeError):
        print(end="", flush=True)
    poll = select.poll()
    poll.register(1, 0)
    gone = any(events & select.POLLERR for _, events in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return gone


def explain(error: BaseException) -> tuple[int, str] | None:
    """(exit code, line for stderr) of what `run_main` lists; None for a bug."""
    if isinstance(error, UserError):
        return 2, f"error: {' '.join(str(error).split())}"
    if isinstance(error, _PATHS):
        return 2, f"error: {error.filename}: {error.strerror}"
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    return None


# ---------------------------------------------------------------- configuration


def load_config(
    name: str | None,
    bindings: Sequence[str] = (),
    *,
    configs: pathlib.Path = CONFIGS,
    top: type | None = None,
) -> ResolvedConfig:
    """Reads `configs/NAME.gin`, applies the bindings in order and builds the top dataclass.

    Raises:
        UserError: one line with file and line: an unknown name, module, class or parameter, a
            syntax error, a value of the wrong type, a missing value, a binding without effect.
    """
    known = sorted(path.stem for path in configs.glob("*.gin"))
    if name not in known:
        problem = "--config NAME is missing" if name is None else f"--config {name}: no such file"
        raise UserError(f"{problem} in {shown(configs)}; there are: {', '.join(known)}")
    path = configs / f"{name}.gin"
    return _load(name, path.read_text(), str(path), bindings, configs, top)


def load_text(
    text: str, where: str, bindings: Sequence[str] = (), *, top: type | None = None
) -> ResolvedConfig:
    """The same from the text of a run's config.gin; `where` names it in errors."""
    return _load(where, text, where, bindings, CONFIGS, top)


def load_run_config(run_dir: str, bindings: Sequence[str] = ()) -> ResolvedConfig:
    """The configuration that a run directory was made with, and `bindings` on top.

    Raises:
        UserError: it is no run directory, or see `load_config`.
    """
    from etils import epath

    file = epath.Path(run_dir) / "config.gin"
    if not file.exists():
        raise UserError(
            f"{run_dir}: no run directory, it holds no config.gin; tpu_scripts/train.py makes one"
        )
    return load_text(file.read_text(), str(file), bindings)


def choose_policy(
    args: argparse.Namespace, default_run: str | None = None
) -> tuple[ResolvedConfig, pathlib.Path | None]:
    """(config, checkpoint) of --run_dir RUN (its export) or --config NAME [--checkpoint MODEL].

    The checkpoint is None where the config's own is meant.

    Raises:
        UserError: both or neither are given, or the run has no export yet.
    """
    given = None if args.checkpoint is None else pathlib.Path(args.checkpoint).expanduser()
    run_dir = args.run_dir or (default_run if args.config is None else None)
    if (run_dir is None) == (args.config is None):
        raise UserError("give either --run_dir RUN or --config NAME (see --help)")
    if run_dir is None:
        return load_config(args.config, args.gin), given
    config = load_run_config(run_dir, args.gin)
    export = pathlib.Path(run_dir) / "hf"
    if given is None and not (export / "config.json").is_file():
        raise UserError(
            f"{export}: no export there yet; let the run finish, or export its latest checkpoint: "
            f"python tpu_scripts/export_hf.py --run_dir {run_dir}"
        )
    return config, given or export


def _load(
    name: str,
    text: str,
    where: str,
    bindings: Sequence[str],
    configs: pathlib.Path,
    top: type | None,
) -> ResolvedConfig:
    builds: Any = top
    if top is None:
        builds = importlib.import_module("r1s_jax.run.config").RunConfig
    gin.clear_config()
    try:
        with _includes_from(configs), _OneLineErrors(where):
            gin.parse_config(named(text, where))
        scan = Scan(configs)
        scan.read(text, where)
        overrides = []
        for binding in bindings:
            with _includes_from(configs), _OneLineErrors(f"--gin {binding!r}", located=False):
                gin.parse_config("\n".join([*scan.import_lines(), binding]))
                overrides += scan.read_binding(binding)
        scan.check()
        with _OneLineErrors(where, located=False):
            try:
                build = gin.get_configurable(builds)
            except (KeyError, ValueError):  # no binding names it
                build = builds
            value = build()
        resolved = _canonical(gin.operative_config_str(max_line_length=1_000_000))
    finally:
        gin.clear_config()  # gin's state is global; nothing of it outlives this call
    for override in overrides:
        if not re.search(rf"^([^ ]*[./])?{re.escape(override.name)} = ", resolved, re.MULTILINE):
            raise UserError(f"{override.where}: nothing in {shown(where)} uses {override.name}")
    return ResolvedConfig(name=name, value=value, text=resolved)


@contextlib.contextmanager
def _includes_from(configs: pathlib.Path) -> Iterator[None]:
    """Includes are found under configs/ and nowhere else.

    By default gin 0.5 looks in the working directory first, and logs an error for every folder
    and package where a file is not; it has no public way to switch that off.
    """
    lists: tuple[Any, ...] = (gin_config._LOCATION_PREFIXES, gin_config._FILE_READERS)
    kept = [list(each) for each in lists]
    lists[0][:], lists[1][:] = [str(configs)], [(open, os.path.isfile)]
    try:
        yield
    finally:
        for each, before in zip(lists, kept, strict=True):
            each[:] = before


def _canonical(text: str) -> str:
    lines = (line for line in text.splitlines() if not line.startswith("# ="))
    return "\n".join(lines).strip() + "\n"


class _OneLineErrors:
    """Turns what gin raises, over several lines, into a UserError of one."""

    def __init__(self, where: str, *, located: bool = True):
        self.where, self.located = where, located

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
        expected = (ValueError, TypeError, NameError, AttributeError, ImportError, OSError)
        if not isinstance(error, (*expected, SyntaxError, UserError)):
            return
        message, *context = str(error).split("\n  In ")
        where, quoted = shown(self.where), ""
        if isinstance(error, SyntaxError):
            message = error.args[0]
            found = error.args[1] if len(error.args) > 1 else None
            if found and self.located:
                where, quoted = f"{shown(found[0] or self.where)}:{found[1]}", found[3] or ""
        elif self.located and context:
            found = re.match(r'file "(.*)", line (\d+)\n(.*)', context[0])
            if found:
                where, quoted = f"{shown(found[1])}:{found[2]}", found[3]
        if text := re.search(r"malformed node.*Failed to parse token '(\w+)'", str(error), re.S):
            message = f"{text[1]} is no value; texts need quotes"
        called = re.search(r"call to configurable '(\w+)'.*?(?: in scope '(.*)')?$", str(error))
        missing = re.search(r"(\w+)\.__init__\(\) missing .*?: (.*)", message)
        if missing:
            message = f"{missing[1]} needs a value for {missing[2].splitlines()[0]}"
        elif called:
            message = f"{called[1]}: {message}"
        if called and called[2]:
            message = f"{message} (in scope {called[2]})"
        parts = (where, message.strip().rstrip("."), " ".join(quoted.split()))
        raise UserError(" ".join(": ".join(filter(None, parts)).split())) from error
