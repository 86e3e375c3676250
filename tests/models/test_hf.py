"""Folders out and in again: what transformers sees, what comes back, and what may go wrong."""

import json
import resource
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from r1s_jax.models import hf
from r1s_jax.models.families import read_config
from r1s_jax.sharding import MeshConfig, make_mesh
from r1s_jax.types import UserError
from tests import hf_models, tiny

TOKENS = np.random.default_rng(1).integers(0, hf_models.SIZES["vocab_size"], (2, 11))


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.fast_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=hf_models.KINDS)
def original(request, tmp_path_factory):
    """(kind, folder) of a checkpoint that transformers wrote, dressed up as published ones are."""
    folder = hf_models.save(request.param, tmp_path_factory.mktemp(request.param) / "original")
    tiny.fast_tokenizer().save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "LICENSE").write_text("as you like")
    generation = {"eos_token_id": [5, 6], "pad_token_id": 5, "top_p": 0.7}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "max_window_layers": 28}))
    return request.param, folder


def one_device():
    return make_mesh(MeshConfig())


def again(source, out, *, dtype=jnp.float32, mesh=None, **options):
    """Loads `source` and exports it to `out`."""
    config = read_config(source)
    params = hf.load_params(source, config, mesh or one_device(), dtype)
    return hf.export(
        out, config, params, source=source, eos_ids=(1,), pad_id=1, dtype=dtype, **options
    )


def test_what_transformers_loads(original, tmp_path):
    """An exported folder is the original model: no key missing, the same logits, nothing lost."""
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    kind, folder = original
    out = again(folder, tmp_path / "out", card="# A card\n")
    model, info = AutoModelForCausalLM.from_pretrained(
        out, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.float32
    with torch.no_grad():
        tokens = torch.from_numpy(TOKENS)
        np.testing.assert_array_equal(
            model.eval()(tokens).logits, hf_models.model(kind)(tokens).logits
        )
    assert model.generation_config.eos_token_id == [5, 6] and model.generation_config.top_p == 0.7
    raw = [json.loads((f / "config.json").read_text()) for f in (folder, out)]
    assert raw[1].pop("torch_dtype") == raw[0].pop("dtype") == "float32" and raw[0] == raw[1]
    names = {"README.md"} | {p.name for p in folder.iterdir()}
    assert {p.name for p in out.iterdir()} == names
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "generation_config.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    text = "x<|end_of_query|>\n ü"
    # Not AutoTokenizer, which rebuilds a Qwen2 tokenizer with Qwen2's own splitting rules.
    theirs = PreTrainedTokenizerFast.from_pretrained(out).encode(text)
    assert theirs == tiny.tokenizer().encode(text)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_load_export_load_is_bit_exact(original, tmp_path, dtype):
    """From one device to 2x2x2 and back, in several shards; every tensor bit for bit."""
    _, folder = original
    whole = again(folder, tmp_path / "whole", dtype=dtype)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    split = again(whole, tmp_path / "split", dtype=dtype, mesh=mesh, shard_bytes=9000)
    files = sorted(split.glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    back = {name: value for file in files for name, value in load_file(file).items()}
    first = load_file(whole / "model.safetensors")
    assert back.keys() == first.keys() == load_file(folder / "model.safetensors").keys()
    for name, value in first.items():
        assert value.dtype == back[name].dtype == dtype
        np.testing.assert_array_equal(value, back[name])
        original_value = load_file(folder / "model.safetensors")[name]
        np.testing.assert_array_equal(value, original_value.astype(dtype))


def test_shards_load_in_transformers(original, tmp_path):
    """Shards, their index and bf16, the default, are what transformers writes itself."""
    from transformers import AutoModelForCausalLM

    kind, folder = original
    config = read_config(folder)
    out = hf.export(
        tmp_path / "out",
        config,
        hf.load_params(folder, config, one_device()),
        source=folder,
        eos_ids=(1,),
        pad_id=1,
        shard_bytes=9000,
    )
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    for name, value in hf_models.model(kind).state_dict().items():
        assert torch.equal(model.state_dict()[name], value.bfloat16()), name
    total = json.loads((out / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    assert total == sum(v.nbytes for f in out.glob("*.safetensors") for v in load_file(f).values())


def test_a_source_that_is_only_a_tokenizer(tokenizer_folder, tmp_path):
    """A policy made here has no config.json to take over: it gets one of its own."""
    folder = hf.export(
        tmp_path / "hf",
        tiny.MODEL,
        tiny.params(),
        source=tokenizer_folder,
        eos_ids=(289, 290),
        pad_id=289,
        dtype=jnp.float32,
    )
    assert read_config(folder) == tiny.MODEL
    assert json.loads((folder / "generation_config.json").read_text()) == {
        "eos_token_id": [289, 290],
        "pad_token_id": 289,
    }
    back = hf.load_params(folder, tiny.MODEL, one_device())
    assert jax.tree.structure(back) == jax.tree.structure(tiny.params())
    jax.tree.map(np.testing.assert_array_equal, back, tiny.params())


def test_export_replaces_a_folder_whole(tokenizer_folder, tmp_path):
    """A second export leaves exactly its own files, and no part or old folder behind."""
    folder, files = tmp_path / "hf", {"eos_ids": (1,), "pad_id": 1, "source": tokenizer_folder}
    for _ in range(2):
        hf.export(folder, tiny.MODEL, tiny.params(), shard_bytes=9000, **files)
        assert not (folder / "stale.txt").exists()
        (folder / "stale.txt").write_text("x")
    hf.export(folder, tiny.MODEL, tiny.params(), **files)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]
    assert [p.name for p in folder.glob("model*")] == ["model.safetensors"]


def test_an_export_that_cannot_be_finished(tokenizer_folder, tmp_path):
    """A disk that is full in the middle: one line, and the export before stands as it stood.

    The limit on a file's size makes the system refuse a write half way through the weights.
    """
    folder, files = tmp_path / "hf", {"eos_ids": (1,), "pad_id": 1, "source": tokenizer_folder}
    hf.export(folder, tiny.MODEL, tiny.params(), **files)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, old[1]))
    try:
        with pytest.raises(UserError, match=r"hf: cannot be written: File too large$") as e:
            hf.export(folder, tiny.MODEL, tiny.params(), **files)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "\n" not in str(e.value)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


@pytest.mark.slow
def test_an_export_killed_in_the_middle(tokenizer_folder, tmp_path):
    """What SIGKILL leaves behind does not load, and the next export clears it away."""
    script = (
        "import os, signal, sys; from r1s_jax.models import hf, weights; from tests import tiny\n"
        "write = weights._write\n"
        "def die(path, *rest):\n"
        "    write(path, *rest)\n"
        "    if '00003' in path.name: os.kill(os.getpid(), signal.SIGKILL)\n"
        "weights._write = die\n"
        "hf.export(sys.argv[1], tiny.MODEL, tiny.params(), source=sys.argv[2], eos_ids=(1,),"
        " pad_id=1, shard_bytes=9000)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "hf"), str(tokenizer_folder)]
    assert subprocess.run(command, capture_output=True).returncode == -9
    (part,) = tmp_path.iterdir()
    assert part.name.endswith(".part")
    assert len(list(part.glob("model-*.safetensors"))) == 3
    for folder in (tmp_path / "hf", part):
        with pytest.raises(UserError, match=r"config.json: not found"):
            read_config(folder)
    files = {"eos_ids": (1,), "pad_id": 1, "source": tokenizer_folder}
    hf.export(tmp_path / "hf", tiny.MODEL, tiny.params(), **files)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_a_failure_at_the_very_end_brings_the_old_export_back(tokenizer_folder, tmp_path):
    """Bug: the export before was set aside and lost where the new one could not take its place."""
    folder, files = tmp_path / "hf", {"eos_ids": (1,), "pad_id": 1, "source": tokenizer_folder}
    hf.export(folder, tiny.MODEL, tiny.params(), **files)
    with pytest.raises(OSError):
        hf._replace(folder, tmp_path / "absent")
    assert read_config(folder) == tiny.MODEL
    folder.rename(tmp_path / "hf.old")  # as a kill between the two renames leaves it
    hf._clear_up(folder)
    assert read_config(folder) == tiny.MODEL
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_a_source_without_a_tokenizer_is_refused(tmp_path):
    """Bug: with its source gone, a policy was exported without a tokenizer, and without a word."""
    options = {"eos_ids": (1,), "pad_id": 1, "source": tmp_path / "gone"}
    with pytest.raises(UserError, match=r"gone: holds no tokenizer.json, which the export takes"):
        hf.export(tmp_path / "hf", tiny.MODEL, tiny.params(), **options)
    assert list(tmp_path.iterdir()) == []
