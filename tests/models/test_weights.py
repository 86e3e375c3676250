"""Tensors from files to a mesh: layouts, types, and how a checkpoint may be broken."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from r1s_jax.models import hf, weights
from r1s_jax.models.decoder import abstract_params, init_params
from r1s_jax.sharding import MeshConfig, make_mesh, partition_spec
from r1s_jax.types import UserError
from tests import tiny
from tests.reads import counting

MODEL = dataclasses.replace(tiny.MODEL, rope_theta=5000.0, rms_norm_eps=1e-5)


@pytest.fixture(scope="module")
def params():
    """Parameters none of which is 0 or 1."""
    rng = np.random.default_rng(0)
    tree = init_params(MODEL, 0)
    return jax.tree.map(lambda p: p + rng.normal(0, 0.1, p.shape).astype(np.float32), tree)


def write(folder, params, **options):
    folder.mkdir()
    weights.save(folder, hf.keys(MODEL), params, dtype=np.float32, **options)
    return folder


@pytest.fixture()
def folder(tmp_path, params):
    """Weights of one's own in one file, to be damaged."""
    return write(tmp_path / "hf", params)


@pytest.fixture()
def shards(tmp_path, params):
    """The same in several files with an index."""
    return write(tmp_path / "shards", params, shard_bytes=9000)


def shard(folder, number):
    """The name of a shard."""
    return next(folder.glob(f"model-{number:05d}-of-*.safetensors")).name


def load(folder, mesh=None, dtype=jnp.float32, model=MODEL):
    return hf.load_params(folder, model, mesh or make_mesh(MeshConfig()), dtype)


def refused(folder, match, **options):
    """The message, which is one line."""
    with pytest.raises(UserError, match=match) as e:
        load(folder, **options)
    assert "\n" not in str(e.value)


def test_one_file_or_several(folder, shards, params):
    for kept in (folder, shards):
        jax.tree.map(np.testing.assert_array_equal, load(kept), params)
    (shards / "model.safetensors.index.json").unlink()  # some keep their shards without one
    jax.tree.map(np.testing.assert_array_equal, load(shards), params)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1), (8, 1, 1)])
def test_layout_over_a_mesh(folder, params, sizes):
    """Every parameter is laid out by its axes, and holds what it held."""
    mesh = make_mesh(MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]))
    sharded = load(folder, mesh)
    _, axes = abstract_params(MODEL)
    layouts = jax.tree.map(
        lambda p, a: p.sharding.spec == partition_spec(a) and len(p.sharding.device_set) == 8,
        sharded,
        axes,
    )
    assert all(jax.tree.leaves(layouts))
    jax.tree.map(np.testing.assert_array_equal, sharded, params)


def test_a_device_is_given_its_own_slices_only(folder, monkeypatch):
    """Each tensor is read once, in slices, however many devices hold a copy."""
    counted = counting()
    monkeypatch.setattr("safetensors.safe_open", counted)
    load(folder, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    whole = load_file(folder / "model.safetensors")
    for name, value in whole.items():
        sizes = counted.read[name]
        assert sum(sizes) == value.size, name
        assert len(sizes) == {1: 1 if "norm" in name else 2, 2: 4}[value.ndim], name


def test_mesh_that_does_not_divide(folder):
    """One line with the tensor and both numbers."""
    mesh = make_mesh(MeshConfig(tensor=3))
    refused(folder, r"k_proj.\w+ has 16 along 'kv_heads', not divisible by 3", mesh=mesh)


def test_types(folder):
    """Published checkpoints are bf16 or f16: they come in exactly; others are refused by name."""
    file = folder / "model.safetensors"
    original = load_file(file)
    for kept in (ml_dtypes.bfloat16, np.float16):
        rounded = {k: v.astype(kept) for k, v in original.items()}
        save_file(rounded, file)
        for dtype in (jnp.float32, jnp.bfloat16):
            got = load(folder, dtype=dtype)["layers"]["up_kernel"][1]
            wanted = rounded["model.layers.1.mlp.up_proj.weight"].astype(dtype)
            assert got.dtype == dtype
            np.testing.assert_array_equal(np.asarray(got).T, wanted)
    save_file({**original, "model.norm.weight": np.zeros(32, np.int8)}, file)
    refused(folder, r"model.norm.weight is of type I8, must be one of F32, BF16, F16$")


def test_a_tied_checkpoint_may_carry_the_head(folder):
    tied = dataclasses.replace(MODEL, tie_word_embeddings=True)
    assert "lm_head" not in load(folder, model=tied)


def without(tensors, name):
    del tensors[name]


def reshaped(tensors, name):
    tensors[name] = np.zeros((3, 5), np.float32)


def added(tensors, name):
    tensors[name] = np.zeros(3, np.float32)


@pytest.mark.parametrize(
    "damage, name, message",
    [
        (without, "model.norm.weight", r"missing model.norm.weight$"),
        (without, "lm_head.weight", r"missing lm_head.weight$"),
        (
            reshaped,
            "model.layers.1.self_attn.k_proj.weight",
            r"k_proj.weight is \[3, 5\], config.json says \[16, 32\]$",
        ),
        (added, "model.layers.0.self_attn.q_norm.weight", r"surplus .*q_norm.weight$"),
        (added, "model.layers.2.input_layernorm.weight", r"surplus model.layers.2"),
    ],
)
def test_tensors_that_do_not_fit(folder, damage, name, message):
    """Missing, misshapen and surplus tensors are named before anything is loaded."""
    tensors = load_file(folder / "model.safetensors")
    damage(tensors, name)
    save_file(tensors, folder / "model.safetensors")
    refused(folder, message)


def test_many_wrong_tensors_are_counted(folder):
    """A config that lies: three tensors are named, the rest is a number."""
    deeper = dataclasses.replace(MODEL, num_hidden_layers=3)  # 12 tensors more
    refused(folder, r"missing .*; missing .*; missing .* \(and 9 more\)$", model=deeper)
    wider = dataclasses.replace(MODEL, intermediate_size=64)
    refused(folder, r"down_proj.weight is \[32, 48\], config.json says \[32, 64\]", model=wider)
    endless = dataclasses.replace(MODEL, num_hidden_layers=10**9)
    refused(folder, r"config.json asks for 12000000003 tensors, 27 are there$", model=endless)


@pytest.mark.parametrize("cut", [1, 10_000])
def test_truncated_shard(shards, cut):
    """A download that broke off is told from a good one."""
    file = shards / shard(shards, 2)
    os.truncate(file, max(file.stat().st_size - cut, 0))
    refused(shards, rf"{file.name}: not a complete safetensors file")


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, r"hf: no \*.safetensors; download the model's weights into it$")


def test_wrong_index(shards):
    """An index that names a file that is not there, or another than holds the tensor."""
    path = shards / "model.safetensors.index.json"
    good = json.loads(path.read_text())

    def write_map(**changes):
        path.write_text(json.dumps({"weight_map": {**good["weight_map"], **changes}}))

    write_map(**{"model.norm.weight": "model-99.safetensors"})
    refused(shards, r"index.json: names model-99.safetensors, which is not there$")
    wrong = shard(shards, 1)
    write_map(**{"model.norm.weight": wrong})
    refused(shards, rf"index.json: says model.norm.weight is in {wrong}, it is in model-000\d\d-")
    write_map(**{"model.extra": wrong})
    refused(shards, rf"index.json: says model.extra is in {wrong}, it is in no file$")
    write_map(**{"model.extra": "../hf/model.safetensors"})
    refused(shards, r"index.json: not an index .*: a file in weight_map is no plain file name$")
    for text in ("{", "[]", '{"metadata": {}}', '{"weight_map": 3}'):
        path.write_text(text)
        refused(shards, r"index.json: not an index of safetensors shards: ")


def test_a_tensor_that_stands_twice(shards):
    (shards / "model.safetensors.index.json").unlink()
    first = shard(shards, 1)
    save_file(load_file(shards / first), shards / "more.safetensors")
    refused(shards, rf"stands twice, in {first} and more.safetensors$")


def test_shards_beside_a_single_file(shards, params):
    """transformers would read the single file; which of them is meant, nobody can know."""
    save_file(load_file(shards / shard(shards, 1)), shards / "model.safetensors")
    refused(shards, r"holds both model.safetensors and model.safetensors.index.json; remove the")
