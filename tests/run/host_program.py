"""What `test_hosts` runs on each of two hosts: nothing but to meet, agree, and end in some way."""

import sys
import time

import jax

from r1s_jax.rollout.hosts import from_all_hosts, from_first_host
from r1s_jax.run import hosts
from r1s_jax.run.preemption import StopFlag
from r1s_jax.types import UserError
from tests.two_hosts import be_a_host


def end(index, how):
    if how == "error at once" and index == 1:
        raise UserError("what.gin:3: no such thing")
    assert from_all_hosts(index) == [0, 1]
    if how == "agree":
        assert from_first_host(lambda: ("host", index)) == ("host", 0)
        assert jax.process_count() == 2 and jax.device_count() == 8
        time.sleep(3 * index)  # the other waits at the end
    elif how == "differ":
        hosts.require_same({"seed": "1", "rate": f"0.{index}"})
    elif how == "75":
        return 75
    elif how == "stop":
        with StopFlag() as stop:
            print("ready", flush=True)
            while not any(reasons := from_all_hosts(stop.reason)):
                time.sleep(0.1)
            print(f"agreed {reasons}")
        return 75
    elif how == "go on":
        print("ready", flush=True)
        while True:
            from_all_hosts(None)
            time.sleep(0.1)
    elif how == "wait":  # in no collective
        print("ready", flush=True)
        time.sleep(600)
    elif index == 0:  # the other fails meanwhile
        from_all_hosts("nobody answers")
    elif how == "error":
        raise UserError("disk full")
    elif how == "bug":
        raise ZeroDivisionError("1/0")
    elif how == "interrupt":
        raise KeyboardInterrupt
    return 0


if __name__ == "__main__":
    sys.exit(be_a_host(end, "how"))
