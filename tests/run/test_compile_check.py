"""The compile check: what is counted, what fits, and how it refuses; on CPU devices but for one."""

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
from jax.sharding import PartitionSpec

import launch
from r1s_jax.engine import plan as memory
from r1s_jax.engine.compiled import Programs
from r1s_jax.engine.state import EngineConfig
from r1s_jax.models.decoder import abstract_params
from r1s_jax.models.families import config_json
from r1s_jax.run import compile_check, roofline
from r1s_jax.run.config import PolicyConfig
from r1s_jax.sharding import MeshConfig, lane_mesh, make_mesh, named_sharding
from r1s_jax.types import UserError
from tests import tiny

SCRIPT = launch.ROOT / "tpu_scripts" / "compile_check.py"
MODEL = dataclasses.replace(tiny.MODEL, max_position_embeddings=384)
CHIP = roofline.Chip(name="toy", hbm_bytes=10**9, bytes_per_second=1e9, flops_per_second=1e12)


# ---------------------------------------------------------------- FLOPs


def test_flops_of_loops_branches_shards_and_kernels():
    from jax.experimental import pallas as pl

    x = jnp.zeros((8, 16)), jnp.zeros((16, 16))
    one = 2 * 8 * 16 * 16

    def flops(fn, **options):
        return roofline.matmul_flops(jax.jit(fn).trace(*x).jaxpr, **options)

    assert flops(jnp.matmul) == one
    assert flops(lambda a, b: jax.lax.fori_loop(0, 5, lambda _, c: c @ b, a)) == 5 * one
    until = lambda a, b: jax.lax.while_loop(lambda c: c.sum() > 0, lambda c: c @ b, a)  # noqa: E731
    assert flops(until) == one and flops(until, open_trips=9) == 9 * one
    either = lambda a, b: jax.lax.cond(a.sum() > 0, lambda: a @ b @ b, lambda: a @ b)  # noqa: E731
    assert flops(either) == 2 * one
    assert flops(jax.checkpoint(lambda a, b: a @ b)) == one
    # Two rows on each of four devices.
    mesh, rows, whole = make_mesh(MeshConfig(data=4)), PartitionSpec("data"), PartitionSpec()
    split = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(rows, whole), out_specs=rows)
    assert flops(split) == one

    def kernel(a, b):
        return pl.pallas_call(
            lambda a_ref, b_ref, o_ref: None,
            out_shape=a,
            cost_estimate=pl.CostEstimate(flops=77, bytes_accessed=0, transcendentals=0),
        )(a, b)

    assert flops(kernel) == 77


# ---------------------------------------------------------------- the table


def toy_program(**more):
    traced = jax.jit(jnp.matmul).trace(*[jax.ShapeDtypeStruct((512, 512), jnp.float32)] * 2)
    return roofline.Program(name="toy", traced=traced, **more)


def test_rows_of_the_table():
    """3 MB at 1 GB/s take 3.15 ms; 268 MFLOP at 1 TFLOP/s less."""
    program = toy_program(tokens=100, least_bytes=2**21)
    (cost,) = roofline.compile_all([program], chips=1)
    assert cost.argument_bytes == 2 * 2**20
    assert cost.flops == 2 * 512**3 and cost.hbm_bytes == 3 * 2**20
    assert cost.seconds(CHIP) == 3 * 2**20 / 1e9
    slow = dataclasses.replace(CHIP, flops_per_second=1e10)
    assert cost.seconds(slow) == 2 * 512**3 / 1e10
    heading, line, row = roofline.table([cost], CHIP).splitlines()
    assert heading.count("|") == line.count("|") == row.count("|") == 12
    assert re.match(r"\| toy \| \d+\.\d \| 0\.00 \|", row)
    assert row.endswith("| 0.3 | 0.003 | 3.15 | 31,789 | 1.500 |")
    halved = roofline.compile_all([dataclasses.replace(program, steps=2)], chips=4)[0]
    assert (halved.flops, halved.hbm_bytes) == (2 * 512**3 / 8, 3 * 2**19)


def test_what_does_not_fit_is_named():
    (cost,) = roofline.compile_all([toy_program(beside_bytes=10**9 - 2**20)], chips=1)
    assert cost.culprit(CHIP) == (
        "toy does not fit: 0.00 GB, and 1.00 GB beside it, on a toy chip with 1.00 GB"
    )
    (cost,) = roofline.compile_all([toy_program(beside_bytes=10**9 - 2**23)], chips=1)
    assert not cost.culprit(CHIP)


def test_a_program_too_large_for_the_compiler(monkeypatch):
    """What libtpu says then; any other failure of a compiler is raised."""
    said = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, needs 298G of 15.75G.\nmore"

    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(said)

    program = toy_program()
    monkeypatch.setattr(type(program.traced), "lower", lambda self: Lowered())
    (cost,) = roofline.compile_all([program], chips=1)
    assert cost.culprit(CHIP) == f"toy does not fit: {said.splitlines()[0]}"
    assert "| toy | does not fit | – |" in roofline.table([cost], CHIP)
    said = "INTERNAL: something else"
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        roofline.compile_all([program], chips=1)


# ---------------------------------------------------------------- a run's programs

TINY = launch.load_config(
    "tiny", ["engine.EngineConfig.rows = 4", "engine.EngineConfig.extend_rows = 2"]
).value


@pytest.fixture
def four_devices(monkeypatch):
    """A slice of four CPU devices whose chip holds what the caller says."""
    monkeypatch.setattr(compile_check, "slice_devices", lambda _: jax.devices()[:4])

    def holds(size):
        chip = dataclasses.replace(CHIP, hbm_bytes=size)
        monkeypatch.setitem(compile_check.CHIPS, "cpu", chip)

    return holds


def test_a_run_that_fits_and_ones_that_do_not(four_devices, tmp_path, capsys, monkeypatch):
    """Exit codes 0 and 1: the same programs on chips of three sizes."""
    (tmp_path / "config.json").write_text(json.dumps(config_json(MODEL, (0,), 0)))
    check = functools.partial(compile_check.check, TINY, topology="toy:2x2", model=str(tmp_path))
    four_devices(10**9)
    assert check() == 0
    out, err = capsys.readouterr()
    assert not err
    assert "Mesh data 1 x fsdp 4 x tensor 1; 4 copies of the policy on 1 chips each" in out
    assert "rows 16, extend_rows 8 of 32 tokens, page 64, context 384, 96 live" in out
    lines = out[out.index("|") :].splitlines()[2:]
    rows = {cells[1].strip(): cells[2:-1] for cells in (line.split("|") for line in lines)}
    assert list(rows) == [
        "extend (prompts and documents)", "insert (a page copied)", "decode_chunk (a step)",
        "reshard (one of 2 layers)", "reshard (embedding)", "reshard (lm_head)",
    ]  # fmt: skip
    tokens, ratio = rows["decode_chunk (a step)"][-2:]
    assert int(tokens.replace(",", "")) > 0 and float(ratio) > 1
    # A learner that keeps more than the plan knows of.
    real = compile_check.engine_programs

    def resharding(*args, learner_bytes, **more):
        return real(*args, learner_bytes=10**9, **more)[-1:]

    monkeypatch.setattr(compile_check, "engine_programs", resharding)
    assert check() == 1
    out, err = capsys.readouterr()
    assert err.startswith("reshard (lm_head) does not fit: 0.00 GB, and 1.0")
    assert err.count("\n") == 1 and "| reshard (lm_head) |" in out
    four_devices(2 * 10**5)
    assert check() == 1
    out, err = capsys.readouterr()
    assert "|" not in out
    assert err.startswith("the engine does not fit: engine.context = 384: one episode needs")


def test_least_bytes_of_a_step():
    """Qwen2.5-7B on four chips of v5e: 16 rows of 2,048 tokens, counted by hand."""
    model, _ = compile_check.find_shape(launch.load_config("stage2").value, None)
    assert model.num_hidden_layers == 28 and model.attention_bias
    lanes = lane_mesh(make_mesh(MeshConfig(fsdp=2, tensor=4)), 4)
    config = EngineConfig(rows=32, context=8192, extend_rows=2)
    plan = memory.plan_memory(model, config, lanes, jnp.bfloat16, limit_bytes=16 * 10**9)
    programs = Programs(model, config, plan, lanes, jnp.bfloat16)
    parameters = 7_615_616_512  # the model card's 7.61 billion
    weights = parameters - 152_064 * 3584
    split = weights * 2 / 4
    kv = 16 * 2048 * 2 * 4 * 128 * 28 * 2 / 4
    least = compile_check.least_step_bytes(programs, 2048)
    # Norms and nothing else are whole on every chip.
    assert least == pytest.approx(split + kv, rel=1e-4)
    config = dataclasses.replace(config, int8_cache=True)
    programs = Programs(model, config, plan, lanes, jnp.bfloat16)
    assert least - compile_check.least_step_bytes(programs, 2048) == kv / 2


def test_shapes_that_are_kept():
    def parameters(name):
        shape, _ = compile_check.find_shape(TINY, name)
        return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(abstract_params(shape)[0]))

    # The published numbers of parameters.
    assert parameters("qwen2_5_7b") == parameters("Qwen/Qwen2.5-7B") == 7_615_616_512
    assert parameters("Qwen/Qwen2.5-32B") == 32_763_876_352
    assert parameters("meta-llama/Llama-3.1-8B-Instruct") == 8_030_261_248
    shape, name = compile_check.find_shape(TINY, None)
    assert shape.vocab_size == 1024 and name == "configs/models/tiny_base"
    # What another run is still to write has no shape yet.
    unwritten = dataclasses.replace(TINY, policy=PolicyConfig(checkpoint="runs/none_such/hf"))
    with pytest.raises(UserError, match=r"runs/none_such/hf': .* with --model: "):
        compile_check.find_shape(unwritten, None)


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
    fits = compile_check.for_slice(stage2, 64, own_mesh=True)
    assert fits == stage2
    small = compile_check.for_slice(stage2, 16)
    assert small.mesh == MeshConfig(data=1, fsdp=4, tensor=4)
    assert (small.engine.rows, small.engine.extend_rows) == (64, 16)
    with pytest.raises(UserError, match=r"1\*16\*4 = 64 devices, the slice has 16"):
        compile_check.for_slice(stage2, 16, own_mesh=True)
    with pytest.raises(UserError, match=r"tensor = 4 does not divide the slice's 6 chips"):
        compile_check.for_slice(stage2, 6)


def test_what_is_checked_can_be_trained():
    """The options that are printed make the configuration that was checked."""
    stage2 = launch.load_config("stage2").value
    checked = compile_check.for_slice(stage2, 16)
    options = " ".join(compile_check.bindings(checked)).removeprefix("--gin '").removesuffix("'")
    assert launch.load_config("stage2", options.split("' --gin '")).value == checked != stage2


def test_refusals(four_devices):
    four_devices(10**9)
    for more, words in [
        ({"model": "gpt7"}, "--model gpt7: no folder with a config.json, and none of llama_3_1"),
        ({"live_tokens": 0}, "--live_tokens 0: must be from 1 to 384"),
        ({"live_tokens": 385}, "--live_tokens 385"),
    ]:
        with pytest.raises(UserError, match=words):
            compile_check.check(TINY, topology="toy:2x2", **more)
    wide = dataclasses.replace(TINY, mesh=MeshConfig(tensor=4))
    with pytest.raises(UserError, match=r"num_key_value_heads has 2 .* 4 devices"):
        compile_check.check(wide, topology="toy:2x2")


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
        compile_check.slice_devices("v9:2x2")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def run_script(tmp_path, *args):
    env = {**os.environ, "R1S_JAX_CACHE": str(tmp_path)}
    command = [sys.executable, str(SCRIPT), *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)


def test_a_slice_has_to_be_given(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["compile_check", "--config", "stage2"])
    with pytest.raises(UserError, match=r"--topology CHIP:SLICE is missing, such as v5p:4x4x4"):
        importlib.import_module("compile_check").main()


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is here")
def test_the_script_says_what_to_install(tmp_path):
    done = run_script(tmp_path, "--config", "stage2", "--topology", "v5p:4x4x4")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: compiling for a TPU needs libtpu: pip install -r requirements-tpu.txt\n"
    )


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="compiling for a TPU needs libtpu (requirements-tpu.txt)",
)
def test_the_tiny_config_for_a_tpu(tmp_path):
    args = ("--config", "tiny", "--gin", "engine.EngineConfig.rows = 8", "--topology")
    done = run_script(tmp_path, *args, "v5e:2x2")
    assert done.returncode == 0, done.stderr
    assert "configs/models/tiny_base on v5e:2x2: 4 chips, 16.91 GB" in done.stdout
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row.split(" (")[0] for row in rows[1:]] == [
        "| extend", "| insert", "| decode_chunk", "| reshard", "| reshard",
    ]  # fmt: skip
    done = run_script(tmp_path, *args, "v5e:3x5")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --topology v5e:3x5: INVALID_ARGUMENT")
