"""Two real processes of four devices each: who reads what, and one export that both bring about."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from r1s_jax.models import hf
from tests import tiny

pytestmark = pytest.mark.slow  # two processes that compile everything
CHILD = """
import json, sys
import jax
index, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
import safetensors
from r1s_jax.models import hf
from r1s_jax.models.families import read_config
from r1s_jax.sharding import MeshConfig, make_mesh
from tests.reads import counting

safetensors.safe_open = counted = counting()
mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
config = read_config(folder + "/in")
params = hf.load_params(folder + "/in", config, mesh)
options = {"eos_ids": (1,), "pad_id": 1, "dtype": "float32", "shard_bytes": 9000}
hf.export(folder + "/out", config, params, source=folder + "/in", **options)
print(json.dumps({name: sum(sizes) for name, sizes in counted.read.items()}), flush=True)
jax.distributed.shutdown()
"""


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """(the folder, what each process read as name -> numbers)."""
    folder = tmp_path_factory.mktemp("hosts")
    tiny.fast_tokenizer().save_pretrained(folder / "tokenizer")
    options = {"eos_ids": (1,), "pad_id": 1, "dtype": "float32"}
    hf.export(folder / "in", tiny.MODEL, tiny.params(), source=folder / "tokenizer", **options)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = "--xla_force_host_platform_device_count=4"
    root = str(pathlib.Path(__file__).parents[2])
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": root}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(index), str(port), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    ends = [process.communicate(timeout=180) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    return folder, [json.loads(out.splitlines()[-1]) for out, _ in ends]


def test_each_host_reads_what_its_devices_hold(played):
    """fsdp runs over the hosts: half of every kernel each; what is whole everywhere, both."""
    folder, read = played
    for name, value in load_file(folder / "in/model.safetensors").items():
        # the width of the model is split over fsdp, and so over the hosts; biases and norms are not
        share = 2 if value.ndim == 2 else 1
        assert [host[name] for host in read] == [value.size // share] * 2, name


def test_one_export_by_both(played):
    """Every tensor bit for bit, in shards that process 0 wrote."""
    folder, _ = played
    shards = sorted((folder / "out").glob("*.safetensors"))
    assert len(shards) > 3
    back = {name: value for file in shards for name, value in load_file(file).items()}
    first = load_file(folder / "in/model.safetensors")
    assert back.keys() == first.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, back[name])
    assert sorted(p.name for p in folder.iterdir()) == ["in", "out", "tokenizer"]
