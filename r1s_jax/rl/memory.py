"""What the learner takes on every device, from shapes alone: before anything is compiled.

The engine fills what is left of a device with its cache, so this has to be known first. It is an
upper estimate; `compile_check` prints it beside what the compiler says.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from r1s_jax.engine.plan import weight_bytes
from r1s_jax.models.decoder import DecoderConfig
from r1s_jax.models.logprobs import BLOCK_BYTES
from r1s_jax.models.packed import SCORE_BYTES
from r1s_jax.rl.config import LearnerConfig
from r1s_jax.rl.programs import LearnerPrograms
from r1s_jax.sharding import shards_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnerBytes:
    """Bytes on every device.

    policy: a whole one in f32, as it is read at the start. params, moments: what is trained, and
    the optimiser's state. base: the rest of the policy, where adapters are trained. reference: a
    copy of what is trained, if a KL weight asks for one. merged: adapters and base as one policy,
    on its way to the engine. working: beyond these, the most that one of the learner's programs
    takes for itself, gradients included (an estimate).
    """

    policy: int
    params: int
    moments: int
    base: int
    reference: int
    merged: int
    working: int

    @property
    def kept(self) -> int:
        """Alive all the time."""
        return self.params + self.moments + self.base + self.reference

    @property
    def peak(self) -> int:
        """What has to stay free beside the engine's weights and cache."""
        return self.kept + max(self.working, self.merged)


def learner_bytes(model: DecoderConfig, config: LearnerConfig, mesh: Mesh) -> LearnerBytes:
    """What a learner of this shape takes on a device of the mesh."""
    programs = LearnerPrograms(model, config, mesh, temperature=1.0)
    params, base = programs.abstract_params(), programs.abstract_base()
    trained = local_bytes(params)
    return LearnerBytes(
        policy=weight_bytes(model, mesh, jnp.float32),
        params=trained,
        moments=local_bytes(programs.abstract_state()) - trained,
        base=local_bytes(base),
        reference=trained if config.algorithm.needs_reference else 0,
        merged=local_bytes(base),
        working=_working(programs),
    )


def local_bytes(tree: Any) -> int:
    """Of these arrays, or shapes with layouts, a device's share."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def _working(programs: LearnerPrograms) -> int:
    """Of `accumulate`, the largest of them: what is alive in a micro-batch's backward pass."""
    model, config, mesh = programs.model, programs.config, programs.mesh
    size = jnp.dtype(config.compute_dtype).itemsize
    tensor = int(mesh.shape["tensor"])
    params, base = programs.abstract_params(), programs.abstract_base()
    weights = params if base is None else base
    trained = local_bytes(params)
    # The sum of gradients, and the new ones in the type that is computed in, layers stacked. With
    # it the parameters themselves are copied once.
    gradients = trained + trained * size // 4
    copies = local_bytes(weights) * size // 4 if size < weights["final_norm"].dtype.itemsize else 0

    tokens = config.rows // shards_of(mesh, ("rows",)) * config.row_tokens
    hidden, ffn = model.hidden_size, model.intermediate_size // tensor
    q = model.num_attention_heads * model.head_dim // tensor
    kv = model.num_key_value_heads * model.head_dim // tensor
    layers = model.num_hidden_layers
    # What the forward pass of a layer leaves to the backward pass, numbers a token.
    products = q + 2 * kv + 2 * ffn + 2 * hidden
    left = {
        "full": hidden,
        "dots": hidden + products,
        "none": 8 * hidden + 2 * products + 2 * ffn,
    }[config.remat]
    # Of the layer at hand: its products and what lies between them, with their gradients, and norms
    # and rotations in f32.
    within = tokens * (3 * (products + ffn) * size + 4 * (4 * hidden + 2 * q + 2 * kv))
    # Whole matrices of a layer, gathered for it (and for the next one), and their gradients.
    a_layer = hidden * (2 * q + 2 * kv + 3 * ffn) * size
    # Splash attention leaves no scores in HBM; elsewhere a block of them is there, with gradients.
    scores = 0
    if mesh.devices.flat[0].platform != "tpu":
        heads = tokens * model.num_attention_heads // tensor
        scores = 3 * min(SCORE_BYTES, heads * config.row_tokens * 4)
    # The output matrix goes by blocks of the vocabulary; the gradients by its shard and by the
    # hidden states are f32 sums.
    table = model.vocab_size * hidden // shards_of(mesh, ("vocab", "embed")) * 4
    block = min(BLOCK_BYTES, tokens * model.vocab_size // tensor * 4)
    vocabulary = 3 * block + 2 * table + tokens * hidden * 4
    kept = layers * tokens * left * size
    total = gradients + copies + kept + within + 3 * a_layer + scores + vocabulary
    return total + total // 10  # the compiler's heap has gaps
