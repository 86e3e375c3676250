"""Bytes in HBM, counted in programs compiled for CPUs and in one as libtpu writes it."""

import jax
import jax.numpy as jnp
import pytest

from r1s_jax.aot.hlo_bytes import hbm_bytes


def compiled(fn, *shapes, **options):
    arguments = [
        jax.ShapeDtypeStruct(s, jnp.float32) if isinstance(s, tuple) else s for s in shapes
    ]
    return jax.jit(fn, **options).lower(*arguments).compile().as_text()


SQUARE, ROW = 64 * 64 * 4, 64 * 4


def test_a_matmul_reads_its_factors_and_writes_its_product():
    assert hbm_bytes(compiled(jnp.matmul, (64, 64), (64, 16))) == SQUARE + 2 * 64 * 16 * 4


def test_loops_count_as_often_as_they_run():
    """A counted loop says how often; one that the data ends is told."""

    def counted(x):
        return jax.lax.scan(lambda c, _: (jnp.sin(c) @ x, None), x, None, length=7)[0]

    def one(x):
        return jnp.sin(x) @ x

    def until(x):
        return jax.lax.while_loop(lambda c: c.sum() > 0, lambda c: jnp.sin(c) @ x, x)

    once = hbm_bytes(compiled(one, (64, 64)))
    assert once >= 3 * SQUARE
    # Beside the body: a copy of what is carried, and the counter (4 bytes, read and written).
    assert hbm_bytes(compiled(counted, (64, 64))) == pytest.approx(7 * once, abs=2.2 * SQUARE)
    few, many = (hbm_bytes(compiled(until, (64, 64)), open_trips=n) for n in (1, 101))
    # The condition reads all of it.
    assert many - few == pytest.approx(100 * (once + SQUARE), rel=0.01)


def test_a_gather_reads_its_rows_and_an_update_writes_its_own():
    ids = jax.ShapeDtypeStruct((8,), jnp.int32)
    rows = hbm_bytes(compiled(lambda table, i: jnp.sin(table[i]), (1000, 64), ids))
    assert 2 * 8 * ROW <= rows <= 4 * 8 * ROW + 200
    at = jax.ShapeDtypeStruct((), jnp.int32)
    put = lambda x, row, i: jax.lax.dynamic_update_slice(x, row, (i, 0))  # noqa: E731
    text = compiled(put, (1000, 64), (1, 64), at, donate_argnums=0)
    assert 2 * ROW <= hbm_bytes(text) <= 2 * ROW + 100


# As libtpu writes it, shortened: weights fetched ahead into vector memory, a kernel with its
# estimate, a fusion with a fusion inside, a table of which two rows are read.
TPU = """
HloModule jit_f, is_scheduled=true

%inside (p.0: bf16[100,8]) -> bf16[100,8] {
  %p.0 = bf16[100,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %bitcast.1 = bf16[100,8]{1,0:T(8,128)(2,1)} bitcast(%p.0)
}

%matmul (p.1: bf16[2,100], p.2: bf16[100,8]) -> bf16[2,8] {
  %p.1 = bf16[2,100]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %p.2 = bf16[100,8]{1,0:T(8,128)(2,1)} parameter(1)
  %fusion.1 = bf16[100,8]{1,0:T(8,128)(2,1)} fusion(%p.2), kind=kLoop, calls=%inside
  ROOT %convolution.1 = bf16[2,8]{1,0:T(8,128)(2,1)S(1)} convolution(%p.1, %fusion.1), dim_labels=bf_io->bf
}

%rows (p.3: bf16[5000,100], p.4: s32[2]) -> bf16[2,100] {
  %p.3 = bf16[5000,100]{1,0:T(8,128)(2,1)} parameter(0)
  %p.4 = s32[2]{0:T(128)} parameter(1)
  ROOT %gather.1 = bf16[2,100]{1,0:T(8,128)(2,1)S(1)} gather(%p.3, %p.4), offset_dims={1}
}

ENTRY %main (a: bf16[100,8], b: bf16[5000,100], c: s32[2], d: bf16[40,8]) -> bf16[2,8] {
  %a = bf16[100,8]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[5000,100]{1,0:T(8,128)(2,1)} parameter(1)
  %c = s32[2]{0:T(128)} parameter(2)
  %d = bf16[40,8]{1,0:T(8,128)(2,1)} parameter(3)
  %copy-start.1 = (bf16[40,8]{1,0:T(8,128)(2,1)S(1)}, bf16[40,8]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%d)
  %slice-start.1 = ((bf16[100,8]{1,0:T(8,128)(2,1)}), bf16[25,8]{1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:25], [0:8]}
  %copy-done.1 = bf16[40,8]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start.1)
  %slice-done.1 = bf16[25,8]{1,0:T(8,128)(2,1)S(1)} slice-done(%slice-start.1)
  %fusion.2 = bf16[2,100]{1,0:T(8,128)(2,1)S(1)} fusion(%b, %c), kind=kLoop, calls=%rows
  %fusion.3 = bf16[2,8]{1,0:T(8,128)(2,1)S(1)} fusion(%fusion.2, %a), kind=kOutput, calls=%matmul
  %kernel.1 = bf16[2,8]{1,0:T(8,128)(2,1)} custom-call(%fusion.3, %copy-done.1), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"cost_estimate":{"flops":"7","transcendentals":"0","bytes_accessed":"12345"}}}
  ROOT %add.1 = bf16[2,8]{1,0:T(8,128)(2,1)} add(%kernel.1, %fusion.3)
}
"""  # noqa: E501


def test_only_what_lies_in_hbm_counts():
    """By hand: a table fetched, a slice, two ids and rows, weights, the kernel, the sum."""
    assert hbm_bytes(TPU) == 640 + 400 + (8 + 400) + 1600 + 12345 + (32 + 32)
