"""Memory that is freed stays: no page of it is asked for twice."""

import os
import subprocess
import sys

import pytest

from r1s_jax.run.host_memory import keep_freed_memory

PROGRAM = """
import resource, sys
import numpy as np
from r1s_jax.run.host_memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

np.ones(2**24)  # 128 MB
before = faults()
for _ in range(5):
    np.ones(2**24)
print(faults() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_memory_is_not_asked_for_again():
    def faults(how: str) -> int:
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
        run = subprocess.run(
            [sys.executable, "-c", PROGRAM, how],
            capture_output=True,
            text=True,
            check=True,
            env=plain,
        )
        return int(run.stdout)

    assert faults("keep") < 100 < faults("as it is")


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()
