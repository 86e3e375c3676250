"""What every program would take on a TPU slice, compiled ahead of time on a machine without one.

The compiler for TPUs is libtpu's own: memory is what a program would be given on the chip.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from r1s_jax.engine.automaton import StopAutomaton
from r1s_jax.engine.compiled import Programs
from r1s_jax.engine.plan import DoesNotFit, plan_memory
from r1s_jax.engine.programs import StopTables
from r1s_jax.engine.state import Rows
from r1s_jax.models.decoder import DecoderConfig, abstract_params
from r1s_jax.models.families import read_config
from r1s_jax.rollout.episode import STOP_STRINGS
from r1s_jax.run.config import RunConfig
from r1s_jax.run.roofline import CHIPS, Program, compile_all, table
from r1s_jax.run.setup import REPOSITORY, bytes_beside, find_policy, resolve
from r1s_jax.sharding import (
    MeshConfig,
    check_divisible,
    lane_mesh,
    make_mesh,
    named_sharding,
    replicated,
)
from r1s_jax.types import UserError

# A prompt and three passages, about: what an engine measures the scales of its integers on.
SCALE_TOKENS = 1024
_GB = 1e9


def check(
    config: RunConfig,
    *,
    topology: str,
    model: str | None = None,
    live_tokens: int | None = None,
    own_mesh: bool = False,
) -> int:
    """Compiles a run's programs for a slice such as `v5p:4x4x4` and prints what they take.

    `model` stands in for the policy (see `find_shape`). `live_tokens`: mean length of the rows
    that decode, by default a quarter of the context. A mesh that does not match the slice is
    replaced, and rows follow the number of chips, unless it is the user's own.

    Returns 1, the culprits named on stderr, if something does not fit. Raises UserError for an
    unknown topology or model, and for shapes that do not divide.
    """
    devices = slice_devices(topology)
    chip = CHIPS[devices[0].device_kind]
    shape, name = find_shape(config, model)
    given, config = config, for_slice(config, len(devices), own_mesh=own_mesh)
    live = config.engine.context // 4 if live_tokens is None else live_tokens
    if not 0 < live <= config.engine.context:
        raise UserError(f"--live_tokens {live}: must be from 1 to {config.engine.context}")
    mesh = make_mesh(config.mesh, devices)
    engine, lanes = config.engine, lane_mesh(mesh, config.engine.tensor)
    heads = shape.num_key_value_heads
    for each in (mesh, lanes):
        check_divisible(each, "num_key_value_heads", (heads,), ("kv_heads",))
    layout = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    print(
        f"{name} on {topology}: {len(devices)} chips, {chip.hbm_bytes / _GB:.2f} GB, "
        f"{chip.bytes_per_second / _GB:,.0f} GB/s and {chip.flops_per_second / 1e12:.0f} TFLOP/s "
        f"each\n\nMesh {layout}; {lanes.shape['data']} copies of the policy on "
        f"{lanes.shape['tensor']} chips each; rows {engine.rows}, extend_rows "
        f"{engine.extend_rows} of {engine.extend_tokens} tokens, page {engine.page}, context "
        f"{engine.context}, {live} live tokens a row, {config.dtype}."
    )
    if config != given:
        print(f"The config is for {given.mesh.size} chips. Here: {' '.join(bindings(config))}")
    learner_bytes = bytes_beside(config, shape, mesh)
    try:
        plan = plan_memory(
            shape,
            engine,
            lanes,
            jnp.dtype(config.dtype),
            limit_bytes=chip.hbm_bytes,
            reserved_bytes=learner_bytes,
        )
    except DoesNotFit as error:
        print(f"the engine does not fit: {error}", file=sys.stderr)
        return 1
    print(f"Plan: {plan}.\n", flush=True)
    programs = Programs(shape, engine, plan, lanes, jnp.dtype(config.dtype), expected_length=live)
    costs = compile_all(
        engine_programs(programs, config, mesh, live_tokens=live, learner_bytes=learner_bytes),
        len(devices),
    )
    print(table(costs, chip))
    culprits = [line for cost in costs if (line := cost.culprit(chip))]
    print("\n".join(culprits), end="\n" if culprits else "", file=sys.stderr)
    return int(bool(culprits))


def slice_devices(topology: str) -> Sequence[jax.Device]:
    """The chips of a slice, which need not exist. Raises UserError if there is no such slice."""
    try:
        devices = topologies.get_topology_desc(topology, "tpu").devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        if "not installed" in reason or "No module named 'libtpu'" in reason:
            raise UserError(
                "compiling for a TPU needs libtpu: pip install -r requirements-tpu.txt"
            ) from error
        raise UserError(
            f"--topology {topology}: {reason}; give a chip and a slice of whole hosts, such as "
            "v5e:4x4, v5p:4x4x4 or v6e:4x4"
        ) from error
    kind = devices[0].device_kind
    if kind not in CHIPS:
        known = ", ".join(chip.name for chip in CHIPS.values())
        raise UserError(f"--topology {topology}: no figures for chips of {kind}; known: {known}")
    return devices


def find_shape(config: RunConfig, model: str | None) -> tuple[DecoderConfig, str]:
    """(shape, name) of the policy or of the model that stands in for it.

    A folder with a config.json, or a model whose shape is kept in configs/models: by the name of
    its folder there, or by the hub's (`Qwen/Qwen2.5-7B` is qwen2_5_7b). The hub is asked for a
    policy that is neither.
    """
    name = config.policy.checkpoint if model is None else model
    kept = Path(name).name.lower().replace(".", "_").replace("-", "_")
    shapes = REPOSITORY / "configs" / "models"
    for folder in (resolve(name), shapes / kept):
        if (folder / "config.json").is_file():
            return read_config(folder), name
    known = ", ".join(sorted(path.parent.name for path in shapes.glob("*/config.json")))
    if model is not None:
        raise UserError(
            f"--model {model}: no folder with a config.json, and none of {known} (ids of the hub "
            "belong into run.PolicyConfig.checkpoint)"
        )
    folder = find_policy(config.policy)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"policy.checkpoint = {name!r}: no config.json there; "
            f"{config.policy.source or 'put it there'}, or give its shape with --model: a folder "
            f"with a config.json, or one of {known}"
        )
    return read_config(folder), name


def for_slice(config: RunConfig, chips: int, *, own_mesh: bool = False) -> RunConfig:
    """The configuration for another number of chips: parameter shards and rows follow it.

    Raises UserError where they cannot, or the user's own mesh has another size.
    """
    mesh, before = config.mesh, config.mesh.size
    if before == chips:
        return config
    if own_mesh:
        raise UserError(
            f"mesh: data*fsdp*tensor = {mesh.data}*{mesh.fsdp}*{mesh.tensor} = {before} devices, "
            f"the slice has {chips}"
        )
    if chips % mesh.tensor:
        raise UserError(f"mesh.tensor = {mesh.tensor} does not divide the slice's {chips} chips")

    def scaled(rows: int) -> int:
        return max(rows * chips // before, 1)

    engine, learner = config.engine, config.learner
    return dataclasses.replace(
        config,
        mesh=MeshConfig(fsdp=chips // mesh.tensor, tensor=mesh.tensor),
        engine=dataclasses.replace(
            engine, rows=scaled(engine.rows), extend_rows=scaled(engine.extend_rows)
        ),
        learner=dataclasses.replace(learner, rows=scaled(learner.rows)),
    )


def bindings(config: RunConfig) -> list[str]:
    """What `for_slice` decides, as options for the other scripts."""
    values = {
        **{f"sharding.MeshConfig.{k}": v for k, v in dataclasses.asdict(config.mesh).items()},
        "engine.EngineConfig.rows": config.engine.rows,
        "engine.EngineConfig.extend_rows": config.engine.extend_rows,
        "learner.LearnerConfig.rows": config.learner.rows,
    }
    return [f"--gin '{name} = {value}'" for name, value in values.items()]


def engine_programs(
    programs: Programs,
    config: RunConfig,
    mesh: Mesh,
    *,
    live_tokens: int,
    learner_bytes: int,
) -> list[Program]:
    """What the engine runs, its weights coming from a learner on `mesh`.

    `learner_bytes`: what that keeps on each chip, the f32 parameters included.
    """
    plan, engine, model = programs.plan, programs.config, programs.model
    chips, layers = mesh.size, model.num_hidden_layers
    whole = replicated(programs.mesh)

    def by_row(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=programs.rows)

    def everywhere(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    weights, pages = programs.abstract_params(), programs.abstract_pages()
    count, blocks, places = engine.rows, engine.extend_rows, plan.pages_per_episode
    extend = programs.extend.trace(
        weights,
        pages,
        by_row(blocks, engine.extend_tokens),
        by_row(blocks, places),
        by_row(blocks),
        by_row(blocks),
    )
    # The number of states depends on the stop strings alone.
    states = len(StopAutomaton.build(STOP_STRINGS, [b""]).accepting)
    decode = programs.decode.trace(
        config.sampling,
        engine.chunk,
        weights,
        StopTables(
            next_SV=everywhere(states, model.vocab_size),
            accepting_S=everywhere(states, dtype=jnp.bool_),
            eos_ids=everywhere(2),
            banned_next_SV=everywhere(1, 1),
            banned_accepting_S=everywhere(1, dtype=jnp.bool_),
        ),
        pages,
        Rows(
            table_RJ=by_row(count, places),
            lengths_R=by_row(count),
            pending_R=by_row(count),
            budget_R=by_row(count),
            stop_state_R=by_row(count),
            ban_state_R=by_row(count),
            seeds_R2=by_row(count, 2, dtype=jnp.uint32),
        ),
        everywhere(),
    )
    copy = programs.copy.trace(pages, by_row(count), by_row(count))
    found = [
        Program(
            name="extend (prompts and documents)",
            traced=extend,
            beside_bytes=learner_bytes,
            tokens=blocks * engine.extend_tokens / chips,
        ),
        Program(
            name="insert (a page copied)",
            traced=copy,
            beside_bytes=learner_bytes + plan.weight_bytes,
            open_trips=layers,
        ),
        Program(
            name="decode_chunk (a step)",
            traced=decode,
            beside_bytes=learner_bytes,
            open_trips=engine.chunk,
            steps=engine.chunk,
            tokens=count / chips,
            least_bytes=least_step_bytes(programs, live_tokens),
        ),
    ]
    if engine.int8_cache:
        placed = {name: p for name, p in weights.items() if name != "cache_scales"}
        found.append(
            Program(
                name=f"scales of the cache (of {SCALE_TOKENS} tokens)",
                traced=programs.measure.trace(placed, everywhere(SCALE_TOKENS)),
                beside_bytes=learner_bytes + plan.cache_bytes,
            )
        )
    return found + _reshard(programs, mesh, learner_bytes)


def least_step_bytes(programs: Programs, live_tokens: int) -> int:
    """Bytes a chip has to read for a decode step: the weights and the live rows' keys and values.

    An input embedding that is not the output's too is left out: a step reads a row of it a token.
    """
    model, plan, tensor = programs.model, programs.plan, programs.mesh.shape["tensor"]
    numbers = 0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size
    unread = numbers * jnp.dtype(programs.dtype).itemsize // tensor
    token = 2 * model.num_key_value_heads * model.head_dim * model.num_hidden_layers
    kept = token * programs.abstract_pages()[0].dtype.itemsize // tensor
    return plan.weight_bytes - unread + plan.rows * live_tokens * kept


def _reshard(programs: Programs, mesh: Mesh, learner_bytes: int) -> list[Program]:
    """`Programs.place` piece by piece; the pages, and at last all other pieces, lie beside it."""
    shapes, axes = abstract_params(programs.model, jnp.float32)
    params = jax.tree.map(
        lambda x, names: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=named_sharding(mesh, names)
        ),
        shapes,
        axes,
    )
    placed, pieces = programs.abstract_params(), programs.place_pieces
    everything = learner_bytes + programs.plan.cache_bytes + programs.plan.weight_bytes

    def program(piece: str, traced: Any, source: Any, result: Any) -> Program:
        beside = everything - _local_bytes(source) - _local_bytes(result)
        return Program(name=f"reshard ({piece})", traced=traced, beside_bytes=beside)

    found = []
    if not programs.config.scan_layers:
        source, (result, *others) = params["layers"], placed["layers"]
        index = jax.ShapeDtypeStruct((), jnp.int32)
        traced = programs.place_layer.trace(source, index)
        found.append(program(f"one of {len(others) + 1} layers", traced, source, result))
    for path, place in jax.tree_util.tree_leaves_with_path(pieces):
        names = [key.key for key in path]
        source, result = cast(Any, params), cast(Any, placed)
        for name in names:
            source, result = source[name], result[name]
        if len(result.shape) > 1:  # not worth a line otherwise
            found.append(program(".".join(names), place.trace(source), source, result))
    return found


def _local_bytes(tree: Any) -> int:
    """Of these arrays, a chip's share."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )
