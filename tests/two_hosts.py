"""Starts a script on two hosts: two real processes of four devices each, on this machine."""

import argparse
import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax

import launch
from r1s_jax.run import supervise

ROOT = pathlib.Path(__file__).parents[1]
LONGEST = 600  # seconds: nothing here waits longer


class Hosts:
    """The processes, and what they have said."""

    def __init__(self, processes, logs):
        self.processes, self._logs = processes, logs

    def said(self, index):
        """Everything on a host's screen so far."""
        return self._logs[index].read_text(errors="replace")

    def wait_until(self, what, longest=LONGEST):
        """Polls; AssertionError with all that was said if it never comes or a host ends first."""
        end = time.monotonic() + longest
        while not what():
            ended = [process.poll() for process in self.processes]
            assert time.monotonic() < end and None in ended, (ended, *map(self.said, (0, 1)))
            time.sleep(0.05)

    def codes(self, longest=LONGEST):
        """The exit codes, once all have ended."""
        end = time.monotonic() + longest
        return [self.seconds_until_end(i, end - time.monotonic())[1] for i in (0, 1)]

    def seconds_until_end(self, index, longest=LONGEST):
        """(seconds, exit code) until a host has ended."""
        started = time.monotonic()
        try:
            code = self.processes[index].wait(max(0.1, longest))
        except subprocess.TimeoutExpired:
            raise AssertionError([self.said(i) for i in (0, 1)]) from None
        return time.monotonic() - started, code

    def child(self, index):
        """The process id of the one that a host's parent watches."""
        pid = self.processes[index].pid
        return int(pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def signal(self, index, number):
        os.kill(self.processes[index].pid, number)


def free_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def be_a_host(fn, *names):
    """The main of a program for `two_hosts`: its exit code.

    `fn` gets the host's index and the values of the arguments called `names`.
    """
    launch.prepare_environment()
    parser = argparse.ArgumentParser()
    supervise.add_options(parser)
    for name in names:
        parser.add_argument(name)
    args = parser.parse_args()
    child = supervise.child_of()
    if child is None:
        return supervise.supervise(supervise.this_host(args.host, args.coordinator), "run")
    from r1s_jax.run import hosts

    values = [getattr(args, name) for name in names]
    return hosts.work(child, lambda: fn(child.host.index, *values), launch.explain)


@contextlib.contextmanager
def two_hosts(folder, command, *, each=((), ()), cwd=(None, None)):
    """`command`, a list, with --host and --coordinator and the arguments of `each`.

    What is still there at the end is killed; a parent takes its child along.
    """
    given = os.environ["XLA_FLAGS"]
    environment = {
        **os.environ,
        "XLA_FLAGS": given.replace("platform_device_count=8", "platform_device_count=4"),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tpu_scripts'}",
        "JAX_CPU_ENABLE_ASYNC_DISPATCH": "0",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TMPDIR": str(folder),
    }
    address = free_address()
    folder.mkdir(exist_ok=True)
    logs = [folder / f"host{i}.log" for i in (0, 1)]
    processes = []
    try:
        for i in (0, 1):
            host = ["--host", f"{i}/2", "--coordinator", address]
            with logs[i].open("wb") as out:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, *map(str, command), *host, *map(str, each[i])],
                        env=environment,
                        cwd=cwd[i],
                        stdout=out,
                        stderr=out,
                    )
                )
        yield Hosts(processes, logs)
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()
