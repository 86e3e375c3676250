"""Hosts that train together: they meet, agree, fail together, and are told of a dead one.

The programs are real processes of two hosts; what they train is left to `test_train_on_two_hosts`.
"""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from r1s_jax.run import supervise
from r1s_jax.run.supervise import Host, explain_end, this_host
from r1s_jax.types import UserError
from tests.two_hosts import two_hosts

PROGRAM = pathlib.Path(__file__).with_name("host_program.py")
HOST = Host(index=2, count=4, coordinator="10.0.0.2:8476")
# DESIGN.md: where a host dies, the others end within so many seconds.
WITHIN = 30


@pytest.fixture(autouse=True)
def no_pod(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


# ---------------------------------------------------------------- options


def test_alone_without_options():
    assert this_host(None, None) is None
    assert this_host("0/1", "10.0.0.2:8476") is None
    assert this_host("2/4", "10.0.0.2:8476") == HOST


@pytest.mark.parametrize(
    ("host", "coordinator", "words"),
    [
        ("0/2", None, "belong together"),
        (None, "a:1", "belong together"),
        ("2/2", "a:1", "--host 2/2: must be"),
        ("1", "a:1", "--host 1: must be"),
        ("-1/2", "a:1", "--host -1/2: must be"),
        ("0/2", "a", "--coordinator a: must be"),
        ("0/2", "a:70000", "--coordinator a:70000: must be"),
    ],
)
def test_bad_options_are_one_line(host, coordinator, words):
    with pytest.raises(UserError) as caught:
        this_host(host, coordinator)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_pod_is_found_by_itself(monkeypatch):
    """As on GKE, whose settings are in the environment; a TPU of one host is alone."""
    import jax._src.cloud_tpu_init
    from jax._src.clusters import cloud_tpu_cluster

    monkeypatch.setattr(supervise.importlib.util, "find_spec", lambda name: name == "libtpu")
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(jax._src.cloud_tpu_init, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster.BaseTpuCluster, "wait_for_coordinator", lambda *_: None)
    for name in ("MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(cloud_tpu_cluster, "get_tpu_env_value", os.environ.get)
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "t0,t1,t2,t3")
    monkeypatch.setenv("TPU_WORKER_ID", "2")
    assert this_host(None, None) == Host(index=2, count=4, coordinator="t0:8482")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "t0")
    monkeypatch.setenv("TPU_WORKER_ID", "0")
    assert this_host(None, None) is None
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "t0,t1")
    assert this_host(None, None) is None


def test_a_child_knows_whose_it_is_and_where_to_speak(monkeypatch, tmp_path):
    assert supervise.child_of() is None
    screen = [os.open(tmp_path / name, os.O_CREAT | os.O_WRONLY) for name in ("out", "err")]
    told = supervise.ChildOf(host=HOST, stdout=screen[0], stderr=screen[1], log="a.log")
    for name in ("stdout", "stderr"):  # to be given back
        monkeypatch.setattr(sys, name, getattr(sys, name))
    monkeypatch.setenv(supervise.CHILD, json.dumps(dataclasses.asdict(told)))
    assert supervise.child_of() == told
    print("a figure")
    print("a note", file=sys.stderr)
    assert [(tmp_path / name).read_text() for name in ("out", "err")] == ["a figure\n", "a note\n"]
    assert supervise.child_of() is None  # nothing is left for a process of its own


# ---------------------------------------------------------------- the last words of a runtime

FATAL = "Terminating process because the JAX distributed service detected fatal errors."


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("", "host 2 of 4 was ended by SIGABRT"),
        (
            FATAL + "\nRPC: /xla.coordination.CoordinationService/RegisterTask",
            "come together at 10.",
        ),
        (FATAL + " UNAVAILABLE: Failed to send RPC", "host 0 of 4 stopped answering"),
        (
            FATAL + " unhealthy (stopped sending heartbeats):\n1\nThe tasks have crashed.",
            "host 1 of 4 stopped answering",
        ),
        (
            FATAL + " unhealthy (stopped sending heartbeats):\n1\n3\nThe tasks have crashed.",
            "hosts 1, 3 of 4 stopped answering",
        ),
    ],
)
def test_why_a_child_ended(said, words):
    assert words in explain_end(HOST, -signal.SIGABRT, said)


def test_a_signal_that_comes_before_the_child_is_handed_on(monkeypatch, tmp_path, capsys):
    """Bug: SIGTERM while the child was being started ended the parent alone."""
    start = subprocess.Popen

    def late(_, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return start([sys.executable, "-c", "import time; time.sleep(60)"], **options)

    monkeypatch.setattr(subprocess, "Popen", late)
    before = signal.getsignal(signal.SIGTERM)
    assert supervise.supervise(HOST, str(tmp_path)) == 75
    assert signal.getsignal(signal.SIGTERM) == before
    assert capsys.readouterr().err.startswith("SIGTERM before anything was to be saved")


# ---------------------------------------------------------------- two real hosts

slow = pytest.mark.slow  # pairs of processes that import and meet, and that wait for heartbeats


def lines(hosts, index):
    """What a host said after it had met the other."""
    met, *rest = hosts.said(index).splitlines()
    assert met.startswith(f"host {index} of 2 meets the others at 127.0.0.1:")
    return [line for line in rest if line != "ready"]


def left(folder):
    return [p.name for p in folder.glob("r1s_jax_host*")]


@slow
@pytest.mark.parametrize(("how", "code"), [("agree", 0), ("75", 75)])
def test_all_leave_together(tmp_path, how, code):
    with two_hosts(tmp_path, [PROGRAM, how]) as hosts:
        assert hosts.codes(120) == [code, code]
        assert [lines(hosts, i) for i in (0, 1)] == [[], []]
    assert left(tmp_path) == []


@slow
@pytest.mark.parametrize(
    ("how", "code", "own", "other"),
    [
        ("error at once", 2, "error: {}", "what.gin:3: no such thing"),
        ("error", 2, "error: {}", "disk full"),
        ("interrupt", 130, "{}", "interrupted"),
        ("bug", 1, None, "ZeroDivisionError: 1/0"),
    ],
)
def test_one_that_fails_ends_all_and_says_why(tmp_path, how, code, own, other):
    """Bug: the others waited for ever, or until the interpreter had given up after minutes."""
    with two_hosts(tmp_path, [PROGRAM, how]) as hosts:
        assert hosts.codes(60) == [code, code]
        assert lines(hosts, 0) == [f"error: host 1 of 2: {other}"]
        if own is None:
            *trace, last, log = lines(hosts, 1)
            assert trace[0].startswith("Traceback") and last == other
            assert any(name in log for name in left(tmp_path))
        else:
            assert lines(hosts, 1) == [own.format(other)]


@slow
def test_hosts_that_were_given_different_things(tmp_path):
    with two_hosts(tmp_path, [PROGRAM, "differ"]) as hosts:
        assert hosts.codes(60) == [2, 2]
        words = "error: rate is 0.0 on host 0 and 0.1 on host 1: all need the same"
        assert words in lines(hosts, 0)[0] and words in lines(hosts, 1)[0]


@slow
def test_a_port_that_is_taken(tmp_path):
    import socket

    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with two_hosts(
            tmp_path, [PROGRAM, "agree"], each=[["--coordinator", address]] * 2
        ) as hosts:
            assert hosts.seconds_until_end(0, 60)[1] == 2
            assert f"error: --coordinator {address}: port" in hosts.said(0)


@slow
@pytest.mark.parametrize("index", [0, 1])
def test_a_signal_on_one_host_is_heard_by_all(tmp_path, index):
    """JAX's own answer to SIGTERM, a service for preemption, would swallow it."""
    with two_hosts(tmp_path, [PROGRAM, "stop"]) as hosts:
        hosts.wait_until(lambda: all("ready" in hosts.said(i) for i in (0, 1)), 60)
        hosts.signal(index, signal.SIGTERM)
        assert hosts.codes(60) == [75, 75]
        reasons = ["", ""]
        reasons[index] = "SIGTERM"
        assert [lines(hosts, i) for i in (0, 1)] == [[f"agreed {reasons}"]] * 2


@slow
@pytest.mark.parametrize(
    ("how", "dead", "what"),
    [
        ("go on", 0, "parent"),
        ("go on", 1, "parent"),
        ("go on", 1, "child"),
        ("wait", 0, "child"),
        ("wait", 1, "parent"),
        ("go on", 0, "stopped"),
        ("go on", 1, "stopped"),
    ],
)
def test_a_dead_host_is_noticed(tmp_path, how, dead, what):
    """Killed, parent or child, or silent: within 30 s the other has said so in one line."""
    with two_hosts(tmp_path, [PROGRAM, how]) as hosts:
        hosts.wait_until(lambda: all("ready" in hosts.said(i) for i in (0, 1)), 60)
        child = hosts.child(dead)
        if what == "parent":
            hosts.signal(dead, signal.SIGKILL)
        else:
            os.kill(child, signal.SIGKILL if what == "child" else signal.SIGSTOP)
        seconds, code = hosts.seconds_until_end(1 - dead, 60)
        print(f"{how}, host {dead}, {what}: {seconds:.1f} s")
        assert code == 69 and seconds < WITHIN
        (line,) = lines(hosts, 1 - dead)
        again = "start the same command on all hosts again, it begins anew: no step was saved yet"
        assert line.startswith(f"error: host {dead} of 2 stopped answering; {again}")
        log = pathlib.Path(line.rsplit(" ", 1)[1].rstrip(")"))
        assert "JAX distributed service detected fatal errors" in log.read_text()
        if what == "child":
            assert hosts.seconds_until_end(dead, 5)[1] == 69
            assert f"error: host {dead} of 2 was ended by SIGKILL; {again}" in hosts.said(dead)
        if what == "parent":  # which took its child along
            assert not pathlib.Path(f"/proc/{child}/fd").exists() or state(child) == "Z"


def state(pid):
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
