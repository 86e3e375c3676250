"""What the engine keeps on the device: the KV cache of every slot and its row's registers."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float, Int

from r1s_jax.models.decoder import DecoderConfig
from r1s_jax.sharding import named_sharding
from r1s_jax.types import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Static shapes of a run; every program is compiled for these and no others."""

    slots: int = 64
    chunk: int = 16  # decode steps between two looks of the host
    context: int = 384  # tokens of one episode, prompt and documents included
    prefill_rows: int = 16
    prompt_buckets: tuple[int, ...] = (64,)
    extend_rows: int = 16
    extend_tokens: int = 64  # documents are written in pieces of this many tokens

    def __post_init__(self) -> None:
        if max(self.prompt_buckets) > self.context:
            raise UserError(
                f"engine.prompt_buckets = {self.prompt_buckets} exceed "
                f"engine.context = {self.context}"
            )

    @property
    def longest_prompt(self) -> int:
        """Tokens of a prompt: its last one is fed by the first decode step, and one is sampled."""
        return min(max(self.prompt_buckets) + 1, self.context - 1)

    @property
    def capacity(self) -> int:
        """Cache positions per slot: the context, and room for the last write's padding."""
        return self.context + max(self.chunk, self.extend_tokens)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineState:
    """One immutable pytree. A row's last token is `pending`: known, but not in the cache yet.

    keys: per layer [B K h S]; values: per layer [B K S h] (the orders the two matmuls of a
    decode step read contiguously). lengths_B: cached tokens. stop_state_B, ban_state_B: states
    of the stop and ban automata. budget_B: tokens the row may still sample this turn. live_B:
    decoding or not. seeds_B2: the row's sampling key.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    lengths_B: Array
    pending_B: Array
    stop_state_B: Array
    ban_state_B: Array
    budget_B: Array
    live_B: Array
    seeds_B2: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefix:
    """The KV of R prefilled prompts: per layer keys [R K h P], values [R K P h]."""

    keys: tuple[Array, ...]
    values: tuple[Array, ...]


def empty_state(model: DecoderConfig, config: EngineConfig, mesh: Mesh, dtype) -> EngineState:
    """A state with every slot free, laid out over the mesh (rows, and heads over `tensor`)."""
    rows, heads = config.slots, model.num_key_value_heads
    cache = named_sharding(mesh, ("rows", "kv_heads", None, None))
    row = named_sharding(mesh, ("rows",))

    def zeros(shape, dtype, sharding):
        return jax.device_put(jnp.zeros(shape, dtype), sharding)

    layers = range(model.num_hidden_layers)
    key_shape = (rows, heads, model.head_dim, config.capacity)
    value_shape = (rows, heads, config.capacity, model.head_dim)
    return EngineState(
        keys=tuple(zeros(key_shape, dtype, cache) for _ in layers),
        values=tuple(zeros(value_shape, dtype, cache) for _ in layers),
        lengths_B=zeros((rows,), jnp.int32, row),
        pending_B=zeros((rows,), jnp.int32, row),
        stop_state_B=zeros((rows,), jnp.int32, row),
        ban_state_B=zeros((rows,), jnp.int32, row),
        budget_B=zeros((rows,), jnp.int32, row),
        live_B=zeros((rows,), jnp.bool_, row),
        seeds_B2=zeros((rows, 2), jnp.uint32, named_sharding(mesh, ("rows", None))),
    )


def write_rows(
    cache: tuple[Float[Array, "B K x y"], ...],
    new: tuple[Float[Array, "R K u w"], ...],
    slots_R: Int[Array, " R"],
    starts_R: Int[Array, " R"],
    axis: int,
) -> tuple[Float[Array, "B K x y"], ...]:
    """Writes block r of every layer into slot `slots_R[r]` at `starts_R[r]` along `axis`.

    A slot number outside the cache marks a padding row: it writes nothing. The loop runs over
    rows because XLA's CPU scatter is many times slower than slices updated in place.
    """
    slots = cache[0].shape[0]

    def body(r: Int[Array, ""], cache: tuple[Array, ...]) -> tuple[Array, ...]:
        start = [jnp.minimum(slots_R[r], slots - 1), 0, 0, 0]
        start[axis] = starts_R[r]

        def put(layer_cache: Array, layer_new: Array) -> Array:
            block = jax.lax.dynamic_slice_in_dim(layer_new, r, 1)
            old = jax.lax.dynamic_slice(layer_cache, start, block.shape)
            block = jnp.where(slots_R[r] < slots, block, old)
            return jax.lax.dynamic_update_slice(layer_cache, block, start)

        return tuple(put(c, n) for c, n in zip(cache, new, strict=True))

    return jax.lax.fori_loop(0, slots_R.shape[0], body, cache)
