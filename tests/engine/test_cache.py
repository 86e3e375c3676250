"""The paged cache's one operation against attention over whole sequences in numpy float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1s_jax.engine import cache
from r1s_jax.models.decoder import DecoderConfig

PAGE, HEADS, KV_HEADS, WIDTH = 4, 6, 2, 8
TOLERANCE = 2e-6  # of mixtures of values of about 1, in f32

append_attend = jax.jit(cache.append_attend, static_argnames="at_once")
copy_pages = jax.jit(cache.copy_pages, static_argnums=3)


class Case:
    """A pool full of noise, and rows of blocks on top of sequences whose past it holds."""

    def __init__(self, starts, counts, tables, *, tokens, pages=40, seed=0):
        rng = np.random.default_rng(seed)
        noise = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
        self.starts, self.counts = np.array(starts, np.int32), np.array(counts, np.int32)
        self.table = np.zeros((len(tables), max(map(len, tables))), np.int32)
        for row, table in enumerate(tables):
            self.table[row, : len(table)] = table
        self.pool = noise(pages, KV_HEADS, WIDTH, PAGE), noise(pages, KV_HEADS, PAGE, WIDTH)
        self.q = noise(len(tables), tokens, HEADS, WIDTH)
        self.k, self.v = (noise(len(tables), tokens, KV_HEADS, WIDTH) for _ in range(2))

    def run(self, **how):
        """(mixtures, keys, values) as numpy."""
        pool = tuple(map(jnp.asarray, self.pool))
        inputs = (self.q, self.k, self.v, self.table, self.starts, self.counts)
        mixed, pool = append_attend(pool, *map(jnp.asarray, inputs), **how)
        return (np.asarray(mixed), *map(np.asarray, pool))

    def expected_pool(self):
        """Each token put where it belongs, one by one; nothing else touched."""
        keys, values = (x.copy() for x in self.pool)
        for r, (start, count) in enumerate(zip(self.starts, self.counts, strict=True)):
            for t in range(count):
                at, offset = self.table[r, (start + t) // PAGE], (start + t) % PAGE
                keys[at, :, :, offset], values[at, :, offset] = self.k[r, t], self.v[r, t]
        return keys, values

    def expected_mixtures(self):
        """{(row, token): [H h]} of all that is no padding."""
        keys, values = (x.astype(np.float64) for x in self.expected_pool())
        found = {}
        for r, (start, count) in enumerate(zip(self.starts, self.counts, strict=True)):
            places = [(self.table[r, i // PAGE], i % PAGE) for i in range(start + count)]
            for t in range(count):
                seen = places[: start + t + 1]
                mixed = np.zeros((HEADS, WIDTH))
                for head in range(HEADS):
                    group = head // (HEADS // KV_HEADS)
                    k = np.array([keys[at, group, :, offset] for at, offset in seen])
                    v = np.array([values[at, group, offset] for at, offset in seen])
                    scores = k @ self.q[r, t, head].astype(np.float64) / np.sqrt(WIDTH)
                    weights = np.exp(scores - scores.max())
                    mixed[head] = weights @ v / weights.sum()
                found[r, t] = mixed
        return found


def apart(lengths):
    """Tables of sequences of these lengths, in pages of their own and in no order."""
    sizes = [-(-n // PAGE) for n in lengths]
    pages = np.random.default_rng(1).permutation(np.arange(1, 1 + sum(sizes))).tolist()
    return [[pages.pop() for _ in range(size)] for size in sizes]


CASES = {
    # A decode step: from an empty sequence on, on both sides of every page's end, and a dead row.
    "one token": Case(
        [0, 1, 3, 4, 7, 8, 14, 5], [1, 1, 1, 1, 1, 1, 1, 0], apart([1, 2, 4, 5, 8, 9, 15, 6]),
        tokens=1,
    ),
    # More rows than are read together, and a number that is no multiple of them.
    "two groups": Case(range(16), [1] * 16, apart(range(1, 17)), tokens=1, pages=70),
    "nine rows": Case(range(9), [1] * 9, apart(range(1, 10)), tokens=1),
    # Blocks that end in a page's middle, at its end, behind it; empty and short ones.
    "blocks": Case([0, 2, 4, 3, 9], [6, 6, 4, 0, 1], apart([6, 8, 8, 3, 10]), tokens=6),
    # One sequence in three blocks beside another in two, not in order.
    "one sequence in one call": Case(
        [5, 0, 10, 3, 9], [5, 5, 2, 6, 1],
        [[3, 9, 4], [3, 9, 4], [3, 9, 4], [1, 7, 2], [1, 7, 2]], tokens=6,
    ),
    # Two rows read the same two pages and write on in their own.
    "shared pages": Case([8, 9], [3, 2], [[5, 6, 1], [5, 6, 2]], tokens=3),
}  # fmt: skip


@pytest.mark.parametrize("at_once", [False, True], ids=["cpu", "accelerator"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_append_attend(case, at_once):
    """Each token sees what its own sequence holds up to itself, and lands in its own place."""
    mixed, *pool = case.run(at_once=at_once)
    for got, expected in zip(pool, case.expected_pool(), strict=True):
        np.testing.assert_array_equal(got[1:], expected[1:])  # page 0 takes what padding writes
    for (r, t), expected in case.expected_mixtures().items():
        np.testing.assert_allclose(mixed[r, t], expected, atol=TOLERANCE, rtol=0)


def test_other_layers_are_other_pages():
    """A layer's part of the pool is reached by an offset of the table, padding goes to page 0."""
    case = Case([3, 0], [2, 0], [[1, 2], [0, 0]], tokens=2, pages=15)
    case.table += 2 * 5
    mixed, *pool = case.run()
    for got, expected in zip(pool, case.expected_pool(), strict=True):
        np.testing.assert_array_equal(got[1:], expected[1:])
    for (r, t), expected in case.expected_mixtures().items():
        np.testing.assert_allclose(mixed[r, t], expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("at_once", [False, True], ids=["cpu", "accelerator"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_row_depends_on_nothing_but_itself(tokens, at_once):
    """Invariant 7: the same bits beside long rows and dead ones, anywhere, in any pages."""
    lengths = [9 + tokens, *([tokens] * 15)]
    case = Case([9, *[0] * 15], [tokens] * 16, apart(lengths), tokens=tokens, pages=170)
    alone, *_ = case.run(at_once=at_once)
    rng = np.random.default_rng(5)
    for place, others in [(0, 60), (3, 7), (11, 30), (15, 0)]:
        starts = rng.integers(0, others + 1, 16)
        starts[place] = 9
        # Huge numbers stand in the pages of others, and behind the row's own end.
        tables = apart(starts + tokens)
        moved = Case(starts, [tokens] * 16, tables, tokens=tokens, pages=170, seed=7)
        for pool, mine in zip(moved.pool, case.pool, strict=True):
            pool *= 1e30
            for i in range(9):
                to, own, at = tables[place][i // PAGE], case.table[0, i // PAGE], i % PAGE
                axis = 2 if pool.shape[2] == WIDTH else 1
                np.moveaxis(pool[to], axis, 0)[at] = np.moveaxis(mine[own], axis, 0)[at]
        for x, y in ((moved.q, case.q), (moved.k, case.k), (moved.v, case.v)):
            x[place] = y[0]
        mixed, *_ = moved.run(at_once=at_once)
        np.testing.assert_array_equal(mixed[place], alone[0])


def test_copy_pages():
    """Every pair in every layer, up to the first pair of zeros, and nothing else."""
    layers, per_layer = 3, 6
    pool = Case([0], [0], [[0]], tokens=1, pages=layers * per_layer).pool
    sources, targets = np.array([2, 2, 5, 0, 0]), np.array([1, 3, 4, 0, 0])
    got = copy_pages(tuple(map(jnp.asarray, pool)), sources, targets, per_layer)
    for before, after in zip(pool, got, strict=True):
        expected = before.copy()
        for layer in range(layers):
            for source, target in [(2, 1), (2, 3), (5, 4)]:
                expected[layer * per_layer + target] = before[layer * per_layer + source]
        np.testing.assert_array_equal(np.asarray(after), expected)


def test_page_shapes():
    """Keys and values of all layers in one pool."""
    model = DecoderConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=5,
    )  # fmt: skip
    keys, values = cache.page_shapes(model, 7, 16, jnp.bfloat16, 1)
    assert (keys.shape, values.shape) == ((21, 2, 5, 16), (21, 2, 16, 5))
    assert keys.dtype == values.dtype == jnp.bfloat16
