"""Rollouts of two real processes of four devices each (invariants 7 and 11).

`host_program` is what each of them runs; here both are started, ended, and compared.
"""

import dataclasses
import functools
import os
import pathlib
import pickle
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from tests import tiny
from tests.rollout import host_program
from tests.turns import assert_same_trajectories

pytestmark = pytest.mark.slow  # pairs of processes that compile everything
MAIN = "import sys; from tests.rollout import host_program as p; p.main({}, {}, {!r}, {})"
# Seconds; where a host waits for another that never comes, both are ended by then.
LONGEST = 900


def run_hosts(programs, folder, longest=LONGEST):
    """Runs Python texts side by side; RuntimeError, and all are killed, when one fails or hangs."""
    given = os.environ["XLA_FLAGS"]
    environment = {
        **os.environ,
        "XLA_FLAGS": given.replace("platform_device_count=8", "platform_device_count=4"),
        "PYTHONPATH": str(pathlib.Path(__file__).parents[2]),
        "JAX_CPU_ENABLE_ASYNC_DISPATCH": "0",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    logs = [folder / f"{i}.log" for i in range(len(programs))]
    hosts = []
    try:
        for program, log in zip(programs, logs, strict=True):
            command = [sys.executable, "-c", program]
            with open(log, "wb") as out:
                hosts.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out))
        end = time.monotonic() + longest
        codes = [None]
        while None in codes and not any(codes) and time.monotonic() < end:
            time.sleep(0.05)
            codes = [host.poll() for host in hosts]
    finally:
        for host in hosts:  # JAX takes a SIGTERM for a notice of preemption
            host.kill()
            host.wait()
    if any(code != 0 for code in codes):
        told = "\n".join(log.read_text(errors="replace")[-3000:] for log in logs)
        raise RuntimeError(f"exit codes {codes} (None: killed)\n{told}")


def played_by_two(folder, repeats):
    """Both hosts' reports."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_hosts([MAIN.format(i, port, str(folder), repeats) for i in range(2)], folder)
    return [pickle.loads((folder / f"{i}.pickle").read_bytes()) for i in range(2)]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    return played_by_two(tmp_path_factory.mktemp("hosts"), (3, 0))


@functools.cache
def alone(mesh=host_program.DATA):
    """The same rollout by one process with all eight devices."""
    return host_program.play(tiny.new_engine(mesh=mesh, **host_program.SHAPES))


def by_key(result):
    return {(t.question.id, t.sample): t for g in result.groups for t in g.trajectories}


def assert_same(result, expected, keys=None):
    """Bit for bit: ids, sources, log-probs, searches and stop reason."""
    got, expected = by_key(result), by_key(expected)
    assert list(got) == [k for k in expected if keys is None or k in keys]
    assert_same_trajectories(got, expected)


def both(reports, name):
    """What was played under a name: by the first host, once the second's is seen to be equal."""
    first, second = (report["played"][name] for report in reports)
    for one, other in zip(first, second, strict=True):
        assert_same(one, other)
        # All but the trajectories: seconds, counts of tokens and of failures.
        assert dataclasses.replace(one, groups=()) == dataclasses.replace(other, groups=())
    return first


def test_one_process_is_worth_comparing_with():
    searches = [len(t.searches) for t in by_key(alone()).values()]
    assert len(searches) == 20 and sum(searches) >= 8 and max(searches) == 2
    assert len({t.stop_reason for t in by_key(alone()).values()}) >= 4


def test_retrieval_delays_of_each_host_do_not_matter(hosts):
    """Invariant 11: two hosts, whatever their delays, play what one process plays, to the bit.

    Bug: hosts whose devices had different memory made caches of different sizes.
    """
    played = both(hosts, "late")
    assert len(played) == 3
    for result in played:
        assert_same(result, alone())
    # The pages of the host that has less, fewer than all slots could use.
    one = tiny.new_engine(mesh=host_program.DATA, **host_program.SHAPES)
    assert hosts[0]["pages"] == hosts[1]["pages"] < one.plan.pages


def test_a_host_without_questions(hosts):
    (result,) = both(hosts, "one question")
    keys = {("a", sample) for sample in range(host_program.SAMPLES)}
    assert_same(result, alone(), keys)


def test_a_host_that_is_done_long_before_the_other(hosts):
    (result,) = both(hosts, "one is slow")
    assert_same(result, alone())
    assert hosts[1]["end"] - hosts[0]["end"] > 0.3  # one more search, and nothing else to do


def test_a_host_whose_retriever_fails(hosts):
    """The episodes of its questions that ask are left out on both hosts; all else is the same."""
    (result,) = both(hosts, "one fails")
    theirs = [q.id for q in tiny.QUESTIONS[1::2]]
    lost = {k for k, t in by_key(alone()).items() if k[0] in theirs and t.searches}
    assert result.failed == len(lost) > 0 and result.failure == "down"
    assert_same(result, alone(), by_key(alone()).keys() - lost)


def test_nothing_compiles_after_warm_up(hosts):
    """Bug: what the hosts told each other at the end was a program for each length of it."""
    assert [report["compiled"] for report in hosts] == [0, 0]


def test_what_hosts_tell_each_other_may_be_long(hosts):
    """Several pieces, of another number on each host."""
    for report in hosts:
        assert report["long"] == [({0}, 600_000), ({1}, 1_200_000)]


def test_a_prompt_that_is_too_long_is_refused_by_all(hosts):
    """Both the host whose question it is and the other, which would else wait for it."""
    for report in hosts:
        assert report["refused"].startswith("question 'long': its prompt has ")
        assert report["idle"]


def test_hosts_that_cannot_go_on_say_so(hosts):
    """Bug: with several hosts they went round for ever."""
    for report in hosts:
        assert report["stuck"] == "no episode can go on, and none waits for a search"
        assert report["idle"]


@pytest.mark.parametrize(
    ("other", "told"),
    [("raise SystemExit(3)", "[None, 3]"), ("import time; time.sleep(60)", "[None, None]")],
)
def test_a_host_that_waits_for_a_failed_one_is_ended(tmp_path, other, told):
    """The rest of this file cannot hang."""
    started = time.monotonic()
    with pytest.raises(RuntimeError) as e:
        run_hosts(["import time; time.sleep(60)", other], tmp_path, longest=2)
    assert told in str(e.value) and time.monotonic() - started < 30


@pytest.fixture(scope="module")
def hosts_often(tmp_path_factory):
    return played_by_two(tmp_path_factory.mktemp("often"), (20, 20))


def test_twenty_times(hosts_often):
    """20 rollouts, each with other delays on each host, are one."""
    played = both(hosts_often, "late")
    assert len(played) == 20
    for result in played:
        assert_same(result, alone())


def test_twenty_times_with_lanes_of_two_devices(hosts_often):
    """2x2x2 devices; also with weights that came from a learner split over the hosts.

    Against one process with the same mesh to the bit, against other meshes as invariant 7 says.
    """
    played = both(hosts_often, "tensor") + both(hosts_often, "split")
    assert len(played) == 21
    one = alone(host_program.TENSOR)
    for result in played:
        assert_same(result, one)
    assert_nearly_same(one)


def test_hosts_whose_devices_take_turns(hosts_often):
    """Whose lanes are not next to each other: each still gets its own."""
    (result,) = both(hosts_often, "in turns")
    assert_same(result, alone())


def assert_nearly_same(result):
    got, expected = by_key(result), by_key(alone())
    same = [k for k in expected if np.array_equal(got[k].token_ids_T, expected[k].token_ids_T)]
    assert len(same) >= len(expected) - 1
    for key in same:
        np.testing.assert_allclose(got[key].logprobs_T, expected[key].logprobs_T, atol=1e-5, rtol=0)
