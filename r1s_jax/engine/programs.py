"""The four verbs of the engine, as pure functions ready to be jitted.

    prefill(tokens)          -> KV of prompt prefixes
    insert(prefix, slots)    -> copies them into slots (n samples, one prefill)
    decode_chunk(state)      -> up to C tokens for every live row
    extend(slots, tokens)    -> documents on top of parked rows

No program reads across rows, so a row's numbers depend on nothing but itself.
"""

from __future__ import annotations

import dataclasses
import enum
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, UInt32

from r1s_jax.engine.sampling import SamplingConfig, sample
from r1s_jax.engine.state import EngineState, Prefix, write_rows
from r1s_jax.models.attention import MASKED, attention, causal_mask
from r1s_jax.models.decoder import DecoderConfig, Params, bind


class Stop(enum.IntEnum):
    """Why a row stopped inside a chunk."""

    RUNNING = 0
    STRING = 1
    EOS = 2
    BUDGET = 3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class StopTables:
    """The byte automata composed with the vocabulary: next [S V], accepting [S]; EOS ids.

    The `banned` pair is a second automaton: a token that leads it to an accepting state
    cannot be drawn. Empty tables ([1 1]) where nothing is banned.
    """

    next_SV: Array
    accepting_S: Array
    eos_ids: Array
    banned_next_SV: Array
    banned_accepting_S: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """What a decode chunk wrote: tokens and log-probs [B C], valid up to counts_B, and stops_B."""

    tokens_BC: Array
    logprobs_BC: Array
    counts_B: Array
    stops_B: Array


def prefill(model: DecoderConfig, params: Params, tokens_RP: Int[Array, "R P"]) -> Prefix:
    """KV of R right-padded prompts; padding comes after a row's tokens and is never looked at."""
    rows, length = tokens_RP.shape
    mask = causal_mask(length)

    def attend(_: int, q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, Array]]:
        return attention(q, k, v, mask), cache_order(k, v)

    positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
    _, kept = bind(model, params)(tokens_RP, positions, attend)
    keys, values = zip(*kept, strict=True)
    return Prefix(keys=keys, values=values)


def insert(
    state: EngineState,
    prefix: Prefix,
    source_B: Int[Array, " B"],
    lengths_B: Int[Array, " B"],
    pending_B: Int[Array, " B"],
    budget_B: Int[Array, " B"],
    seeds_B2: UInt32[Array, "B 2"],
) -> EngineState:
    """Starts episodes: slot b takes row `source_B[b]` of the prefix, or keeps its own if < 0."""
    fresh = source_B >= 0
    source = jnp.maximum(source_B, 0)

    def copy(cache: Array, rows: Array) -> Array:
        old = cache[tuple(slice(size) for size in (cache.shape[0], *rows.shape[1:]))]
        merged = jnp.where(fresh[:, None, None, None], rows[source], old)
        return jax.lax.dynamic_update_slice(cache, merged, (0, 0, 0, 0))

    return EngineState(
        keys=tuple(copy(c, p) for c, p in zip(state.keys, prefix.keys, strict=True)),
        values=tuple(copy(c, p) for c, p in zip(state.values, prefix.values, strict=True)),
        lengths_B=jnp.where(fresh, lengths_B, state.lengths_B),
        pending_B=jnp.where(fresh, pending_B, state.pending_B),
        stop_state_B=jnp.where(fresh, 0, state.stop_state_B),
        ban_state_B=jnp.where(fresh, 0, state.ban_state_B),
        budget_B=jnp.where(fresh, budget_B, state.budget_B),
        live_B=fresh | state.live_B,
        seeds_B2=jnp.where(fresh[:, None], seeds_B2, state.seeds_B2),
    )


def extend(
    model: DecoderConfig,
    params: Params,
    state: EngineState,
    slots_R: Int[Array, " R"],
    tokens_RE: Int[Array, "R E"],
    counts_R: Int[Array, " R"],
    pending_R: Int[Array, " R"],
    budget_R: Int[Array, " R"],
) -> EngineState:
    """Writes `counts_R[r]` tokens on top of the cache of slot `slots_R[r]`.

    A row with a positive budget has its whole block written with this call: it goes live again
    with `pending_R` as its next input and a fresh stop automaton. A slot number >= B is padding.
    """
    length = tokens_RE.shape[1]
    slots = state.lengths_B.shape[0]
    held = jnp.minimum(slots_R, slots - 1)
    starts_R = state.lengths_B[held]
    seen = jnp.arange(state.keys[0].shape[-1])[None] < starts_R[:, None]  # [R S]
    causal = causal_mask(length)[:, None, None]

    def attend(index: int, q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, Array]]:
        q = group_heads(q, k.shape[2])
        k, v = cache_order(k, v)
        pieces = [
            (state.keys[index][held], state.values[index][held], seen[:, None, None, None]),
            (k, v, causal),
        ]
        return cached_attention(q, pieces), (k, v)

    positions = starts_R[:, None] + jnp.arange(length)
    _, kept = bind(model, params)(tokens_RE, positions, attend)
    keys, values = zip(*kept, strict=True)
    done = (budget_R > 0) & (slots_R < slots)

    def put(register: Array, value: Array) -> Array:
        where = jnp.where(done, slots_R, slots)
        return register.at[where].set(value.astype(register.dtype), mode="drop")

    return dataclasses.replace(
        state,
        keys=write_rows(state.keys, keys, slots_R, starts_R, axis=3),
        values=write_rows(state.values, values, slots_R, starts_R, axis=2),
        lengths_B=state.lengths_B.at[slots_R].add(counts_R, mode="drop"),
        pending_B=put(state.pending_B, pending_R),
        stop_state_B=put(state.stop_state_B, jnp.zeros_like(slots_R)),
        ban_state_B=put(state.ban_state_B, jnp.zeros_like(slots_R)),
        budget_B=put(state.budget_B, budget_R),
        live_B=put(state.live_B, jnp.ones_like(slots_R)),
    )


def decode_chunk(
    model: DecoderConfig,
    sampling: SamplingConfig,
    steps: int,
    params: Params,
    tables: StopTables,
    state: EngineState,
) -> tuple[EngineState, Chunk]:
    """Samples up to `steps` tokens for every live row; ends early when no row is live.

    The main cache is only read; new KV goes to a small tail at the same index for all rows and
    is merged once at the end.
    """
    decoder = bind(model, params)
    rows = state.lengths_B.shape[0]
    seen = jnp.arange(state.keys[0].shape[-1])[None] < state.lengths_B[:, None]  # [B S]
    tail_index = jnp.arange(steps)

    def step(carry):
        c, live, pending, stop_state, ban_state, budget, tails, chunk = carry
        tail_keys, tail_values = tails

        def attend(index: int, q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, Array]]:
            k, v = cache_order(k, v)
            k = jax.lax.dynamic_update_slice(tail_keys[index], k, (0, 0, 0, c))
            v = jax.lax.dynamic_update_slice(tail_values[index], v, (0, 0, c, 0))
            pieces = [
                (state.keys[index], state.values[index], seen[:, None, None, None]),
                (k, v, (tail_index <= c)[None, None, None, None]),
            ]
            return cached_attention(group_heads(q, k.shape[1]), pieces), (k, v)

        positions = state.lengths_B + c
        hidden, kept = decoder(pending[:, None], positions[:, None], attend)
        forbidden = None
        if sampling.banned:
            forbidden = tables.banned_accepting_S[tables.banned_next_SV[ban_state]]
        token, logprob = sample(
            decoder.unembed(hidden[:, 0]), state.seeds_B2, positions + 1, sampling, forbidden
        )
        token = jnp.where(live, token, 0)
        if sampling.banned:
            ban_state = jnp.where(live, tables.banned_next_SV[ban_state, token], ban_state)
        stop_state = jnp.where(live, tables.next_SV[stop_state, token], stop_state)
        budget = budget - live
        stops = jnp.where(budget <= 0, Stop.BUDGET, Stop.RUNNING)
        stops = jnp.where((token[:, None] == tables.eos_ids).any(-1), Stop.EOS, stops)
        stops = jnp.where(tables.accepting_S[stop_state], Stop.STRING, stops)
        chunk = Chunk(
            tokens_BC=chunk.tokens_BC.at[:, c].set(token),
            logprobs_BC=chunk.logprobs_BC.at[:, c].set(jnp.where(live, logprob, 0.0)),
            counts_B=chunk.counts_B + live,
            stops_B=jnp.where(live, stops, chunk.stops_B).astype(jnp.int8),
        )
        pending = jnp.where(live, token, pending)
        live = live & (stops == Stop.RUNNING)
        tails = tuple(zip(*kept, strict=True))
        return c + 1, live, pending, stop_state, ban_state, budget, tails, chunk

    def going_on(carry):
        return (carry[0] < steps) & carry[1].any()

    heads, width = model.num_key_value_heads, model.head_dim
    dtype = state.keys[0].dtype
    layers = range(model.num_hidden_layers)
    tails = (
        tuple(jnp.zeros((rows, heads, width, steps), dtype) for _ in layers),
        tuple(jnp.zeros((rows, heads, steps, width), dtype) for _ in layers),
    )
    empty = Chunk(
        tokens_BC=jnp.zeros((rows, steps), jnp.int32),
        logprobs_BC=jnp.zeros((rows, steps), jnp.float32),
        counts_B=jnp.zeros((rows,), jnp.int32),
        stops_B=jnp.zeros((rows,), jnp.int8),
    )
    registers = (state.live_B, state.pending_B, state.stop_state_B, state.ban_state_B)
    carry = (jnp.int32(0), *registers, state.budget_B, tails, empty)
    _, live, pending, stop_state, ban_state, budget, tails, chunk = jax.lax.while_loop(
        going_on, step, carry
    )
    every = jnp.arange(rows)
    state = dataclasses.replace(
        state,
        keys=write_rows(state.keys, tails[0], every, state.lengths_B, axis=3),
        values=write_rows(state.values, tails[1], every, state.lengths_B, axis=2),
        lengths_B=state.lengths_B + chunk.counts_B,
        pending_B=pending,
        stop_state_B=stop_state,
        ban_state_B=ban_state,
        budget_B=budget,
        live_B=live,
    )
    return state, chunk


def cache_order(
    k_BTKh: Float[Array, "B T K h"], v_BTKh: Float[Array, "B T K h"]
) -> tuple[Float[Array, "B K h T"], Float[Array, "B K T h"]]:
    """Keys and values as the cache holds them; see `EngineState`."""
    return jnp.transpose(k_BTKh, (0, 2, 3, 1)), jnp.transpose(v_BTKh, (0, 2, 1, 3))


def group_heads(q_BTHh: Float[Array, "B T H h"], groups: int) -> Float[Array, "B K g T h"]:
    """Splits the query heads over the key/value heads and scales them for the dot product."""
    rows, length, heads, width = q_BTHh.shape
    q = q_BTHh.reshape(rows, length, groups, heads // groups, width) * width**-0.5
    return jnp.transpose(q, (0, 2, 3, 1, 4))


def cached_attention(
    q: Float[Array, "B K g T h"],
    pieces: list[tuple[Float[Array, "B K h _"], Float[Array, "B K _ h"], Bool[Array, "..."]]],
) -> Float[Array, "B T H h"]:
    """One softmax over several runs of keys and values, none of which is copied."""
    scores = [
        jnp.where(
            mask, jnp.einsum("bkgth,bkhs->bkgts", q, k, preferred_element_type=jnp.float32), MASKED
        )
        for k, _, mask in pieces
    ]
    peak = scores[0].max(axis=-1, keepdims=True)
    for other in scores[1:]:
        peak = jnp.maximum(peak, other.max(axis=-1, keepdims=True))
    weights = [jnp.exp(s - peak) for s in scores]
    total = functools.reduce(jnp.add, [w.sum(axis=-1, keepdims=True) for w in weights])
    mixed = functools.reduce(
        jnp.add,
        (
            jnp.einsum("bkgts,bksh->bkgth", w.astype(v.dtype), v)
            for w, (_, v, _) in zip(weights, pieces, strict=True)
        ),
    )
    mixed = mixed / total.astype(mixed.dtype)
    rows, groups, per_group, length, width = q.shape
    return jnp.transpose(mixed, (0, 3, 1, 2, 4)).reshape(rows, length, groups * per_group, width)
