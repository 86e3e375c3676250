"""A host of several: a small parent that tells in one line why the work ended.

Where another host has died, JAX's runtime ends a process without Python. So the work is done by a
child, and its parent, which holds nothing that could fail, waits for it, hands signals on and
passes its exit code through. Where the child was ended by the runtime or by a signal, the parent
says why. What the runtime writes past Python goes into a log, which is kept only then.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
from types import FrameType

from etils import epath

from r1s_jax.run.preemption import EXIT_TRY_AGAIN
from r1s_jax.types import UserError

# sysexits' EX_UNAVAILABLE: a host is gone and nothing was saved; started again, the run goes on
# from its last checkpoint.
EXIT_HOST_LOST = 69
CHILD = "R1S_JAX_CHILD"  # tells a child which host it is and where its output goes

_SHOW_CURSOR = "\x1b[?25h"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Host:
    """One of the hosts that train together."""

    index: int
    count: int
    coordinator: str  # ADDRESS:PORT of host 0

    def __str__(self) -> str:
        return f"host {self.index} of {self.count}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChildOf:
    """What a parent tells its child: the host, file descriptors of the user's screen, its log."""

    host: Host
    stdout: int
    stderr: int
    log: str


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that `this_host` reads."""
    parser.add_argument(
        "--host",
        metavar="I/N",
        help="one of several hosts: 0/2 on the first of two, 1/2 on the second; the hosts of a TPU "
        "pod know by themselves",
    )
    parser.add_argument(
        "--coordinator",
        metavar="ADDRESS:PORT",
        help="with --host, and the same on all: host 0's address, and a port that is free there",
    )


def this_host(host: str | None, coordinator: str | None) -> Host | None:
    """The host that the options name, or the pod that this machine is part of; None if alone.

    Raises:
        UserError: one option without the other, or no such host.
    """
    if host is None and coordinator is None:
        return _of_a_pod()
    if host is None or coordinator is None:
        raise UserError("--host I/N and --coordinator ADDRESS:PORT belong together")
    numbers = re.fullmatch(r"(\d+)/(\d+)", host)
    if numbers is None or int(numbers[1]) >= int(numbers[2]):
        raise UserError(f"--host {host}: must be 0/N, 1/N, ... up to N-1/N")
    port = re.fullmatch(r".+:(\d+)", coordinator)
    if port is None or not 0 < int(port[1]) < 65536:
        raise UserError(f"--coordinator {coordinator}: must be ADDRESS:PORT, such as 10.0.0.2:8476")
    if int(numbers[2]) == 1:
        return None
    return Host(index=int(numbers[1]), count=int(numbers[2]), coordinator=coordinator)


def child_of() -> ChildOf | None:
    """What the parent told this process; None if it is nobody's child.

    From here on what Python writes goes to the user's screen, and what the runtime writes itself
    goes into the log.
    """
    told = os.environ.pop(CHILD, None)  # not for processes that the child starts
    if told is None:
        return None
    values = json.loads(told)
    child = ChildOf(**{**values, "host": Host(**values["host"])})
    sys.stdout = open(child.stdout, "w", buffering=1, errors="replace")  # noqa: SIM115
    sys.stderr = open(child.stderr, "w", buffering=1, errors="replace")  # noqa: SIM115
    return child


def supervise(host: Host, run_dir: str) -> int:
    """Runs this process's own command again as a child; returns the exit code.

    The child's where it left by itself, 75 where SIGTERM ended it before it could save anything,
    and else 69, which is explained in one line on stderr.
    """
    handle, name = tempfile.mkstemp(prefix=f"r1s_jax_host{host.index}_", suffix=".log")
    log = pathlib.Path(name)
    screen = [os.dup(fd) for fd in (1, 2)]
    told = ChildOf(host=host, stdout=screen[0], stderr=screen[1], log=name)
    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []  # signals that came before there was a child

    def hand_on(number: int, _: FrameType | None) -> None:
        if child is None:
            early.append(number)
        else:
            child.send_signal(number)

    before = {n: signal.signal(n, hand_on) for n in (signal.SIGTERM, signal.SIGINT)}
    with os.fdopen(handle, "wb") as out:
        child = subprocess.Popen(
            [sys.executable, *sys.orig_argv[1:]],
            env={**os.environ, CHILD: json.dumps(dataclasses.asdict(told))},
            stdin=subprocess.PIPE,  # closes with this process, however that ends
            stdout=out,
            stderr=out,
            pass_fds=screen,
            process_group=0,  # a terminal's Ctrl-C comes once, from here
        )

    for number in early:
        child.send_signal(number)
    try:
        code = child.wait()
    finally:
        child.kill()
        for number, handler in before.items():
            signal.signal(number, handler)
    if code >= 0:
        if code != 1:  # a bug
            log.unlink()
        return code
    if sys.stderr.isatty():  # the progress bar had no time to give it back
        sys.stderr.write(_SHOW_CURSOR)
    again = f"start the same command on all hosts again, it {_goes_on(run_dir)}"
    if code == -signal.SIGTERM:
        log.unlink()
        print(f"SIGTERM before anything was to be saved; {again}", file=sys.stderr)
        return EXIT_TRY_AGAIN
    why = explain_end(host, code, log.read_text(errors="replace"))
    print(f"error: {why}; {again} (the runtime's own words: {log})", file=sys.stderr)
    return EXIT_HOST_LOST


def explain_end(host: Host, code: int, said: str) -> str:
    """Why a child ended by signal `-code`, from what its runtime said at last."""
    if "JAX distributed service detected fatal errors" not in said:
        return f"{host} was ended by {signal.Signals(-code).name}"
    if "CoordinationService/RegisterTask" in said:
        return (
            f"the {host.count} hosts did not come together at {host.coordinator}; each needs an "
            "index of its own, and time until all have been started"
        )
    silent = re.search(r"stopped sending heartbeats\):\s*((?:\d+\s+)+)", said)
    # Nobody names host 0, which does the counting.
    gone = silent[1].split() if silent else ["0"]
    hosts = f"host {gone[0]}" if len(gone) == 1 else f"hosts {', '.join(gone)}"
    return f"{hosts} of {host.count} stopped answering"


def _goes_on(run_dir: str) -> str:
    folder = epath.Path(run_dir) / "checkpoints"
    if "://" in run_dir:  # there a step's folder may still be incomplete
        return "goes on from the last checkpoint"
    names = [child.name for child in folder.iterdir()] if folder.is_dir() else []
    steps = [int(name) for name in names if name.isdigit()]
    return f"goes on after step {max(steps)}" if steps else "begins anew: no step was saved yet"


def _of_a_pod() -> Host | None:
    """The host that this is of a TPU pod; None on other machines and on a TPU of one host."""
    platforms = os.environ.get("JAX_PLATFORMS") or "tpu"
    if "tpu" not in platforms or importlib.util.find_spec("libtpu") is None:
        return None
    # `jax.distributed.initialize()` asks the same; there is no public way to ask and not connect.
    from jax._src import clusters
    from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm

    if not running_in_cloud_tpu_vm:
        return None
    coordinator, count, index, _ = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, 300
    )
    if coordinator is None or index is None or count is None or count == 1:
        return None
    return Host(index=index, count=count, coordinator=coordinator)
