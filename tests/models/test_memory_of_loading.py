"""What loading takes beside the parameters, measured by the kernel in a process of its own."""

import subprocess
import sys

import pytest

import launch


@pytest.mark.slow
def test_two_layers_of_a_7b(tmp_path):
    """At most twice the largest tensor, and every tensor comes back bit for bit.

    The benchmark itself, with two of the 28 layers; the whole is in benchmarks/models.md.
    """
    script = str(launch.ROOT / "benchmarks" / "models.py")
    command = [sys.executable, script, "--folder", str(tmp_path), "--layers", "2"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if said.startswith("skipped"):
        pytest.skip(said.strip())
    rows = (line.strip("| ").split(" | ") for line in said.splitlines() if line.startswith("|"))
    figures = {row[0]: row[1] for row in rows if len(row) == 2}
    assert 0 < float(figures["the same in largest tensors (at most 2)"]) <= 2
    assert figures["tensors that came back with other bits"] == "0.00"
    assert float(figures["tensors"]) == 27
