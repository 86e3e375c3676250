"""A decode step of the engine, and its parts by themselves, for benchmarks/rollout.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from rollout_ours import SAMPLING

from r1s_jax.engine import cache
from r1s_jax.engine.engine import Engine
from r1s_jax.engine.programs import Stop
from r1s_jax.engine.sampling import row_seed, sample

ROUNDS = 5


def step_seconds(engine: Engine, live: int) -> float:
    """Seconds of a decode step of rows that begin with `live` tokens: the best of its chunks."""
    rng = np.random.default_rng(0)
    slots = []
    for row in range(engine.config.rows):
        prompt = rng.integers(0, engine.model.vocab_size, live).tolist()
        ref = engine.prefill(prompt)
        assert ref is not None
        seed = row_seed(0, "bench", 0, "step", 0, row)
        slots.append(engine.insert(ref, seed=seed, budget=5 * engine.config.chunk))
        engine.drop(ref)
    seconds, left = [], set(slots)
    while left:
        begin = time.perf_counter()
        step = engine.decode_chunk(SAMPLING)
        if len(step.written) == len(slots) and not step.extended:
            seconds.append((time.perf_counter() - begin) / step.steps)
        left -= {w.slot for w in step.written if w.stop != Stop.RUNNING}
    for slot in slots:
        engine.release(slot)
    return min(seconds)


def attention_seconds(engine: Engine, live: int) -> float:
    """Seconds that a step's appending and attending take in all layers, without the rest."""
    model, rows, page = engine.model, engine.config.rows, engine.config.page
    count, each = model.num_hidden_layers, live // page + 1
    per_layer = rows * each + 1
    pages = tuple(
        jnp.zeros(s.shape, s.dtype)
        for s in cache.page_shapes(model, per_layer, page, jnp.float32, 1)
    )
    table = jnp.arange(1, per_layer).reshape(rows, each)
    q = jnp.ones((rows, 1, model.num_attention_heads, model.head_dim))
    append_attend = cache.bind(jax.devices()[0].platform, None)

    # As in `decode_chunk`: a loop over steps, whose numbers the compiler does not know.
    def step(i: Array, carry: Any, table: Array, start: Array) -> Any:
        pages, q = carry
        starts, ones = jnp.full(rows, start), jnp.ones(rows, jnp.int32)
        for layer in range(count):
            where = table + layer * per_layer
            # Made of what the layer before has read: it has to be read before this is written.
            new = q[:, :, : model.num_key_value_heads]
            q, pages = append_attend(pages, q, new, new, where, starts, ones)
        return pages, 1 + q  # nothing so small that a CPU is slow with it

    @partial(jax.jit, donate_argnums=0)
    def run(pages: cache.Pages, q: Array, *given: Array) -> tuple[cache.Pages, Array]:
        return jax.lax.fori_loop(0, ROUNDS, lambda i, c: step(i, c, *given), (pages, q))

    seconds = []
    for _ in range(ROUNDS + 1):
        begin = time.perf_counter()
        pages, _ = jax.block_until_ready(run(pages, q, table, jnp.int32(live)))
        seconds.append((time.perf_counter() - begin) / ROUNDS)
    return min(seconds[1:])


def sampling_seconds(engine: Engine) -> float:
    """Seconds that drawing a step's tokens takes, the logits given."""
    rows, vocab = engine.config.rows, engine.model.vocab_size
    logits = jax.random.normal(jax.random.key(0), (rows, vocab))
    seeds = jnp.asarray(np.stack([row_seed(0, "bench", 0, "", 0, i) for i in range(rows)]))
    draw: Callable[..., Any] = jax.jit(partial(sample, config=SAMPLING))
    seconds = []
    for position in range(ROUNDS + 1):
        begin = time.perf_counter()
        jax.block_until_ready(draw(logits, seeds, jnp.full(rows, position)))
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])
