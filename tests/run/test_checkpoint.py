"""Checkpoints: bit-exact round trips, atomic steps, and mistakes in one line."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from r1s_jax.run.checkpoint import Checkpointer
from r1s_jax.run.compiles import CompileCounter
from r1s_jax.types import UserError


def sharding(*axes):
    return NamedSharding(jax.make_mesh((2, 4), ("data", "fsdp")), P(*axes))


def make(width=8, seed=0):
    params = {
        "embed": jax.random.normal(jax.random.key(seed), (width, 4)),
        "norm": jnp.ones((4,), jnp.bfloat16),
    }
    params["embed"] = jax.device_put(params["embed"], sharding("fsdp"))
    params["norm"] = jax.device_put(params["norm"], sharding())
    return {"params": params, "optimizer": optax.adam(1e-3).init(params)}


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert left.dtype == right.dtype
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


def test_a_relative_directory_is_taken_from_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Checkpointer("runs/c") as checkpoints:
        checkpoints.save(1, make(), {})
        checkpoints.wait()
    assert [p.name for p in (tmp_path / "runs" / "c").iterdir()] == ["1"]


def test_round_trip_is_exact_and_keeps_the_last(tmp_path):
    tree = make()
    with Checkpointer(tmp_path / "c", keep=2) as checkpoints:
        assert checkpoints.latest_step() is None
        for step in (1, 2, 5):
            checkpoints.save(step, tree, {"data": {"position": step}, "rate": 0.1})
        checkpoints.wait()
        assert checkpoints.latest_step() == 5
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["2", "5"]
    with Checkpointer(tmp_path / "c") as checkpoints:
        step, arrays, host = checkpoints.restore(abstract(tree))
        assert (step, host) == (5, {"data": {"position": 5}, "rate": 0.1})
        assert_same(arrays, tree)
        assert arrays["params"]["embed"].sharding == tree["params"]["embed"].sharding
        assert checkpoints.read_host(2) == {"data": {"position": 2}, "rate": 0.1}
        assert checkpoints.restore(abstract(tree), step=2)[0] == 2


def test_restores_onto_another_mesh(tmp_path):
    tree = make()
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, tree, {})
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), tree)
        arrays = checkpoints.restore(wanted)[1]
        assert arrays["params"]["embed"].sharding == one
        assert_same(arrays, tree)


def test_a_save_compiles_nothing(tmp_path):
    """Bug: arrays that several devices hold were cut into slices by programs of the first save."""
    tree, counter = make(), CompileCounter()
    assert not tree["params"]["embed"].sharding.is_fully_replicated
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, tree, {})
        checkpoints.wait()
        counter.close()
        assert counter.count == 0
        assert_same(checkpoints.restore(abstract(tree))[1], tree)


def test_arrays_may_be_donated_while_they_are_written(tmp_path):
    tree = {"w": jnp.ones((1024, 1024))}
    before = np.array(tree["w"])
    update = jax.jit(lambda t: jax.tree.map(lambda x: x * -3.0, t), donate_argnums=0)
    with Checkpointer(tmp_path) as checkpoints:
        wanted = abstract(tree)
        checkpoints.save(1, tree, {})
        for _ in range(3):
            tree = update(tree)
        jax.block_until_ready(tree)
        np.testing.assert_array_equal(checkpoints.restore(wanted)[1]["w"], before)


WRITER = """
import sys, jax.numpy as jnp
from r1s_jax.run.checkpoint import Checkpointer
checkpoints = Checkpointer(sys.argv[1])
tree = lambda step: {"w": jnp.full((256, 1024), step, jnp.float32)}
checkpoints.save(1, tree(1), {"step": 1})
checkpoints.wait()
print("first", flush=True)
for step in range(2, 1000):
    checkpoints.save(step, tree(step), {"step": step})
"""


def test_kill_in_the_middle_leaves_a_whole_step(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=env
    )
    assert process.stdout is not None and process.stdout.readline() == "first\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (tmp_path / "2000.orbax-checkpoint-tmp" / "arrays").mkdir(parents=True)  # half-written
    (tmp_path / "2000.orbax-checkpoint-tmp" / "arrays" / "d").write_text("half")
    wanted = {"w": jax.ShapeDtypeStruct((256, 1024), jnp.float32, sharding=sharding())}
    with Checkpointer(tmp_path) as checkpoints:
        step, arrays, host = checkpoints.restore(wanted)
        assert step == checkpoints.latest_step() == host["step"] < 2000
        np.testing.assert_array_equal(arrays["w"], np.full((256, 1024), step))
        checkpoints.save(step + 1, arrays, {})
    assert not [p for p in tmp_path.iterdir() if "tmp" in p.name]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: make(width=16), "params.embed is float32[8,4] in the checkpoint and float32[16"),
        (lambda t: {**t, "more": t["params"]["norm"]}, "more is absent in the checkpoint and bfl"),
        (lambda t: {"params": t["params"]}, "and absent in this run"),
    ],
)
def test_another_architecture_is_one_line(tmp_path, change, words):
    tree = make()
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(3, tree, {})
        with pytest.raises(UserError) as caught:
            checkpoints.restore(abstract(change(tree)))
    assert str(caught.value).startswith(f"{tmp_path}/3: ") and "\n" not in str(caught.value)
    assert words in str(caught.value)


def test_absent_steps_and_directories(tmp_path):
    with pytest.raises(UserError, match="no such checkpoint directory"):
        Checkpointer(tmp_path / "none", read_only=True)
    assert not (tmp_path / "none").exists()
    with Checkpointer(tmp_path) as checkpoints:
        with pytest.raises(UserError, match="holds no checkpoint"):
            checkpoints.restore({})
        checkpoints.save(3, make(), {})
        with pytest.raises(UserError, match=r"holds no step 4, only \[3\]"):
            checkpoints.read_host(4)
        with pytest.raises(ValueError, match="step 3 is not after step 3"):
            checkpoints.save(3, make(), {})


@pytest.mark.parametrize("item", ["arrays", "host"])
def test_damaged_files_are_one_line(tmp_path, item):
    """Bug: Orbax's own errors came through."""
    tree = make()
    with Checkpointer(tmp_path / "c") as checkpoints:
        checkpoints.save(3, tree, {"x": 1})
    for path in (tmp_path / "c" / "3" / item).iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    words = rf"/3: is damaged, its {item} cannot be read"
    with Checkpointer(tmp_path / "c") as checkpoints, pytest.raises(UserError, match=words):
        checkpoints.restore(abstract(tree))


def test_reader_beside_a_writer_tidies_nothing(tmp_path):
    with Checkpointer(tmp_path) as writer:
        writer.save(1, make(), {"a": 1})
        writer.wait()
        (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
        with Checkpointer(tmp_path, read_only=True) as reader:
            assert reader.read_host() == {"a": 1}
            assert_same(reader.restore(abstract(make()))[1], make())
        assert (tmp_path / "2.orbax-checkpoint-tmp").exists()


def test_quiet(tmp_path, capfd):
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, make(), {})
        checkpoints.restore(abstract(make()))
    assert capfd.readouterr() == ("", "")
