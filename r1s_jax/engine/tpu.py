"""The paged KV cache on TPUs: one operation that appends tokens to pages and attends to them.

Tokens are written by a small Pallas kernel of our own, in place. They are read by the ragged paged
attention kernel that JAX ships, whose page layout is therefore ours:

    pages [N, P, C, w]: N pages of P tokens, C combined heads (K and V alternate), w numbers a head

All layers share the pool; a layer is chosen by adding its offset to the page ids. Heads and width
are padded to what the kernel can tile, see `page_shape`. Everything here works on the local shard.

No compiler can see into a kernel, so each tells it what it costs (`append_cost`, `attend_cost`).
Prompts are written in blocks like all else: splash attention, which needs them whole and in a
program of its own, would save some 3 % of their prefill (LLO bundles for 512 tokens on v5e).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention
from jax.typing import DTypeLike
from jaxtyping import Float, Int, Real

from r1s_jax.engine.cache import AppendAttend
from r1s_jax.models.decoder import DecoderConfig

# Logical axes of the pool; the first is the pages of all lanes.
AXES = (("rows", None, "kv_heads", None),)
LANES = 128  # a head's numbers lie along the lanes of a vector register
# Tokens of KV per step of the kernel. It always fetches whole blocks: a decoding row pays for half
# a block too many, but fewer blocks cost fewer instructions, which is what bounds long queries.
DECODE_BLOCK = 256
EXTEND_BLOCK = 512
# Queries per step of the kernel. It computes all of them against each sequence that has one among
# them, so a decoding row stands alone.
EXTEND_QUERIES = 32
VMEM_BYTES = 16 * 2**20


def page_shapes(
    model: DecoderConfig, pages: int, page: int, dtype: DTypeLike, tensor: int
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """A lane's pool of `pages` pages a layer, `page` tokens each, the trash included."""
    shape = page_shape(model.num_key_value_heads, model.head_dim, dtype, tensor, page)
    return (jax.ShapeDtypeStruct((model.num_hidden_layers * pages, *shape), dtype),)


def page_shape(
    kv_heads: int, head_dim: int, dtype: DTypeLike, tensor: int, page: int
) -> tuple[int, int, int]:
    """The global shape [P, C, w] of one page whose heads are split over `tensor` devices.

    Each device holds its heads padded to 1 (2 of int8), 2, 4 or a multiple of 8 and `head_dim`
    padded to a multiple of 128; the padding is zeros. Raises ValueError where heads do not split
    evenly, or the type is none of bfloat16, float32 and int8.
    """
    if kv_heads % tensor:
        raise ValueError(f"{kv_heads} key/value heads cannot be split over {tensor} devices")
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32, jnp.int8):
        raise ValueError(f"pages of {jnp.dtype(dtype)}: the kernel takes bfloat16, float32, int8")
    heads = kv_heads // tensor
    padded = -(-heads // 8) * 8 if heads > 4 else 1 << (heads - 1).bit_length()
    if jnp.dtype(dtype) == jnp.int8:  # four to a word
        padded = max(padded, 2)
    return page, 2 * padded * tensor, -(-head_dim // LANES) * LANES


def bind(platform: str, expected_length: int | None) -> AppendAttend:
    """`append_attend` for sequences that are so long on average, by its own account of its cost."""
    return functools.partial(append_attend, expected_length=expected_length)


def append_attend(
    pages: tuple[Real[Array, "N P C w"]],
    q_RTHh: Float[Array, "R T H h"],
    k_RTKh: Real[Array, "R T K h"],
    v_RTKh: Real[Array, "R T K h"],
    table_RJ: Int[Array, "R J"],
    starts_R: Int[Array, " R"],
    counts_R: Int[Array, " R"],
    *,
    expected_length: int | None = None,
) -> tuple[Float[Array, "R T H h"], tuple[Real[Array, "N P C w"]]]:
    """Writes the blocks' keys and values to their pages, then lets every query look back.

    Block r holds tokens starts_R[r] .. starts_R[r] + counts_R[r] - 1 of the sequence whose pages
    are table_RJ[r]; several blocks may belong to one sequence. A query attends to its own and all
    earlier positions of its sequence, scores scaled by h**-0.5. Beyond counts_R[r] nothing is
    written and the result is zero. All page ids must exist, those of empty blocks too, and the
    pool be finite throughout: what lies beyond a sequence's end is read and weighted by zero.

    `expected_length` is the mean number of tokens that a block looks back on, itself included, for
    the cost estimate alone; by default all that the table can hold.

    Raises ValueError where the pages' heads, width or type do not fit the keys and queries.
    """
    (pool,) = pages
    rows, tokens, heads, width = q_RTHh.shape
    _check(pool, q_RTHh, k_RTKh)
    _, page, combined, lanes = pool.shape
    kv_heads, padded = k_RTKh.shape[2], combined // 2
    length = table_RJ.shape[1] * page
    expected = length if expected_length is None else min(expected_length, length)

    def pad(x: Array, to: int) -> Array:
        return jnp.pad(x, ((0, 0), (0, 0), (0, to - x.shape[2]), (0, lanes - width)))

    new = jnp.stack([pad(k_RTKh, padded), pad(v_RTKh, padded)], axis=3)
    new = new.reshape(rows, tokens, combined, lanes)
    pool = append(pool, new, table_RJ, starts_R, counts_R)

    q = pad(q_RTHh, heads // kv_heads * padded)
    live = counts_R > 0
    # Blocks keep their places: an empty one costs no more than the shortest sequence, those after
    # the last live one nothing. The kernel cannot end on less than one sequence.
    last = jnp.max(jnp.where(live, jnp.arange(rows) + 1, 1), keepdims=True)
    queries, block = _block_sizes(tokens, page, table_RJ.shape[1])
    attend = functools.partial(
        ragged_paged_attention,
        sm_scale=width**-0.5,
        # Integers are read as they are; the scales of their channels are not the kernel's matter.
        k_scale=1.0 if pool.dtype == jnp.int8 else None,
        v_scale=1.0 if pool.dtype == jnp.int8 else None,
        num_kv_pages_per_block=block // page,
        num_queries_per_block=queries,
        vmem_limit_bytes=VMEM_BYTES,
    )
    cost = attend_cost(q.shape, pool.shape, table_RJ.shape[1], expected, pool.dtype)
    mixed = _with_cost(attend, cost)(
        q.reshape(rows * tokens, *q.shape[2:]),
        # A pool small enough would otherwise travel to the chip's vector memory and back.
        pltpu.with_memory_space_constraint(pool, pltpu.HBM),
        (jnp.where(live, starts_R, 0) + tokens).astype(jnp.int32),
        table_RJ.astype(jnp.int32),
        jnp.arange(rows + 1, dtype=jnp.int32) * tokens,
        last.astype(jnp.int32),
    )
    mixed = mixed.reshape(rows, tokens, *q.shape[2:])[:, :, :heads, :width]
    # What the kernel leaves for queries that are none is whatever the memory held.
    real = jnp.arange(tokens) < counts_R[:, None]
    return jnp.where(real[:, :, None, None], mixed, 0), (pool,)


def append(
    pages: Real[Array, "N P C w"],
    new: Real[Array, "R T C w"],
    table_RJ: Int[Array, "R J"],
    starts_R: Int[Array, " R"],
    counts_R: Int[Array, " R"],
) -> Real[Array, "N P C w"]:
    """Writes the first counts_R[r] tokens of each block into its pages, in place."""
    page = pages.shape[1]
    kernel = functools.partial(_append_kernel, spans=(new.shape[1] + page - 2) // page + 1)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    scalars = [x.astype(jnp.int32) for x in (table_RJ, starts_R, counts_R)]
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(1,),
            in_specs=[anywhere, anywhere],
            out_specs=anywhere,
            scratch_shapes=[pltpu.SemaphoreType.DMA],
        ),
        out_shape=jax.ShapeDtypeStruct(pages.shape, pages.dtype),
        input_output_aliases={len(scalars) + 1: 0},
        cost_estimate=append_cost(new.shape, pages.dtype),
        name="append_to_pages",
    )(*scalars, new, pltpu.with_memory_space_constraint(pages, pltpu.HBM))


def _append_kernel(
    table_ref: Any,
    starts_ref: Any,
    counts_ref: Any,
    new_ref: Any,
    _: Any,
    pages_ref: Any,
    semaphore: Any,
    *,
    spans: int,
) -> None:
    """Copies each block's run within each of the at most `spans` pages it touches."""
    rows, pages_per_row = table_ref.shape
    page = pages_ref.shape[1]

    def each(act: Callable[[Any], None]) -> None:
        @pl.loop(0, rows)
        def _(r: Array) -> None:
            start = starts_ref[r]
            end = start + counts_ref[r]
            for span in range(spans):
                index = jax.lax.div(start, page) + span
                first = jnp.maximum(start, index * page)
                size = jnp.minimum(end, (index + 1) * page) - first

                @pl.when(size > 0)
                def _(index: Array = index, first: Array = first, size: Array = size) -> None:
                    there = table_ref[r, jnp.minimum(index, pages_per_row - 1)]
                    act(
                        pltpu.make_async_copy(
                            new_ref.at[r, pl.ds(first - start, size)],
                            pages_ref.at[there, pl.ds(first - index * page, size)],
                            semaphore,
                        )
                    )

    # All copies are under way before the first is waited for.
    each(lambda copy: copy.start())
    each(lambda copy: copy.wait())


def append_cost(new_shape: tuple[int, ...], dtype: DTypeLike) -> pl.CostEstimate:
    """Each new token is read once and written once."""
    size = math.prod(new_shape) * jnp.dtype(dtype).itemsize
    return pl.CostEstimate(flops=0, bytes_accessed=2 * size, transcendentals=0)


def attend_cost(
    q_shape: tuple[int, ...],
    pages_shape: tuple[int, ...],
    pages_per_row: int,
    length: int,
    dtype: DTypeLike,
) -> pl.CostEstimate:
    """What the attention kernel reads, writes and computes for rows of mean `length`.

    For each of its query blocks it fetches all of the sequence in whole KV blocks, on average half
    a block more than there is, and multiplies all queries with all that it fetched, causal or not:
    4 w FLOPs and one exponential per pair and head. (Padded shapes: [R T H w] and [N P C w].)
    """
    rows, tokens, heads, lanes = q_shape
    _, page, combined, _ = pages_shape
    queries, block = _block_sizes(tokens, page, pages_per_row)
    most = -(-pages_per_row * page // block) * block
    fetched = min(length + block // 2, most)
    reads = rows * -(-tokens // queries)
    pairs = reads * queries * fetched * heads
    size = jnp.dtype(dtype).itemsize
    moved = reads * fetched * combined * lanes + 2 * rows * tokens * heads * lanes
    return pl.CostEstimate(
        flops=4 * pairs * lanes, bytes_accessed=moved * size, transcendentals=pairs
    )


def _block_sizes(tokens: int, page: int, pages_per_row: int) -> tuple[int, int]:
    """Queries and KV tokens per step of the attention kernel."""
    block = DECODE_BLOCK if tokens == 1 else EXTEND_BLOCK
    pages = min(max(block // page, 1), pages_per_row)
    return min(tokens, EXTEND_QUERIES), pages * page


def _with_cost(call: Callable[..., Any], cost: pl.CostEstimate) -> Callable[..., Array]:
    """`call` with `cost` as the estimate of its one kernel; JAX's kernels take none themselves."""

    found: list[Any] = []

    def priced(param: Any) -> Any:
        if isinstance(param, jax.extend.core.ClosedJaxpr):
            return param.replace(jaxpr=priced(param.jaxpr))
        if not isinstance(param, jax.extend.core.Jaxpr):
            return param
        eqns = []
        for eqn in param.eqns:
            if eqn.primitive.name == "pallas_call":
                found.append(eqn)
                params = eqn.params | {"cost_estimate": cost}
            else:
                params = {name: priced(inner) for name, inner in eqn.params.items()}
            eqns.append(eqn.replace(params=params))
        return param.replace(eqns=eqns)

    def run(*args: Array) -> Array:
        jaxpr = priced(jax.make_jaxpr(call)(*args))
        assert len(found) == 1, f"{len(found)} kernels"
        (out,) = jax.extend.core.jaxpr_as_fun(jaxpr)(*args)
        return out

    return run


def _check(pages: Array, q_RTHh: Array, k_RTKh: Array) -> None:
    """Raises ValueError, naming the numbers, where the kernel could not take these arrays."""
    _, page, combined, lanes = pages.shape
    heads, kv_heads, width = q_RTHh.shape[2], k_RTKh.shape[2], k_RTKh.shape[3]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are no multiple of {kv_heads} key/value heads")
    if pages.dtype != k_RTKh.dtype or pages.dtype not in (q_RTHh.dtype, jnp.int8):
        raise ValueError(f"pages are {pages.dtype}, queries {q_RTHh.dtype}, keys {k_RTKh.dtype}")
    wanted = page_shape(kv_heads, width, pages.dtype, 1, page)
    if (page, combined, lanes) != wanted:
        raise ValueError(
            f"pages hold [C w] = [{combined} {lanes}], but {kv_heads} key/value heads of width "
            f"{width} on this device want [{wanted[1]} {wanted[2]}]"
        )
