"""The engine's programs, traced for devices that need not exist."""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from r1s_jax.aot.roofline import Program
from r1s_jax.engine.automaton import StopAutomaton
from r1s_jax.engine.compiled import Programs
from r1s_jax.engine.programs import StopTables
from r1s_jax.engine.state import Rows
from r1s_jax.models.decoder import abstract_params
from r1s_jax.rl.memory import local_bytes
from r1s_jax.rollout.episode import STOP_STRINGS
from r1s_jax.run.config import RunConfig
from r1s_jax.sharding import named_sharding, replicated

# A prompt and three passages, about: what an engine measures the scales of its integers on.
SCALE_TOKENS = 1024


def engine_programs(
    programs: Programs,
    config: RunConfig,
    mesh: Mesh,
    *,
    live_tokens: int,
) -> dict[str, list[Program]]:
    """What the engine runs, by phase (see `phases`); its weights come from a learner on `mesh`."""
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
    rollout = [
        Program(
            name="extend (prompts and documents)",
            traced=extend,
            alive_bytes=plan.weight_bytes + plan.cache_bytes,
            tokens=blocks * engine.extend_tokens / chips,
        ),
        Program(
            name="insert (a page copied)",
            traced=copy,
            alive_bytes=plan.cache_bytes,
            open_trips=layers,
        ),
        Program(
            name="decode_chunk (a step)",
            traced=decode,
            alive_bytes=plan.weight_bytes + plan.cache_bytes,
            open_trips=engine.chunk,
            steps=engine.chunk,
            tokens=count / chips,
            least_bytes=least_step_bytes(programs, live_tokens),
        ),
    ]
    dtype = "float32" if config.learner.lora is None else config.learner.compute_dtype
    push = _reshard(programs, mesh, dtype)
    if engine.int8_cache:
        placed = {name: p for name, p in weights.items() if name != "cache_scales"}
        push.append(
            Program(
                name=f"scales of the cache (of {SCALE_TOKENS} tokens)",
                traced=programs.measure.trace(placed, everywhere(SCALE_TOKENS)),
                alive_bytes=plan.weight_bytes,
            )
        )
    return {"rollout": rollout, "push": push}


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


def _reshard(programs: Programs, mesh: Mesh, dtype: str) -> list[Program]:
    """`Programs.place` piece by piece, from a policy of `dtype`."""
    shapes, axes = abstract_params(programs.model, jnp.dtype(dtype))
    params = jax.tree.map(
        lambda x, names: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=named_sharding(mesh, names)
        ),
        shapes,
        axes,
    )
    placed, pieces = programs.abstract_params(), programs.place_pieces

    def program(piece: str, traced: Any, source: Any, result: Any, runs: int = 1) -> Program:
        # Counted as if all other pieces were there already: its result is one of the weights.
        alive = local_bytes(source) + local_bytes(result)
        return Program(name=f"reshard ({piece})", traced=traced, alive_bytes=alive, runs=runs)

    found = []
    if not programs.config.scan_layers:
        source, (result, *others) = params["layers"], placed["layers"]
        index = jax.ShapeDtypeStruct((), jnp.int32)
        traced = programs.place_layer.trace(source, index)
        count = len(others) + 1
        found.append(program(f"one of {count} layers", traced, source, result, count))
    for path, place in jax.tree_util.tree_leaves_with_path(pieces):
        names = [key.key for key in path]
        source, result = cast(Any, params), cast(Any, placed)
        for name in names:
            source, result = source[name], result[name]
        if len(result.shape) > 1:  # not worth a line otherwise
            found.append(program(".".join(names), place.trace(source), source, result))
    return found
