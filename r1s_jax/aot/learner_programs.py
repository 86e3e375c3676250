"""The learner's programs and the embedder's, traced for devices that need not exist."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from r1s_jax.aot.roofline import Program
from r1s_jax.models.decoder import DecoderConfig
from r1s_jax.models.encoder import EncoderConfig, abstract_encoder, bind_encoder
from r1s_jax.models.params import Params
from r1s_jax.retrieval.sentence import pool
from r1s_jax.rl.memory import local_bytes
from r1s_jax.rl.programs import LearnerPrograms, TokenValues
from r1s_jax.run.config import RunConfig
from r1s_jax.sharding import named_sharding, replicated

# Padded tokens of a batch of texts on one device; a text has up to the encoder's positions.
EMBEDDER_TOKENS = 16_384


def learner_programs(
    config: RunConfig, model: DecoderConfig, mesh: Mesh
) -> dict[str, list[Program]]:
    """What the learner runs, by phase (see `phases`)."""
    programs = LearnerPrograms(model, config.learner, mesh, temperature=config.sampling.temperature)
    params, base = programs.abstract_params(), programs.abstract_base()
    state, batch = programs.abstract_state(), programs.abstract_batch()
    number, algorithm = programs.abstract_values(), config.learner.algorithm
    in_loss = algorithm.needs_reference and not algorithm.kl_in_reward
    values = TokenValues(
        advantages_BT=number,
        weights_BT=number,
        old_BT=number,
        ref_BT=number if in_loss else None,
        fresh=jax.ShapeDtypeStruct((), jnp.bool_, sharding=replicated(mesh)),
    )
    alive = local_bytes(params) + local_bytes(base)
    tokens = config.learner.rows * config.learner.row_tokens / mesh.size
    score = Program(
        name="score (a micro-batch)",
        traced=programs.score.trace(params, base, batch),
        alive_bytes=alive,
        tokens=tokens,
    )
    gradient = Program(
        name="gradient (a micro-batch)",
        traced=programs.accumulate.trace(params, params, base, batch, values),
        alive_bytes=alive,
        tokens=tokens,
    )
    step = Program(
        name="optimizer step",
        traced=programs.apply.trace(state, params),
        alive_bytes=local_bytes(state),
    )
    found = {"score": [score], "gradient": [gradient], "optimizer step": [step]}
    if base is not None:
        merge = Program(
            name="merge (adapters)",
            traced=programs.merge.trace(params, base),
            alive_bytes=alive + local_bytes(base),  # its result is counted with the phase
        )
        found["push"] = [merge]
    return found


def embedder_program(config: EncoderConfig, mesh: Mesh, dtype: Any = jnp.bfloat16) -> Program:
    """A batch of full texts, as `retrieval.sentence` embeds them: split over all devices."""
    length = config.max_position_embeddings
    rows = mesh.size * max(EMBEDDER_TOKENS // length, 1)
    texts, numbers = (named_sharding(mesh, axes) for axes in (("texts", None), ("texts",)))
    shapes, axes = abstract_encoder(config, dtype)
    params = jax.tree.map(
        lambda x, names: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=named_sharding(mesh, names)
        ),
        shapes,
        axes,
    )
    traced = jax.jit(partial(_vectors, config), out_shardings=texts).trace(
        params,
        jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=texts),
        jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=numbers),
    )
    return Program(
        name=f"embedder (texts of {length} tokens)",
        traced=traced,
        tokens=rows * length / mesh.size,
    )


def _vectors(
    config: EncoderConfig,
    params: Params,
    ids_BT: Int[Array, "B T"],
    lengths_B: Int[Array, " B"],
) -> Float[Array, "B D"]:
    mask_BT: Bool[Array, "B T"] = jnp.arange(ids_BT.shape[1]) < lengths_B[:, None]
    hidden_BTD = bind_encoder(config, params)(ids_BT, mask_BT)
    pooled_BD = pool(hidden_BTD.astype(jnp.float32), mask_BT, "cls")
    return pooled_BD / jnp.linalg.norm(pooled_BD, axis=-1, keepdims=True)
