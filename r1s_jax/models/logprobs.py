"""Log-probabilities of given tokens, without ever holding [B, T, V] logits.

The vocabulary is walked in blocks, forward and backward, with a running maximum and sum as in flash
attention. So the output matrix's gradient is written once, block by block, and on a mesh no device
ever holds more of the matrix than its own shard and one block: a block's columns are gathered over
"fsdp" when its turn comes, its gradient is summed and scattered at once, and what is split over
"tensor" stays split (a few numbers a position cross it, and the gradient by the hidden states).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from r1s_jax.models.decoder import DecoderConfig, Params, Remat, bind
from r1s_jax.models.packed import packed_attend
from r1s_jax.sharding import partition_spec

# Logits that are alive at a time on a device; the backward pass needs two or three such arrays.
BLOCK_BYTES = 64 * 2**20
LANES = 128  # a block is rounded up to a multiple of it


def token_logprobs(
    model: DecoderConfig,
    params: Params,
    tokens_BT: Int[Array, "B T"],
    *,
    positions_BT: Int[Array, "B T"] | None = None,
    segments_BT: Int[Array, "B T"] | None = None,
    mesh: Mesh | None = None,
    temperature: float = 1.0,
    dtype: DTypeLike | None = None,
    scan: bool = False,
    remat: Remat = "none",
    entropy_gradient: bool = False,
    positions_per_chunk: int = 1024,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probability of every token given those before it, and the entropy of its distribution.

    Index t speaks of token t; index 0, which nothing predicts, is 0 in both. A row may hold several
    episodes: `segments_BT` names each token's, `positions_BT` counts from 0 in each, and no episode
    sees another. What stands at an episode's first token is finite and means nothing. Without them
    a row is one episode, padded on the right, if at all.

    The entropy carries a gradient only with `entropy_gradient`. `dtype` is what the layers compute
    in; `scan` and `remat` as in `Decoder`. On a `mesh` rows must divide over data and fsdp, heads
    and vocabulary over tensor, the hidden width over fsdp. At a time there are about as many logits
    as `positions_per_chunk` positions have, and no more than BLOCK_BYTES hold on a device.
    """
    rows, length = tokens_BT.shape
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(length), (rows, length))
    decoder = bind(model, params, dtype)
    attend = packed_attend(segments_BT, mesh)
    hidden, _ = decoder(tokens_BT, positions_BT, attend, scan=scan, remat=remat)
    scored: Any = score(
        How(mesh, temperature, entropy_gradient, positions_per_chunk),
        hidden,
        params["embedding" if model.tie_word_embeddings else "lm_head"],
        # A row's last position predicts nothing; what it says of its first token is dropped.
        jnp.roll(tokens_BT, -1, axis=1),
    )
    logprobs, entropy = (jnp.pad(x[:, :-1], ((0, 0), (1, 0))) for x in scored)
    return logprobs, entropy if entropy_gradient else jax.lax.stop_gradient(entropy)


class How(NamedTuple):
    """All that `score` takes beside arrays; see `token_logprobs`."""

    mesh: Mesh | None
    temperature: float
    entropy_gradient: bool
    positions_per_chunk: int

    def on_shards(self, run: Any, arguments: str, results: str) -> Any:
        """`run` on each device's shards of h(idden), w(eight matrix), or a number a t(oken)."""
        if self.mesh is None:
            return run
        specs = {
            "h": partition_spec(("rows", None, None)),
            "w": partition_spec(("vocab", "embed")),
            "t": partition_spec(("rows", None)),
        }
        wanted = (tuple(specs[letter] for letter in letters) for letters in (arguments, results))
        ins, outs = wanted
        return jax.shard_map(run, mesh=self.mesh, in_specs=ins, out_specs=outs, check_vma=False)

    def block(self, positions: int, vocabulary: int) -> int:
        """Tokens of the vocabulary at a time, for so many positions and tokens on this device."""
        numbers = min(self.positions_per_chunk * vocabulary, BLOCK_BYTES // 4)
        return min(-(-numbers // (positions * LANES)) * LANES, vocabulary)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def score(
    how: How,
    hidden_BTD: Float[Array, "B T D"],
    table_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probability of the targets under hidden @ table.T / temperature, and the entropy."""
    return _forward(how, hidden_BTD, table_VD, targets_BT)[0]


def _forward(how: How, hidden_BTD: Array, table_VD: Array, targets_BT: Array) -> Any:
    """The results, and what the backward pass needs."""
    run = how.on_shards(functools.partial(_forward_shard, how), "hwt", "ttt")
    logprobs, entropy, level = run(hidden_BTD, table_VD, targets_BT)
    return (logprobs, entropy), (hidden_BTD, table_VD, targets_BT, level, entropy)


def _backward(how: How, kept: Any, grads: tuple[Array, Array]) -> tuple[Array, Array, None]:
    run = how.on_shards(functools.partial(_backward_shard, how), "hwttttt", "hw")
    return *run(*kept, *grads), None


score.defvjp(_forward, _backward)


def _forward_shard(
    how: How,
    hidden_BTD: Float[Array, "B T D"],
    table_VD: Float[Array, "V d"],
    targets_BT: Int[Array, "B T"],
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Float[Array, "B T"]]:
    """(log-probability, entropy, normaliser) from this device's share of rows and vocabulary.

    With peak m over all logits l, s = sum exp(l - m) and u = sum exp(l - m) l: the normaliser is
    m + log s, the entropy that less u / s.
    """
    hidden_ND, targets_N = hidden_BTD.reshape(-1, hidden_BTD.shape[2]), targets_BT.reshape(-1)
    blocks = _Blocks(how, hidden_ND, table_VD, targets_N)

    def step(i: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        peak_N, total_N, weighted_N, picked_N = sums
        logits, place_N, fresh = blocks.logits(i)
        seen = jnp.where(fresh, logits, -jnp.inf)
        new_N = jnp.maximum(peak_N, seen.max(axis=1))
        weights = jnp.exp(seen - new_N[:, None])
        decay_N = jnp.exp(peak_N - new_N)
        total_N = total_N * decay_N + weights.sum(axis=1)
        weighted_N = weighted_N * decay_N + (weights * logits).sum(axis=1)
        inside = (place_N >= 0) & (place_N < blocks.size)
        column = jnp.clip(place_N, 0, blocks.size - 1)[:, None]
        found = jnp.take_along_axis(logits, column, axis=1)[:, 0]
        return new_N, total_N, weighted_N, jnp.where(inside, found, picked_N)

    nothing = jnp.zeros(targets_N.shape, jnp.float32)
    start = (nothing - jnp.inf, nothing, nothing, nothing)
    peak_N, total_N, weighted_N, picked_N = jax.lax.fori_loop(0, blocks.count, step, start)
    if how.mesh is not None:
        top_N = jax.lax.pmax(peak_N, "tensor")
        decay_N = jnp.exp(peak_N - top_N)
        sums = (total_N * decay_N, weighted_N * decay_N, picked_N)
        total_N, weighted_N, picked_N = jax.lax.psum(sums, "tensor")
        peak_N = top_N
    level_N = peak_N + jnp.log(total_N)
    results = (picked_N - level_N, level_N - weighted_N / total_N, level_N)
    logprobs, entropy, level = (x.reshape(targets_BT.shape) for x in results)
    return logprobs, entropy, level


def _backward_shard(
    how: How,
    hidden_BTD: Float[Array, "B T D"],
    table_VD: Float[Array, "V d"],
    targets_BT: Int[Array, "B T"],
    level_BT: Float[Array, "B T"],
    entropy_BT: Float[Array, "B T"],
    d_logprobs_BT: Float[Array, "B T"],
    d_entropy_BT: Float[Array, "B T"],
) -> tuple[Float[Array, "B T D"], Float[Array, "V d"]]:
    """Gradients by the hidden states and by this device's shard of the output matrix.

    With p the softmax, L the normaliser and E the entropy, the log-probability's gradient by the
    logits l is onehot - p, the entropy's -p (l - L + E).
    """
    hidden_ND, targets_N = hidden_BTD.reshape(-1, hidden_BTD.shape[2]), targets_BT.reshape(-1)
    blocks = _Blocks(how, hidden_ND, table_VD, targets_N)
    rest = (level_BT, entropy_BT, d_logprobs_BT, d_entropy_BT)
    level, entropy, d_logprobs, d_entropy = (x.reshape(-1, 1) for x in rest)

    def step(i: Array, grads: tuple[Array, Array]) -> tuple[Array, Array]:
        d_hidden_ND, d_table_VD = grads
        logits, place_N, fresh = blocks.logits(i)
        weights = jnp.exp(logits - level)
        slope = d_logprobs
        if how.entropy_gradient:
            slope = slope + d_entropy * (logits - level + entropy)
        picked = jnp.arange(blocks.size) == place_N[:, None]
        d_logits = jnp.where(picked, d_logprobs, 0) - slope * weights
        d_logits = jnp.where(fresh, d_logits / how.temperature, 0).astype(hidden_ND.dtype)
        d_hidden_ND = d_hidden_ND + _dot(d_logits, blocks.rows(i), 1, 0)
        d_block = blocks.sum_up(_dot(d_logits, hidden_ND, 0, 0))
        return d_hidden_ND, blocks.add(i, d_table_VD, d_block)

    zeros = [jnp.zeros(x.shape, jnp.float32) for x in (hidden_ND, table_VD)]
    d_hidden_ND, d_table_VD = jax.lax.fori_loop(0, blocks.count, step, tuple(zeros))
    if how.mesh is not None:
        d_hidden_ND = jax.lax.psum(d_hidden_ND, "tensor")
    d_hidden_BTD = d_hidden_ND.astype(hidden_BTD.dtype).reshape(hidden_BTD.shape)
    return d_hidden_BTD, d_table_VD.astype(table_VD.dtype)


class _Blocks:
    """This device's share of the vocabulary, `size` tokens at a time.

    The last block begins early enough to be whole; what the one before it has had is not `fresh`.
    """

    def __init__(self, how: How, hidden_ND: Array, table_VD: Array, targets_N: Array):
        self._how, self._hidden, self._table, self._targets = how, hidden_ND, table_VD, targets_N
        self._length = table_VD.shape[0]
        self.size = how.block(hidden_ND.shape[0], self._length)
        self.count = -(-self._length // self.size)

    def _begin(self, i: Array) -> Array:
        return jnp.minimum(i * self.size, self._length - self.size)

    def rows(self, i: Array) -> Float[Array, "S D"]:
        """The block's rows of the output matrix, whole, in the type of the hidden states."""
        block = jax.lax.dynamic_slice_in_dim(self._table, self._begin(i), self.size)
        block = block.astype(self._hidden.dtype)
        if self._how.mesh is None:
            return block
        return jax.lax.all_gather(block, "fsdp", axis=1, tiled=True)

    def logits(self, i: Array) -> tuple[Float[Array, "N S"], Int[Array, " N"], Array]:
        """(logits, the targets' places in the block, which tokens are new to the walk)."""
        begin = self._begin(i)
        logits = _dot(self._hidden, self.rows(i), 1, 1) / self._how.temperature
        place_N = self._targets - begin
        if self._how.mesh is not None:
            place_N = place_N - jax.lax.axis_index("tensor") * self._length
        return logits, place_N, begin + jnp.arange(self.size) >= i * self.size

    def sum_up(self, d_block: Float[Array, "S D"]) -> Float[Array, "S d"]:
        """The block's gradient over all rows, this device's columns."""
        if self._how.mesh is None:
            return d_block
        d_block = jax.lax.psum_scatter(d_block, "fsdp", scatter_dimension=1, tiled=True)
        return jax.lax.psum(d_block, "data")

    def add(self, i: Array, d_table: Array, d_block: Array) -> Array:
        begin = self._begin(i)
        there = jax.lax.dynamic_slice_in_dim(d_table, begin, self.size)
        return jax.lax.dynamic_update_slice_in_dim(d_table, there + d_block, begin, axis=0)


def _dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    axes = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)
