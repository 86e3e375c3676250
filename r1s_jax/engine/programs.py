"""What the engine runs on the device, as pure functions ready to be jitted.

    extend(pages, blocks)       -> prompts and documents written into their pages
    copy_pages(pages, pairs)    -> a shared prompt's last page made a sample's own
    decode_chunk(pages, rows)   -> up to C tokens for every row

No program reads across rows, so a row's numbers depend on nothing but itself; and since a token's
KV goes to its place in the pages at once, neither do they on where a chunk or a block ends.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Int

from r1s_jax.engine import quantize
from r1s_jax.engine.cache import AppendAttend, Pages
from r1s_jax.engine.sampling import SamplingConfig, sample
from r1s_jax.engine.state import Chunk, Rows
from r1s_jax.models.decoder import DecoderConfig, Params, hidden_states, unembed


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """What all programs of an engine share: the policy's shape and how its cache is read."""

    model: DecoderConfig
    append_attend: AppendAttend
    pages_per_layer: int  # of one lane, the trash included
    scan: bool

    def attend(self, params: Params, table_RJ: Array, starts_R: Array, counts_R: Array):
        """The decoder's `attend` callback: the layer's part of the pool, and its scales if any."""
        scales = params.get("cache_scales")

        def attend(layer: Any, pages: Any, q: Array, k: Array, v: Array) -> tuple[Array, Any]:
            table = table_RJ + layer * self.pages_per_layer
            # A page's next owner multiplies what is left in it by zero: NaN would stay NaN.
            k, v = (jnp.where(jnp.isfinite(x), x, 0) for x in (k, v))
            if scales is None:
                return self.append_attend(pages, q, k, v, table, starts_R, counts_R)
            k_scale, v_scale = (scale[layer] for scale in scales)
            q = quantize.scaled(q, k_scale)
            k, v = quantize.rounded(k, k_scale), quantize.rounded(v, v_scale)
            mixed, pages = self.append_attend(pages, q, k, v, table, starts_R, counts_R)
            return quantize.scaled(mixed, v_scale), pages

        return attend


def extend(
    layout: Layout,
    params: Params,
    pages: Pages,
    tokens_RT: Int[Array, "R T"],
    table_RJ: Int[Array, "R J"],
    starts_R: Int[Array, " R"],
    counts_R: Int[Array, " R"],
) -> Pages:
    """Writes the KV of R blocks of tokens, which stand at `starts_R` of their sequences.

    A prompt is a sequence that begins at 0. A count of 0 is padding.
    """
    positions = starts_R[:, None] + jnp.arange(tokens_RT.shape[1])
    attend = layout.attend(params, table_RJ, starts_R, counts_R)
    _, pages = hidden_states(
        layout.model, params, tokens_RT, positions, attend, pages, scan=layout.scan
    )
    return pages


def decode_chunk(
    layout: Layout,
    sampling: SamplingConfig,
    steps: int,
    params: Params,
    tables: StopTables,
    pages: Pages,
    rows: Rows,
    leave: Int[Array, ""],
) -> tuple[Pages, Chunk]:
    """Samples up to `steps` tokens for every row; ends early when `leave` rows or fewer go on."""
    count = rows.lengths_R.shape[0]

    def step(carry):
        c, pages, live, pending, stop_state, ban_state, budget, chunk = carry
        positions = rows.lengths_R + c
        attend = layout.attend(params, rows.table_RJ, positions, live.astype(jnp.int32))
        hidden, pages = hidden_states(
            layout.model,
            params,
            pending[:, None],
            positions[:, None],
            attend,
            pages,
            scan=layout.scan,
        )
        forbidden = None
        if sampling.banned:
            forbidden = tables.banned_accepting_S[tables.banned_next_SV[ban_state]]
        logits = unembed(layout.model, params, hidden[:, 0])
        drawn = sample(logits, rows.seeds_R2, positions + 1, sampling, forbidden)
        token = jnp.where(live, drawn.tokens_B, 0)
        if sampling.banned:
            ban_state = jnp.where(live, tables.banned_next_SV[ban_state, token], ban_state)
        stop_state = jnp.where(live, tables.next_SV[stop_state, token], stop_state)
        budget = budget - live
        stops = jnp.where(budget <= 0, Stop.BUDGET, Stop.RUNNING)
        stops = jnp.where((token[:, None] == tables.eos_ids).any(-1), Stop.EOS, stops)
        stops = jnp.where(tables.accepting_S[stop_state], Stop.STRING, stops)
        keep = lambda x: jnp.where(live, x, 0.0)  # noqa: E731
        chunk = dataclasses.replace(
            chunk,
            tokens_RC=chunk.tokens_RC.at[:, c].set(token),
            logprobs_RC=chunk.logprobs_RC.at[:, c].set(keep(drawn.logprobs_B)),
            drawn_logprobs_RC=chunk.drawn_logprobs_RC.at[:, c].set(keep(drawn.drawn_logprobs_B)),
            counts_R=chunk.counts_R + live,
            stops_R=jnp.where(live, stops, chunk.stops_R).astype(jnp.int8),
        )
        pending = jnp.where(live, token, pending)
        live = live & (stops == Stop.RUNNING)
        return c + 1, pages, live, pending, stop_state, ban_state, budget, chunk

    def going_on(carry):
        return (carry[0] < steps) & (carry[2].sum() > leave)

    empty = Chunk(
        tokens_RC=jnp.zeros((count, steps), jnp.int32),
        logprobs_RC=jnp.zeros((count, steps), jnp.float32),
        drawn_logprobs_RC=jnp.zeros((count, steps), jnp.float32),
        counts_R=jnp.zeros((count,), jnp.int32),
        stops_R=jnp.zeros((count,), jnp.int8),
        stop_state_R=rows.stop_state_R,
        ban_state_R=rows.ban_state_R,
        steps=jnp.int32(0),
    )
    live = rows.budget_R > 0
    registers = (live, rows.pending_R, rows.stop_state_R, rows.ban_state_R, rows.budget_R)
    carry = (jnp.int32(0), pages, *registers, empty)
    c, pages, _, _, stop_state, ban_state, _, chunk = jax.lax.while_loop(going_on, step, carry)
    return pages, dataclasses.replace(
        chunk, stop_state_R=stop_state, ban_state_R=ban_state, steps=c
    )
