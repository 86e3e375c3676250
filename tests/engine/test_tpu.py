"""The TPU's cache operation, its kernels interpreted, against attention in numpy float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import literals
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from r1s_jax.engine import tpu
from r1s_jax.engine.compiled import over_lanes
from r1s_jax.sharding import MeshConfig, make_mesh, partition_spec

# What a query's mixture may be off by: bf16 keeps 8 bits, and so does the softmax it multiplies.
TOLERANCE = {jnp.float32: 2e-6, jnp.bfloat16: 3e-2}


# Compiling what the interpreters make of a kernel takes longer than running it.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@pytest.fixture
def interpreted(monkeypatch):
    """Runs our kernel in the interpreter of TPUs, and JAX's in that of plain Pallas.

    The first knows copies of sizes that only the run decides, and bounds; but it cannot read
    reshaped memory, which JAX's kernel does. The second can, once masked stores accept an index
    that is a plain number, and no memory space is named.

    Small blocks, so that short sequences have several: two pages of KV, eight queries.
    """
    real = pl.pallas_call

    def call(kernel, *args, name, **kwargs):
        kwargs["interpret"] = pltpu.InterpretParams() if name == "append_to_pages" else True
        return real(kernel, *args, name=name, **kwargs)

    monkeypatch.setattr(pl, "pallas_call", call)
    monkeypatch.setattr(pltpu, "with_memory_space_constraint", lambda x, _: x)
    monkeypatch.setattr(literals.TypedInt, "shape", (), raising=False)
    for name, size in [("DECODE_BLOCK", 16), ("EXTEND_BLOCK", 16), ("EXTEND_QUERIES", 8)]:
        monkeypatch.setattr(tpu, name, size)


class Case:
    """A pool full of noise, and blocks of tokens on top of sequences of given lengths."""

    def __init__(self, starts, counts, *, tokens, table, heads=4, kv_heads=2, width=128, pages=25,
                 dtype=jnp.float32):  # fmt: skip
        self.rng = np.random.default_rng(0)
        self.starts, self.counts = np.array(starts, np.int32), np.array(counts, np.int32)
        self.table, self.page = np.array(table, np.int32), 8
        self.dtype, self.kv_heads, self.width = dtype, kv_heads, width
        self.pages = self.noise(pages, *tpu.page_shape(kv_heads, width, dtype, 1, self.page))
        rows = len(starts)
        self.q = self.noise(rows, tokens, heads, width)
        self.k = self.noise(rows, tokens, kv_heads, width)
        self.v = self.noise(rows, tokens, kv_heads, width)

    def noise(self, *shape):
        """Numbers that the type holds exactly, as float64."""
        drawn = jnp.asarray(self.rng.normal(size=shape), self.dtype)
        return np.asarray(drawn.astype(jnp.float32), np.float64)

    def run(self, call=tpu.append_attend):
        arrays = (jnp.asarray(x, self.dtype) for x in (self.pages, self.q, self.k, self.v))
        quick = jax.jit(call, compiler_options=QUICK)
        first, *rest = arrays
        mixed, (pages,) = quick((first,), *rest, self.table, self.starts, self.counts)
        return (np.asarray(x.astype(jnp.float32), np.float64) for x in (mixed, pages))

    def expected_pages(self):
        """Every token put where it belongs, one by one; nothing else touched."""
        pages, k2 = self.pages.copy(), 2 * self.kv_heads
        for r, (start, count) in enumerate(zip(self.starts, self.counts, strict=True)):
            for t in range(count):
                there = pages[self.table[r, (start + t) // self.page], (start + t) % self.page]
                there[:] = 0
                there[0:k2:2, : self.width] = self.k[r, t]
                there[1:k2:2, : self.width] = self.v[r, t]
        return pages

    def expected_mixed(self):
        pages = self.expected_pages()
        mixed = np.zeros_like(self.q)
        per_kv = self.q.shape[2] // self.kv_heads
        for r, (start, count) in enumerate(zip(self.starts, self.counts, strict=True)):
            flat = pages[self.table[r]].reshape(-1, *pages.shape[2:])
            for t in range(count):
                seen = flat[: start + t + 1, :, : self.width]
                for head in range(self.q.shape[2]):
                    k, v = seen[:, head // per_kv * 2], seen[:, head // per_kv * 2 + 1]
                    scores = k @ self.q[r, t, head] / np.sqrt(self.width)
                    weights = np.exp(scores - scores.max())
                    mixed[r, t, head] = weights @ v / weights.sum()
        return mixed

    def check(self, call=tpu.append_attend):
        mixed, pages = self.run(call)
        np.testing.assert_array_equal(pages, self.expected_pages())
        np.testing.assert_allclose(mixed, self.expected_mixed(), atol=TOLERANCE[self.dtype])


def shuffled_table(rows=6, per_row=4, first=1, seed=1):
    """Distinct pages in no order, as a pool hands them out after a while."""
    ids = np.random.default_rng(seed).permutation(rows * per_row) + first
    return ids.reshape(rows, per_row)


@pytest.mark.usefixtures("interpreted")
def test_decoding_rows_of_ragged_lengths():
    """One token a row: empty and full sequences, either side of a page's end, and dead rows."""
    starts, counts = [0, 7, 8, 31, 13, 20], [1, 1, 1, 1, 0, 1]
    Case(starts, counts, tokens=1, table=shuffled_table()).check()
    # The prompt's first page is shared.
    table = shuffled_table()
    table[:4, 0] = table[0, 0]
    Case([8, 9, 12, 16, 0, 0], [1, 1, 1, 1, 0, 0], tokens=1, table=table).check()


@pytest.mark.usefixtures("interpreted")
def test_blocks_of_tokens_over_page_boundaries():
    """Blocks longer than a page, from its middle, to its very end, and partly or wholly padding."""
    starts, counts = [0, 5, 12, 3, 30, 31], [20, 11, 20, 0, 1, 1]
    Case(starts, counts, tokens=20, table=shuffled_table()).check()


@pytest.mark.usefixtures("interpreted")
def test_blocks_of_one_sequence_in_one_call():
    """All are written before any is read: each block sees those before it."""
    table = shuffled_table()
    table[1] = table[0]
    table[4:] = table[3]
    Case([0, 9, 0, 3, 11, 31], [9, 20, 0, 8, 20, 1], tokens=20, table=table).check()


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("tokens", [1, 20])
def test_nothing_live_writes_nothing_and_is_finite(tokens):
    case = Case([0, 9, 31, 0, 0, 0], [0] * 6, tokens=tokens, table=np.zeros((6, 4)))
    mixed, pages = case.run()
    np.testing.assert_array_equal(pages, case.pages)
    np.testing.assert_array_equal(mixed, 0)


@pytest.mark.usefixtures("interpreted")
def test_a_row_does_not_depend_on_its_companions():
    """Bit for bit: alone, or beside others and dead rows (invariant 7)."""
    alone = Case([0, 21, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0], tokens=1, table=shuffled_table())
    among = Case([30, 21, 5, 0, 8, 0], [1, 1, 1, 0, 1, 0], tokens=1, table=shuffled_table())
    np.testing.assert_array_equal(next(alone.run())[1], next(among.run())[1])


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "width"), [(1, 7, 1, 128), (1, 9, 3, 64), (12, 14, 2, 128)]
)
def test_bfloat16_and_padded_heads_and_widths(tokens, heads, kv_heads, width):
    """Three heads of width 64 lie as four of 128; the padding is written as zeros."""
    Case([6, 17], [tokens, tokens // 2 + 1], tokens=tokens, table=shuffled_table(2), heads=heads,
         kv_heads=kv_heads, width=width, dtype=jnp.bfloat16).check()  # fmt: skip


@pytest.mark.usefixtures("interpreted")
def test_layers_are_told_apart_by_an_offset_of_the_page_ids():
    """Scanned over three layers of one pool: each reads and writes its own third."""
    layers, per_layer = 3, 7
    case = Case([5, 10], [1, 1], tokens=1, table=shuffled_table(2, 3), pages=layers * per_layer)

    def scanned(pages, q, k, v, table, starts, counts):
        def layer(pages, index):
            mixed, pages = tpu.append_attend(
                pages, q, k, v, table + index * per_layer, starts, counts
            )
            return pages, mixed

        pages, mixed = jax.lax.scan(layer, pages, jnp.arange(layers))
        return mixed, pages

    mixed, pages = case.run(scanned)
    before = case.pages
    for index in range(layers):
        part = slice(index * per_layer, (index + 1) * per_layer)
        case.pages = before[part]
        np.testing.assert_array_equal(pages[part], case.expected_pages())
        np.testing.assert_allclose(mixed[index], case.expected_mixed(), atol=2e-6)


@pytest.mark.usefixtures("interpreted")
def test_sharded_over_rows_and_heads():
    """Rows, with pages of their own, over two devices and heads over two."""
    mesh = make_mesh(MeshConfig(data=2, tensor=2))
    table = np.concatenate([shuffled_table(2, 3, 0), shuffled_table(2, 3, 0, seed=5)])
    case = Case([0, 9, 15, 3], [1, 1, 0, 1], tokens=1, table=table, pages=12)
    mixed, pages = case.run(
        over_lanes(tpu.append_attend, mesh, tuple(map(partition_spec, tpu.AXES)))
    )
    case.table = table + np.array([0, 0, 6, 6])[:, None]
    np.testing.assert_array_equal(pages, case.expected_pages())
    np.testing.assert_allclose(mixed, case.expected_mixed(), atol=2e-6)


def test_page_shapes():
    assert tpu.page_shape(4, 128, jnp.bfloat16, 1, 64) == (64, 8, 128)
    assert tpu.page_shape(4, 128, jnp.bfloat16, 4, 64) == (64, 8, 128)
    assert tpu.page_shape(3, 64, jnp.float32, 1, 32) == (32, 8, 128)
    assert tpu.page_shape(10, 80, jnp.bfloat16, 2, 64) == (64, 32, 128)
    # Integers are four to a word: a head alone gets company.
    assert tpu.page_shape(4, 128, jnp.int8, 2, 64) == (64, 8, 128)
    assert tpu.page_shape(4, 128, jnp.int8, 4, 64) == (64, 16, 128)


def test_what_the_kernels_cannot_take_is_refused():
    def trace(page, q, k, pages_type=jnp.float32):
        new = functools.partial(jnp.zeros, dtype=jnp.float32)
        table, row = jnp.zeros((1, 2), jnp.int32), jnp.zeros(1, jnp.int32)
        return tpu.append_attend(
            (jnp.zeros((3, *page), pages_type),), new((1, 1, *q)), new((1, 1, *k)), new((1, 1, *k)),
            table, row, row,
        )  # fmt: skip

    with pytest.raises(ValueError, match=r"3 query heads .* 2 key/value heads"):
        trace((8, 4, 128), (3, 128), (2, 128))
    with pytest.raises(ValueError, match=r"\[6 64\].* 3 .* width 64 .* \[8 128\]"):
        trace((8, 6, 64), (3, 64), (3, 64))
    with pytest.raises(ValueError, match=r"pages are bfloat16, queries float32"):
        trace((8, 4, 128), (4, 128), (2, 128), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"pages of float16"):
        tpu.page_shape(4, 128, jnp.float16, 1, 64)
    with pytest.raises(ValueError, match=r"3 key/value heads .* 2 devices"):
        tpu.page_shape(3, 128, jnp.bfloat16, 2, 64)


def estimates(call, *shapes):
    """The cost estimates of all kernels in what `call` traces to, in order."""
    found = []

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "pallas_call":
                found.append(eqn.params["cost_estimate"])
                continue
            for param in eqn.params.values():
                if isinstance(param, jax.extend.core.ClosedJaxpr):
                    walk(param.jaxpr)

    walk(jax.make_jaxpr(call)(*shapes).jaxpr)
    return found


def test_each_kernel_carries_its_cost():
    """64 rows of Qwen2.5-7B decoding at 1,000 tokens, counted by hand.

    In whole blocks a row reads 1,000 + 128 tokens of 8 heads x 128 numbers x 2 bytes. Documents of
    128 tokens have four blocks of queries, each of which reads 1,000 + 256.
    """

    def of(rows, tokens):
        shapes = [(99, 64, 8, 128), *((rows, tokens, n, 128) for n in (28, 4, 4))]
        pool, *arrays = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes]
        whole = [jax.ShapeDtypeStruct(s, jnp.int32) for s in [(rows, 32), (rows,), (rows,)]]
        call = functools.partial(tpu.append_attend, expected_length=1000)
        return estimates(call, (pool,), *arrays, *whole)

    write, attend = of(64, 1)
    assert write.bytes_accessed == 2 * 64 * 2048
    assert attend.bytes_accessed == 64 * 1128 * 2048 + 2 * 64 * 28 * 128 * 2
    assert attend.flops == 64 * 1128 * 28 * 4 * 128
    assert attend.transcendentals == 64 * 1128 * 28
    write, attend = of(16, 128)
    assert write.bytes_accessed == 2 * 16 * 128 * 2048
    assert attend.bytes_accessed == 16 * 4 * 1256 * 2048 + 2 * 16 * 128 * 28 * 128 * 2
    assert attend.flops == 16 * 128 * 1256 * 28 * 4 * 128
