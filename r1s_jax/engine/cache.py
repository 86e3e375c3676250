"""The paged KV cache, and the one operation on it: append tokens to sequences and attend.

All layers' pages lie in one pool, so that layers can be scanned: layer l's page p is page
l * P + p. Page 0 is trash: what padding writes goes there. A sequence is a list of pages (its row
of the table) and a length; pages may be shared, and nobody writes into a shared one.

Here the pool is read with plain array operations, page by page: a step costs what its longest
sequences hold, not what is allocated. A page that a sequence does not reach changes none of its
sums (it adds exact zeros), so a row's numbers do not depend on its companions. `tpu` does the same
with kernels.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int, Real

from r1s_jax.models.attention import MASKED
from r1s_jax.models.decoder import DecoderConfig

# Here keys [N K h p] and values [N K p h]: the orders that the two matmuls of a decode step read
# contiguously.
Pages = tuple[Array, ...]
# Logical axes of the two; the first is the pages of all lanes.
AXES = (("rows", "kv_heads", None, None), ("rows", "kv_heads", None, None))


@runtime_checkable  # for the tests' checks of annotations
class AppendAttend(Protocol):
    """`append_attend`, here or in `tpu`."""

    def __call__(
        self,
        pages: Pages,
        q_RTHh: Array,
        k_RTKh: Array,
        v_RTKh: Array,
        table_RJ: Array,
        starts_R: Array,
        counts_R: Array,
        /,
    ) -> tuple[Array, Pages]: ...


# Sequences that a CPU reads together; the longest of them decides how far.
GROUP = 8


def page_shapes(
    model: DecoderConfig, pages: int, page: int, dtype: DTypeLike, tensor: int
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """A lane's pool of `pages` pages a layer, `page` tokens each, the trash included.

    `tensor` devices share the heads; `tpu` has to know.
    """
    count, heads = model.num_hidden_layers * pages, model.num_key_value_heads
    return (
        jax.ShapeDtypeStruct((count, heads, model.head_dim, page), dtype),
        jax.ShapeDtypeStruct((count, heads, page, model.head_dim), dtype),
    )


def bind(platform: str, expected_length: int | None) -> AppendAttend:
    """`append_attend` as it suits a platform; how long sequences are makes no difference."""
    return partial(append_attend, at_once=platform != "cpu")


def append_attend(
    pages: Pages,
    q_RTHh: Float[Array, "R T H h"],
    k_RTKh: Real[Array, "R T K h"],
    v_RTKh: Real[Array, "R T K h"],
    table_RJ: Int[Array, "R J"],
    starts_R: Int[Array, " R"],
    counts_R: Int[Array, " R"],
    *,
    at_once: bool = False,
) -> tuple[Float[Array, "R T H h"], Pages]:
    """Appends R blocks of up to T tokens to their sequences; every query sees all up to itself.

    Block r's tokens stand at positions starts_R[r] to starts_R[r] + counts_R[r] - 1 of the
    sequence whose pages are table_RJ[r]. All blocks are written before any is read, so blocks that
    follow each other in one sequence may come in one call. What lies beyond a block's count is
    padding: it writes nothing, and its output means nothing.

    `at_once`: for accelerators. A CPU is faster one token and some rows after the other.
    """
    pages = _write(pages, k_RTKh, v_RTKh, table_RJ, starts_R, counts_R, at_once=at_once)
    rows, length, heads, width = q_RTHh.shape
    groups = k_RTKh.shape[2]
    q = q_RTHh.reshape(rows, length, groups, heads // groups, width) * width**-0.5
    q = jnp.moveaxis(q, 1, 3).reshape(rows, groups, -1, width)  # [R K g*T h]
    positions_RT = starts_R[:, None] + jnp.arange(length)
    size = GROUP if rows % GROUP == 0 and not at_once else rows
    read = (q, table_RJ, positions_RT, starts_R + counts_R)
    if size == rows:
        mixed = _attend(pages, *read)
    else:
        groups_of = tuple(x.reshape(rows // size, size, *x.shape[1:]) for x in read)
        mixed = jax.lax.map(lambda xs: _attend(pages, *xs), groups_of)
    mixed = mixed.reshape(rows, groups, heads // groups, length, width)
    return jnp.moveaxis(mixed, 3, 1).reshape(q_RTHh.shape), pages


def copy_pages(
    pages: Pages, sources_M: Int[Array, " M"], targets_M: Int[Array, " M"], per_layer: int
) -> Pages:
    """Copies page sources_M[i] to targets_M[i] in every layer; pairs of 0 at the end are none."""
    pairs = (targets_M > 0).sum()
    layers = pages[0].shape[0] // per_layer

    def body(i: Array, pages: Pages) -> Pages:
        pair, offset = i // layers, i % layers * per_layer

        def put(pool: Array) -> Array:
            one = jax.lax.dynamic_slice_in_dim(pool, sources_M[pair] + offset, 1)
            return jax.lax.dynamic_update_slice_in_dim(pool, one, targets_M[pair] + offset, 0)

        return tuple(put(pool) for pool in pages)

    return jax.lax.fori_loop(0, pairs * layers, body, pages)


def _write(
    pages: Pages,
    k_RTKh: Array,
    v_RTKh: Array,
    table_RJ: Array,
    starts_R: Array,
    counts_R: Array,
    *,
    at_once: bool,
) -> Pages:
    keys, values = pages
    _, length, *rest = k_RTKh.shape
    page = values.shape[2]
    positions = starts_R[:, None] + jnp.arange(length)
    inside = jnp.arange(length) < counts_R[:, None]
    # Trash for padding; indices beyond the table are never used.
    there = jnp.take_along_axis(table_RJ, positions // page, axis=1, mode="clip")
    there, offsets = jnp.where(inside, there, 0).reshape(-1), (positions % page).reshape(-1)
    new_k, new_v = (x.reshape(-1, *rest).astype(keys.dtype) for x in (k_RTKh, v_RTKh))
    if at_once:
        return keys.at[there, :, :, offsets].set(new_k), values.at[there, :, offsets].set(new_v)

    # On a CPU slices updated in place are many times faster than XLA's scatter.
    def body(i: Array, pages: Pages) -> Pages:
        keys, values = pages
        k, v = new_k[i][None, :, :, None], new_v[i][None, :, None, :]
        keys = jax.lax.dynamic_update_slice(keys, k, (there[i], 0, 0, offsets[i]))
        values = jax.lax.dynamic_update_slice(values, v, (there[i], 0, offsets[i], 0))
        return keys, values

    return jax.lax.fori_loop(0, there.shape[0], body, pages)


def _attend(
    pages: Pages,
    q: Float[Array, "R K Q h"],
    table_RJ: Int[Array, "R J"],
    positions_RT: Int[Array, "R T"],
    ends_R: Int[Array, " R"],
) -> Float[Array, "R K Q h"]:
    """Softmax over a sequence's pages, one after the other (Milakov & Gimelshein 2018)."""
    keys, values = pages
    page = values.shape[2]
    # A row's queries come in groups of heads, each over all positions.
    at = jnp.tile(positions_RT, (1, q.shape[2] // positions_RT.shape[1]))[:, None, :, None]

    def body(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        peak, total, mixed = carry
        here = jax.lax.dynamic_index_in_dim(table_RJ, j, 1, keepdims=False)
        scores = jnp.einsum(
            "rkqh,rkhp->rkqp", q, keys[here].astype(q.dtype), preferred_element_type=jnp.float32
        )
        scores = jnp.where(j * page + jnp.arange(page) <= at, scores, MASKED)
        higher = jnp.maximum(peak, scores.max(axis=-1))
        weights = jnp.exp(scores - higher[..., None])
        kept = jnp.exp(peak - higher)
        new = jnp.einsum(
            "rkqp,rkph->rkqh",
            weights.astype(q.dtype),
            values[here].astype(q.dtype),
            preferred_element_type=jnp.float32,
        )
        return higher, total * kept + weights.sum(axis=-1), mixed * kept[..., None] + new

    # Position 0 is seen by every query, so the first page already holds a finite peak.
    start = jnp.full(q.shape[:3], MASKED, jnp.float32)
    empty = (start, jnp.zeros_like(start), jnp.zeros(q.shape, jnp.float32))
    pages_used = jnp.maximum((ends_R.max() + page - 1) // page, 1)
    _, total, mixed = jax.lax.fori_loop(0, pages_used, body, empty)
    return (mixed / total[..., None]).astype(q.dtype)
