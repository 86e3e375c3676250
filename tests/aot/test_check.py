"""The compile check: what fits, and how it refuses; on CPU devices but for one."""

import dataclasses
import functools
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

import launch
from r1s_jax.aot import check as aot_check
from r1s_jax.aot import roofline, slices
from r1s_jax.aot.engine_programs import least_step_bytes
from r1s_jax.engine import plan as memory
from r1s_jax.engine.compiled import Programs
from r1s_jax.engine.state import EngineConfig
from r1s_jax.models.decoder import abstract_params
from r1s_jax.models.encoder import abstract_encoder, read_encoder_config
from r1s_jax.models.families import config_json
from r1s_jax.run.config import PolicyConfig
from r1s_jax.sharding import MeshConfig, lane_mesh, make_mesh, named_sharding
from r1s_jax.types import UserError
from tests import tiny

SCRIPT = launch.ROOT / "tpu_scripts" / "compile_check.py"
MODEL = dataclasses.replace(tiny.MODEL, max_position_embeddings=384)
CHIP = roofline.Chip(
    name="toy",
    hbm_bytes=10**9,
    bytes_per_second=1e9,
    flops_per_second=1e12,
    links_per_second=1e8,
)


# ---------------------------------------------------------------- a run's programs

TINY = launch.load_config(
    "tiny",
    [
        "engine.EngineConfig.rows = 4",
        "engine.EngineConfig.extend_rows = 2",
        "learner.LearnerConfig.scan_layers = True",
    ],
).value


@pytest.fixture
def four_devices(monkeypatch):
    """A slice of four CPU devices whose chip holds what the caller says."""
    monkeypatch.setattr(slices, "slice_devices", lambda _: jax.devices()[:4])

    def holds(size):
        chip = dataclasses.replace(CHIP, hbm_bytes=size)
        monkeypatch.setitem(slices.CHIPS, "cpu", chip)

    return holds


@pytest.mark.slow
def test_a_run_that_fits_and_ones_that_do_not(four_devices, tmp_path, capsys, monkeypatch):
    """Exit codes 0 and 1: the same programs on chips of three sizes."""
    (tmp_path / "config.json").write_text(json.dumps(config_json(MODEL, (0,), 0)))
    check = functools.partial(aot_check.check, TINY, topology="toy:2x2", model=str(tmp_path))
    four_devices(10**9)
    real, made = aot_check.compile_phases, []

    def compiled(*args, **more):
        made.append(real(*args, **more))
        return made[0]

    monkeypatch.setattr(aot_check, "compile_phases", compiled)
    assert check() == 0
    out, err = capsys.readouterr()
    assert not err
    assert "Learner: mesh data 1 x fsdp 4 x tensor 1, 8 rows of 384 tokens a micro-batch" in out
    assert "Engine: 4 copies of the policy on 1 chips each;" in out
    words = "rows 16, extend_rows 8 of 32 tokens, page 64, context 384, float32. 96 live tokens"
    assert words in out
    programs, found = (tabled(part) for part in out[out.index("|") :].split("\n\n")[:2])
    assert list(programs) == [
        "extend (prompts and documents)", "insert (a page copied)", "decode_chunk (a step)",
        "reshard (one of 2 layers)", "reshard (embedding)", "reshard (lm_head)",
        "score (a micro-batch)", "gradient (a micro-batch)", "optimizer step",
    ]  # fmt: skip
    tokens, ratio = programs["decode_chunk (a step)"][-2:]
    assert int(tokens.replace(",", "")) > 0 and float(ratio) > 1
    assert list(found) == [
        "start", "resume", "push", "rollout", "score", "**gradient**", "optimizer step", "save",
    ]  # fmt: skip
    assert found["score"][4] == "score (a micro-batch)" and found["save"][4] == "–"
    # A program that needs more than the plan knows of.
    costs = made[0]

    def needing_more(*_, **__):
        (step,) = costs["optimizer step"]
        return costs | {"optimizer step": [dataclasses.replace(step, temporary_bytes=10**9)]}

    monkeypatch.setattr(aot_check, "compile_phases", needing_more)
    assert check() == 1
    out, err = capsys.readouterr()
    assert err.startswith("optimizer step does not fit: 1.0")
    assert err.endswith(" most of it optimizer step, on a toy chip with 1.00 GB\n")
    assert err.count("\n") == 1 and "| **optimizer step** |" in out
    four_devices(2 * 10**5)
    assert check() == 1
    out, err = capsys.readouterr()
    assert "|" not in out
    assert err.startswith("the engine does not fit: engine.context = 384: one episode needs")


def tabled(text):
    """First cell -> the others, of a Markdown table."""
    rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:])
    return {first: cells for first, *cells in rows}


def test_least_bytes_of_a_step():
    """Qwen2.5-7B on four chips of v5e: 16 rows of 2,048 tokens, counted by hand."""
    model, _ = slices.find_shape(launch.load_config("stage2").value, None)
    assert model.num_hidden_layers == 28 and model.attention_bias
    lanes = lane_mesh(make_mesh(MeshConfig(fsdp=2, tensor=4)), 4)
    config = EngineConfig(rows=32, context=8192, extend_rows=2)
    plan = memory.plan_memory(model, config, lanes, jnp.bfloat16, limit_bytes=16 * 10**9)
    programs = Programs(model, config, plan, lanes, jnp.bfloat16)
    parameters = 7_615_616_512  # the model card's 7.61 billion
    weights = parameters - 152_064 * 3584
    split = weights * 2 / 4
    kv = 16 * 2048 * 2 * 4 * 128 * 28 * 2 / 4
    least = least_step_bytes(programs, 2048)
    # Norms and nothing else are whole on every chip.
    assert least == pytest.approx(split + kv, rel=1e-4)
    config = dataclasses.replace(config, int8_cache=True)
    programs = Programs(model, config, plan, lanes, jnp.bfloat16)
    assert least - least_step_bytes(programs, 2048) == kv / 2


def test_shapes_that_are_kept():
    def parameters(name):
        shape, _ = slices.find_shape(TINY, name)
        return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(abstract_params(shape)[0]))

    # The published numbers of parameters.
    assert parameters("qwen2_5_7b") == parameters("Qwen/Qwen2.5-7B") == 7_615_616_512
    assert parameters("Qwen/Qwen2.5-32B") == 32_763_876_352
    assert parameters("meta-llama/Llama-3.1-8B-Instruct") == 8_030_261_248
    assert parameters("qwen2_5_14b") == 14_770_033_664
    shape, name = slices.find_shape(TINY, None)
    assert shape.vocab_size == 1024 and name == "configs/models/tiny_base"
    # What another run is still to write has no shape yet.
    unwritten = dataclasses.replace(TINY, policy=PolicyConfig(checkpoint="runs/none_such/hf"))
    with pytest.raises(UserError, match=r"runs/none_such/hf': .* with --model: "):
        slices.find_shape(unwritten, None)


def test_the_shape_of_the_embedder():
    """bge-large's 335 million parameters, less a pooler of 1024 x 1025 that no embedder uses."""
    shape = read_encoder_config(launch.CONFIGS / "models" / slices.EMBEDDER)
    count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(abstract_encoder(shape)[0]))
    assert count == 335_141_888 - 1024 * 1025
    with pytest.raises(UserError) as caught:
        slices.find_shape(TINY, "gpt7")
    assert slices.EMBEDDER not in str(caught.value)  # it is no policy


def gathered(programs, mesh, model):
    """(type, elements) of what travels between devices when the engine takes its weights."""
    shapes, axes = abstract_params(model, jnp.float32)
    params = jax.tree.map(
        lambda x, names: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=named_sharding(mesh, names)
        ),
        shapes,
        axes,
    )
    index = jax.ShapeDtypeStruct((), jnp.int32)
    lowered = [programs.place_layer.lower(params["layers"], index)]
    lowered += [place.lower(params[name]) for name, place in programs.place_pieces.items()]
    moves = []
    for each in lowered:
        moved = r"= (\w+)\[([\d,]*)\]\S* (?:all-gather|all-to-all|all-reduce|collective-permute)\("
        for kind, sizes in re.findall(moved, each.compile().as_text()):
            moves.append((kind, int(np.prod([int(n) for n in sizes.split(",")]))))
    return moves


@pytest.mark.parametrize("tensor", [1, 2])
def test_weights_are_rounded_before_they_travel_and_never_all_at_once(tensor):
    """f16 here, since CPUs widen bf16 for their collectives; the largest piece is one table."""
    model = dataclasses.replace(MODEL, num_hidden_layers=8)
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    lanes = lane_mesh(mesh, tensor)
    config = EngineConfig(rows=8, extend_rows=8, tensor=tensor)
    plan = memory.plan_memory(model, config, lanes, jnp.float16, limit_bytes=10**9)
    moves = gathered(Programs(model, config, plan, lanes, jnp.float16), mesh, model)
    assert moves and {kind for kind, _ in moves} == {"f16"}
    assert max(size for _, size in moves) <= model.vocab_size * model.hidden_size


# ---------------------------------------------------------------- refusals


def test_a_mesh_of_another_size():
    stage2 = launch.load_config("stage2").value
    fits = slices.for_slice(stage2, 64, own_mesh=True)
    assert fits == stage2
    small = slices.for_slice(stage2, 16)
    assert small.mesh == MeshConfig(data=1, fsdp=16, tensor=1)
    assert (small.engine.rows, small.engine.extend_rows) == (256, 16)
    with pytest.raises(UserError, match=r"1\*64\*1 = 64 devices, the slice has 16"):
        slices.for_slice(stage2, 16, own_mesh=True)
    with pytest.raises(UserError, match=r"engine.tensor = 4 does not divide the mesh's 6 devices"):
        slices.for_slice(stage2, 6)
    split = dataclasses.replace(stage2, mesh=MeshConfig(fsdp=16, tensor=4))
    split = dataclasses.replace(split, learner=dataclasses.replace(split.learner, rows=16))
    with pytest.raises(UserError, match=r"tensor = 4 does not divide the slice's 6 chips"):
        slices.for_slice(split, 6)


@pytest.mark.parametrize("name", ["stage2", "tiny"])
def test_what_is_checked_can_be_trained(name):
    """The options that are printed make the configuration that was checked."""
    config = launch.load_config(name).value
    checked = slices.for_slice(config, 16)
    options = " ".join(slices.bindings(checked)).removeprefix("--gin '").removesuffix("'")
    assert launch.load_config(name, options.split("' --gin '")).value == checked != config


def test_refusals(four_devices):
    four_devices(10**9)
    for more, words in [
        ({"model": "gpt7"}, "--model gpt7: no folder with a config.json, and none of llama_3_1"),
        ({"live_tokens": 0}, "--live_tokens 0: must be from 1 to 384"),
        ({"live_tokens": 385}, "--live_tokens 385"),
    ]:
        with pytest.raises(UserError, match=words):
            aot_check.check(TINY, topology="toy:2x2", **more)
    wide = dataclasses.replace(TINY, mesh=MeshConfig(tensor=4))
    with pytest.raises(UserError, match=r"num_key_value_heads has 2 .* 4 devices"):
        aot_check.check(wide, topology="toy:2x2")


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("JAX TPU support not installed; cannot", "pip install -r requirements-tpu.txt"),
        ("INVALID_ARGUMENT: Invalid TPU\n external name: v9", "--topology v9:2x2: INVALID_ARG"),
    ],
)
def test_slices_that_cannot_be_described(monkeypatch, said, words):
    def describe(*_):
        raise RuntimeError(said)

    monkeypatch.setattr(topologies, "get_topology_desc", describe)
    with pytest.raises(UserError) as caught:
        slices.slice_devices("v9:2x2")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def run_script(tmp_path, *args):
    env = {**os.environ, "R1S_JAX_CACHE": str(tmp_path)}
    command = [sys.executable, str(SCRIPT), *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)


def test_a_slice_has_to_be_given(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["compile_check", "--config", "stage2"])
    with pytest.raises(UserError, match=r"--topology CHIP:SLICE is missing, such as v5p:4x4x4"):
        importlib.import_module("compile_check").main()


def test_the_mesh_of_a_slice_is_its_file(monkeypatch):
    """Where there is one, and nobody gave another; a chip alone asks for its smallest slice."""
    script = importlib.import_module("compile_check")
    assert script.mesh_preset("v5e:8x8") == "meshes/v5e_64"
    assert script.mesh_preset("v5p:2x2x2") == "meshes/v5p_8"
    assert script.mesh_preset("v5e:16x16") is None and script.mesh_preset("v5e") is None
    seen = []

    def check(config, *, own_mesh, **_):
        seen.append((config.mesh.fsdp, own_mesh))
        return 0

    monkeypatch.setattr(aot_check, "check", check)
    command = ["compile_check", "--config", "stage2", "--topology", "v5p:2x2x2"]
    for more in ([], ["--preset", "meshes/v6e_16"], ["--gin", "sharding.MeshConfig.fsdp = 4"]):
        monkeypatch.setattr(sys, "argv", [*command, *more])
        assert script.main() == 0
    assert seen == [(8, False), (16, True), (4, True)]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is here")
def test_the_script_says_what_to_install(tmp_path):
    done = run_script(tmp_path, "--config", "stage2", "--topology", "v5p:4x4x8")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: compiling for a TPU needs libtpu: pip install -r requirements-tpu.txt\n"
    )


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="compiling for a TPU needs libtpu (requirements-tpu.txt)",
)
def test_the_tiny_config_for_a_tpu(tmp_path):
    one_layer = "learner.LearnerConfig.scan_layers = True"  # is compiled, not all
    args = ("--config", "tiny", "--gin", "engine.EngineConfig.rows = 8", "--gin", one_layer)
    args += ("--no_embedder", "--topology")
    done = run_script(tmp_path, *args, "v5e:2x2")
    assert done.returncode == 0, done.stderr
    assert "configs/models/tiny_base on v5e:2x2: 4 chips, 16.91 GB" in done.stdout
    programs, found = map(tabled, done.stdout[done.stdout.index("|") :].split("\n\n")[:2])
    assert [name.split(" (")[0] for name in programs] == [
        "extend", "insert", "decode_chunk", "reshard", "reshard", "score", "gradient",
        "optimizer step",
    ]  # fmt: skip
    assert float(programs["gradient (a micro-batch)"][4]) > 10  # GFLOPs
    assert "**gradient**" in found
    done = run_script(tmp_path, *args, "v5e:3x5")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --topology v5e:3x5: INVALID_ARGUMENT")
