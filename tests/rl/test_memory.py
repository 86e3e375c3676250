"""What the learner takes: exact where it is a sum of arrays, else above what compilers say."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import launch
from r1s_jax.aot.slices import find_shape, slice_devices
from r1s_jax.models.decoder import init_params
from r1s_jax.models.lora import LoraConfig
from r1s_jax.rl.algorithm import AlgorithmConfig
from r1s_jax.rl.config import LearnerConfig
from r1s_jax.rl.learner import Learner
from r1s_jax.rl.memory import learner_bytes, local_bytes
from r1s_jax.sharding import MeshConfig, make_mesh
from tests import tiny
from tests.libtpu import libtpu  # noqa: F401

CONFIG = LearnerConfig(rows=4, row_tokens=256)
WITH_KL = dataclasses.replace(CONFIG, algorithm=AlgorithmConfig(kl_weight=1e-3))
ADAPTERS = dataclasses.replace(
    WITH_KL, lora=LoraConfig(rank=4, alpha=8.0), compute_dtype="bfloat16"
)
HALF = dataclasses.replace(CONFIG, first_moment_dtype="bfloat16")


def on_first_device(tree):
    """Bytes of a tree of arrays on one device, as they lie there."""
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("config", [CONFIG, WITH_KL, HALF, ADAPTERS])
def test_what_is_kept_is_what_a_learner_holds(config):
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    found = learner_bytes(tiny.MODEL, config, mesh)
    policy = init_params(tiny.MODEL, 0)
    learner = Learner(tiny.MODEL, config, mesh=mesh, params=policy, temperature=1.0, pad_id=0)
    assert found.params == on_first_device(learner.state.params)
    assert found.moments == on_first_device(learner.state.opt_state)
    assert found.reference == on_first_device(learner.reference)
    assert (found.base > 0) == (found.merged > 0) == (config.lora is not None)
    if config.lora is None:
        assert found.policy == found.params
    else:
        assert found.base == found.merged == on_first_device(learner.policy())
    kept = found.params + found.moments + found.reference + found.base
    assert found.kept == kept and found.peak == kept + found.working


def test_local_bytes_are_those_of_a_shard():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    spec = jax.sharding.PartitionSpec("fsdp", ("tensor",))
    split = jax.sharding.NamedSharding(mesh, spec)
    x = jax.ShapeDtypeStruct((8, 6), jnp.bfloat16, sharding=split)
    assert local_bytes({"a": x, "b": [x]}) == 2 * 2 * 3 * 2
    assert local_bytes(None) == 0


def test_what_is_worked_with_grows_with_rows_and_with_what_is_kept_of_layers():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))

    def working(**more):
        return learner_bytes(tiny.MODEL, dataclasses.replace(CONFIG, **more), mesh).working

    assert working(remat="full") < working(remat="dots") < working(remat="none")
    once, twice, thrice = (working(rows=4 * n) for n in (1, 2, 3))
    assert once < twice and twice - once == pytest.approx(thrice - twice, rel=0.2)


# What the compiler said of the gradient's program: libtpu 0.0.42, stage2 on 23 November 2026, GB.
COMPILED = [
    ("v5e:8x8", "qwen2_5_7b", 1, "full", 7.16),
    ("v6e:4x4", "qwen2_5_7b", 1, "full", 10.14),
    ("v5p:2x2x2", "qwen2_5_7b", 1, "full", 15.01),
    ("v5p:2x2x2", "qwen2_5_7b", 4, "full", 12.55),
    ("v5p:2x2x2", "qwen2_5_7b", 4, "dots", 18.61),
    ("v5p:4x4x4", "qwen2_5_32b", 1, "full", 18.45),
]


@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize(("topology", "model", "tensor", "remat", "gigabytes"), COMPILED)
def test_what_is_worked_with_is_no_less_than_compiled(topology, model, tensor, remat, gigabytes):
    """And not half as much again: what is reserved for nothing is missing in the cache."""
    stage2 = launch.load_config("stage2").value
    shape, _ = find_shape(stage2, model)
    devices = slice_devices(topology)
    shards = len(devices) // tensor
    mesh = make_mesh(MeshConfig(fsdp=shards, tensor=tensor), devices)
    config = dataclasses.replace(stage2.learner, rows=shards, remat=remat)
    assert 1 <= learner_bytes(shape, config, mesh).working / (gigabytes * 1e9) < 1.5
