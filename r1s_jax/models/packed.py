"""Attention of whole rows that hold several episodes each: causal, and within an episode only.

On TPUs this is the splash kernel (`models.splash`). Elsewhere it is plain jnp, a block of queries
at a time, and each block looks at no key behind its own end: what lies above the diagonal is mostly
never computed, and scores are bounded in bytes. In a long row a block also begins at its own first
episode, and goes through its keys a tile at a time: the cost follows the episodes' lengths, not the
row's. The backward pass is written out (flash attention, Dao et al. 2022, arXiv 2205.14135): it
keeps the normalisers alone and computes a block's scores again, so no layer leaves scores behind,
and no product asks for scores to be transposed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from r1s_jax.models import splash
from r1s_jax.models.attention import MASKED
from r1s_jax.sharding import partition_spec

# Queries of a block. Smaller ones skip more of the upper triangle, larger ones are fewer.
BLOCK = 128
# Rows of more tokens than this are long.
LONG = 1024
# Queries and keys of a long row's tile, all heads together. On CPUs its scores should stay in the
# caches and yet be worth sharing among the cores; an accelerator would rather have few, large ones.
CPU_TILE, TILE = (256, 512), (512, 1024)
# Scores that are alive at a time, of as many short rows and heads as that takes; one group or tile
# at least, which is 2 MB a query head. The backward pass has three such arrays.
SCORE_BYTES = 64 * 2**20
# The same on CPUs, where what leaves the caches costs more than a loop does.
CPU_SCORE_BYTES = 2**20
_HEADS = (((2,), (2,)), ((0,), (0,)))  # [n a h] [n b h] -> [n a b]
_FIRST = (((1,), (1,)), ((0,), (0,)))  # [n a b] [n a c] -> [n b c]
_MIX = (((2,), (1,)), ((0,), (0,)))  # [n a b] [n b h] -> [n a h]


def packed_attend(
    segments_BT: Int[Array, "B T"] | None, mesh: Mesh | None = None
) -> Callable[[Any, Any, Array, Array, Array], tuple[Array, Any]]:
    """The decoder's `attend` callback for whole rows of several episodes; needs no cache.

    A token sees itself and those before it that have its segment id; without ids every row is one
    episode. Tokens of an id stand together. Id 0 is padding, at the end of a row: what comes out
    there is finite and means nothing. With a mesh each device computes its own rows and heads,
    which must divide over it.
    """
    local = packed_attention
    if mesh is not None:
        if mesh.devices.flat[0].platform == "tpu":
            local = splash.attention
        heads = partition_spec(("rows", None, "heads", None))
        local = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(heads, heads, heads, partition_spec(("rows", None))),
            out_specs=heads,
            check_vma=False,
        )
    return lambda _, cache, q, k, v: (local(q, k, v, segments_BT), cache)


@jax.custom_vjp
def packed_attention(
    q_BTHh: Float[Array, "B T H h"],
    k_BTKh: Float[Array, "B T K h"],
    v_BTKh: Float[Array, "B T K h"],
    segments_BT: Int[Array, "B T"] | None,
) -> Float[Array, "B T H h"]:
    """Grouped-query attention in jnp, scores scaled by h**-0.5; softmax in f32."""
    return _forward(q_BTHh, k_BTKh, v_BTKh, segments_BT)[0]


def _forward(
    q_BTHh: Array, k_BTKh: Array, v_BTKh: Array, segments_BT: Array | None
) -> tuple[Array, tuple[Any, ...]]:
    """The result, and what the backward pass needs: nothing larger than the inputs."""
    if q_BTHh.shape[1] > LONG:
        return _forward_long(q_BTHh, k_BTKh, v_BTKh, segments_BT)
    rows, length, heads, width = q_BTHh.shape
    kv_heads = k_BTKh.shape[2]
    q = _by_group(q_BTHh * width**-0.5, kv_heads)
    k, v = (_by_group(x, kv_heads)[:, 0] for x in (k_BTKh, v_BTKh))
    ids = None if segments_BT is None else jnp.repeat(segments_BT, kv_heads, axis=0)
    size = _piece(len(q), length, heads // kv_heads)
    blocks = []
    for start, end in _blocks(length):
        # Nothing behind `end`, and of the queries' side nothing before `start`.
        keys = k[:, :end], v[:, :end], None if ids is None else ids[:, :end]
        blocks.append(_in_pieces(_look_at_end, (q[:, :, start:end], *keys), size))
    out, level = (jnp.concatenate(x, axis=2) for x in zip(*blocks, strict=True))
    return _by_row(out, rows), (q, k, v, ids, out, level)


def _backward(kept: tuple[Any, ...], d_BTHh: Array) -> tuple[Array, Array, Array, None]:
    if d_BTHh.shape[1] > LONG:
        return _backward_long(kept, d_BTHh)
    q, k, v, ids, out, level = kept
    rows, length, _, width = d_BTHh.shape
    size = _piece(len(q), length, q.shape[1])
    d = _by_group(d_BTHh, len(q) // rows)
    # Sum over the keys of weight times its gradient: one number a query, known without them.
    inner = (out.astype(jnp.float32) * d).sum(axis=-1)
    dq = []
    # Transposed, [n h T], which is how the products come without turning the scores.
    dk, dv = jnp.zeros((2, k.shape[0], k.shape[2], k.shape[1]), jnp.float32)
    for start, end in _blocks(length):
        queries = (x[:, :, start:end] for x in (q, d, level, inner))
        keys = k[:, :end], v[:, :end], None if ids is None else ids[:, :end]
        block_q, block_k, block_v = _in_pieces(_look_back_at_end, (*queries, *keys), size)
        dq.append(block_q.astype(q.dtype))
        dk, dv = dk.at[:, :, :end].add(block_k), dv.at[:, :, :end].add(block_v)
    dq = _by_row(jnp.concatenate(dq, axis=2), rows) * width**-0.5
    dk, dv = (_by_row(x.swapaxes(1, 2)[:, None], rows).astype(k.dtype) for x in (dk, dv))
    return dq, dk, dv, None


packed_attention.defvjp(_forward, _backward)


def _forward_long(
    q_BTHh: Array, k_BTKh: Array, v_BTKh: Array, segments_BT: Array | None
) -> tuple[Array, tuple[Any, ...]]:
    """As `_forward`, row by row, since each row has bounds of its own."""
    length, width = q_BTHh.shape[1], q_BTHh.shape[3]
    queries, keys = _tile()
    ids = jnp.ones(q_BTHh.shape[:2], jnp.int32) if segments_BT is None else segments_BT
    ids = _whole_tiles(ids)
    q = _split(q_BTHh * width**-0.5, k_BTKh.shape[2], queries)
    k, v = (_split(x, x.shape[2], keys)[:, :, :, 0] for x in (k_BTKh, v_BTKh))

    def one_row(row: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v, ids = row

        def one_block(block: tuple[Array, ...]) -> tuple[Array, Array]:
            q, start, first, last = block

            def one_tile(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
                out, level = sums
                more, its_level = _look(q, k[i], v[i], _seen(ids, start, i))
                # Where nothing was visible so far, its share is exp(MASKED - level), which is 0.
                both = jnp.logaddexp(level, its_level)
                out = out * jnp.exp(level - both)[..., None]
                return out + more * jnp.exp(its_level - both)[..., None], both

            none = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:-1], MASKED, jnp.float32)
            out, level = jax.lax.fori_loop(first, last, one_tile, none)
            return out.astype(v.dtype), level

        return jax.lax.map(one_block, (q, *_bounds(ids)))

    out, level = jax.lax.map(one_row, (q, k, v, ids))
    return _join(out, length), (q, k, v, ids, out, level)


def _backward_long(kept: tuple[Any, ...], d_BTHh: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, ids, out, level = kept
    length, width = d_BTHh.shape[1], d_BTHh.shape[3]
    d = _split(d_BTHh, k.shape[2], q.shape[4])
    inner = (out.astype(jnp.float32) * d).sum(axis=-1)

    def one_row(row: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        *queries, k, v, ids = row

        def one_block(
            sums: tuple[Array, Array], block: tuple[Array, ...]
        ) -> tuple[tuple[Array, Array], Array]:
            q, d, level, inner, start, first, last = block

            def one_tile(i: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
                dq, dk, dv = sums
                more = _look_back(q, d, level, inner, k[i], v[i], _seen(ids, start, i))
                return dq + more[0], dk.at[i].add(more[1]), dv.at[i].add(more[2])

            none = jnp.zeros(q.shape, jnp.float32)
            dq, dk, dv = jax.lax.fori_loop(first, last, one_tile, (none, *sums))
            return (dk, dv), dq.astype(k.dtype)

        none = jnp.zeros_like(k.swapaxes(2, 3), jnp.float32)
        return jax.lax.scan(one_block, (none, none), (*queries, *_bounds(ids)))

    (dk, dv), dq = jax.lax.map(one_row, (q, d, level, inner, k, v, ids))
    dk, dv = (_join(x.swapaxes(3, 4)[:, :, :, None], length).astype(k.dtype) for x in (dk, dv))
    return _join(dq, length) * width**-0.5, dk, dv, None


def _tile() -> tuple[int, int]:
    return CPU_TILE if jax.default_backend() == "cpu" else TILE


def _bounds(ids: Int[Array, "T"]) -> tuple[Array, Array, Array]:
    """Each block's first token, its first tile of keys and the one it ends before.

    As tokens of an id stand together, a block's first token belongs to its earliest episode.
    """
    queries, keys = _tile()
    starts = jnp.arange(0, len(ids), queries)
    ours = ids[::queries]
    first = jnp.argmax(ours[:, None] == ids, axis=1) // keys
    last = -(-(starts + queries) // keys)
    # A block that begins with padding has nothing else, and looks at nothing.
    return starts, first, jnp.where(ours == 0, first, last)


def _seen(ids: Int[Array, "T"], start: Array, tile: Array) -> Bool[Array, "1 1 t S"]:
    """Which keys of a tile the block of queries from `start` may look at."""
    queries, keys = _tile()
    at, of = start + jnp.arange(queries), tile * keys + jnp.arange(keys)
    ours = jax.lax.dynamic_slice_in_dim(ids, start, queries)
    theirs = jax.lax.dynamic_slice_in_dim(ids, tile * keys, keys)
    return ((at[:, None] >= of) & (ours[:, None] == theirs))[None, None]


def _whole_tiles(x: Array) -> Array:
    """[B T ...] with zeros behind it, up to a multiple of both of a tile's sizes."""
    more = -x.shape[1] % math.lcm(*_tile())
    return jnp.pad(x, ((0, 0), (0, more)) + ((0, 0),) * (x.ndim - 2))


def _split(x_BTHh: Array, kv_heads: int, size: int) -> Float[Array, "B N K G t h"]:
    """Blocks of `size` tokens, heads by the key/value head they share."""
    x = _whole_tiles(x_BTHh)
    rows, length, heads, width = x.shape
    x = x.reshape(rows, length // size, size, kv_heads, heads // kv_heads, width)
    return x.transpose(0, 1, 3, 4, 2, 5)


def _join(x: Float[Array, "B N K G t h"], length: int) -> Float[Array, "B T H h"]:
    rows, blocks, kv_heads, share, size, width = x.shape
    x = x.transpose(0, 1, 4, 2, 3, 5)
    return x.reshape(rows, blocks * size, kv_heads * share, width)[:, :length]


def _look_at_end(q: Array, k: Array, v: Array, ids: Array | None) -> tuple[Array, Array]:
    out, level = _look(q, k, v, _visible(ids, q, k))
    return out.astype(v.dtype), level


def _look_back_at_end(
    q: Array, d: Array, level: Array, inner: Array, k: Array, v: Array, ids: Array | None
) -> tuple[Array, Array, Array]:
    return _look_back(q, d, level, inner, k, v, _visible(ids, q, k))


def _look(
    q: Float[Array, "n G t h"],
    k: Float[Array, "n S h"],
    v: Float[Array, "n S h"],
    seen: Bool[Array, "#n 1 t S"],
) -> tuple[Float[Array, "n G t h"], Float[Array, "n G t"]]:
    """What queries take from the values they see, in f32, and the logarithm of the normaliser."""
    scores = jnp.where(seen, _scores(q, k), MASKED)
    peak = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - peak)
    total = weights.sum(axis=-1)
    mixed = _dot(_flat(weights).astype(v.dtype), v, _MIX).reshape(q.shape) / total[..., None]
    return mixed, peak[..., 0] + jnp.log(total)


def _look_back(
    q: Float[Array, "n G t h"],
    d: Float[Array, "n G t h"],
    level: Float[Array, "n G t"],
    inner: Float[Array, "n G t"],
    k: Float[Array, "n S h"],
    v: Float[Array, "n S h"],
    seen: Bool[Array, "#n 1 t S"],
) -> tuple[Float[Array, "n G t h"], Float[Array, "n h S"], Float[Array, "n h S"]]:
    """Gradients by q, k and v, `d` being that by what `_look` returned first."""
    weights = jnp.exp(_scores(q, k) - level[..., None])
    weights = jnp.where(seen, weights, 0)
    d_scores = weights * (_scores(d, v) - inner[..., None])
    weights, d_scores = (_flat(x).astype(q.dtype) for x in (weights, d_scores))
    dq = _dot(d_scores, k, _MIX).reshape(q.shape)
    return dq, _dot(_flat(q), d_scores, _FIRST), _dot(_flat(d), weights, _FIRST)


def _blocks(length: int) -> list[tuple[int, int]]:
    """Where each block of queries begins and ends."""
    return [(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]


def _visible(ids: Array | None, q: Array, k: Array) -> Bool[Array, "#n 1 t S"]:
    """Which of the keys each of the last queries may look at."""
    tokens, length = q.shape[2], k.shape[1]
    causal = (jnp.arange(length - tokens, length)[:, None] >= jnp.arange(length))[None, None]
    if ids is None:
        return causal
    return causal & (ids[:, None, -tokens:, None] == ids[:, None, None])


def _scores(q: Float[Array, "n G t h"], k: Float[Array, "n S h"]) -> Float[Array, "n G t S"]:
    return _dot(_flat(q), k, _HEADS).reshape(*q.shape[:3], k.shape[1])


def _flat(x: Float[Array, "n G t w"]) -> Float[Array, "n Gt w"]:
    """The queries of a group one behind the other, since they share keys and values."""
    return x.reshape(x.shape[0], -1, x.shape[3])


def _dot(a: Array, b: Array, axes: Any) -> Array:
    return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


def _by_group(x_BTHh: Float[Array, "B T H h"], kv_heads: int) -> Float[Array, "n G T h"]:
    """Rows and key/value heads together first, the query heads of such a group second."""
    rows, length, heads, width = x_BTHh.shape
    split = x_BTHh.reshape(rows, length, kv_heads, heads // kv_heads, width)
    return split.transpose(0, 2, 3, 1, 4).reshape(rows * kv_heads, -1, length, width)


def _by_row(x: Float[Array, "n G T h"], rows: int) -> Float[Array, "B T H h"]:
    return x.reshape(rows, -1, *x.shape[2:]).swapaxes(1, 2)


def _piece(count: int, length: int, heads: int) -> int:
    """How many of `count` groups of so many heads to take at a time."""
    start, end = _blocks(length)[0]
    room = SCORE_BYTES
    if jax.default_backend() == "cpu":
        room = min(room, CPU_SCORE_BYTES)
    block = 4 * heads * (end - start) * length
    # XLA may make the scores of all blocks before it uses any; a loop it does not take apart.
    if count * block * len(_blocks(length)) <= 2 * room:
        return count
    most = max(1, min(room // block, count // 2))
    return next(size for size in range(most, 0, -1) if count % size == 0)


def _in_pieces(run: Callable[..., Any], groups: tuple[Any, ...], size: int) -> Any:
    count = len(groups[0])
    if size == count:
        return run(*groups)
    split = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), groups)
    done = jax.lax.map(lambda piece: run(*piece), split)
    return jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), done)
