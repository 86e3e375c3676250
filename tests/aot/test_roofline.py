"""What is counted in traced and compiled programs, and the table of it."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from r1s_jax.aot import roofline
from r1s_jax.models import splash
from r1s_jax.sharding import MeshConfig, make_mesh

CHIP = roofline.Chip(
    name="toy",
    hbm_bytes=10**9,
    bytes_per_second=1e9,
    flops_per_second=1e12,
    links_per_second=1e8,
)


# ---------------------------------------------------------------- FLOPs


def test_flops_of_loops_branches_shards_and_kernels():
    from jax.experimental import pallas as pl

    x = jnp.zeros((8, 16)), jnp.zeros((16, 16))
    one = 2 * 8 * 16 * 16

    def flops(fn, **options):
        return roofline.matmul_flops(jax.jit(fn).trace(*x).jaxpr, **options)

    assert flops(jnp.matmul) == one
    assert flops(lambda a, b: jax.lax.fori_loop(0, 5, lambda _, c: c @ b, a)) == 5 * one
    until = lambda a, b: jax.lax.while_loop(lambda c: c.sum() > 0, lambda c: c @ b, a)  # noqa: E731
    assert flops(until) == one and flops(until, open_trips=9) == 9 * one
    either = lambda a, b: jax.lax.cond(a.sum() > 0, lambda: a @ b @ b, lambda: a @ b)  # noqa: E731
    assert flops(either) == 2 * one
    assert flops(jax.checkpoint(lambda a, b: a @ b)) == one
    # Two rows on each of four devices.
    mesh, rows, whole = make_mesh(MeshConfig(data=4)), PartitionSpec("data"), PartitionSpec()
    split = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(rows, whole), out_specs=rows)
    assert flops(split) == one

    def kernel(a, b):
        return pl.pallas_call(
            lambda a_ref, b_ref, o_ref: None,
            out_shape=a,
            cost_estimate=pl.CostEstimate(flops=77, bytes_accessed=0, transcendentals=0),
        )(a, b)

    assert flops(kernel) == 77


def test_flops_of_splash_attention():
    """Up to the diagonal: 10 of 16 pairs of blocks; 2 matmuls forward, 2 + 3 + 4 with gradients."""
    rows, length, heads, groups, width = 2, 2048, 4, 2, 128
    q = jax.ShapeDtypeStruct((rows, length, heads, width), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((rows, length, groups, width), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def total(q, k, v, ids):
        return splash.attention(q, k, v, ids).astype(jnp.float32).sum()

    matmul = 2 * rows * heads * length**2 * width * 10 // 16
    forward = jax.jit(total).trace(q, kv, kv, ids)
    assert roofline.matmul_flops(forward.jaxpr) == 2 * matmul
    both = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(q, kv, kv, ids)
    # Beside the kernels: each query's sum over what came out and its gradient.
    assert roofline.matmul_flops(both.jaxpr) == pytest.approx(9 * matmul, rel=1e-3)


def test_what_is_computed_again_counts_again():
    x = jnp.zeros((8, 16)), jnp.zeros((16, 16))
    one = 2 * 8 * 16 * 16

    def loss(a, b, policy):
        layer = jax.checkpoint(lambda c: jnp.sin(c @ b), policy=policy)
        return jax.lax.scan(lambda c, _: (layer(c), None), a, None, length=5)[0].sum()

    def flops(policy):
        traced = jax.jit(jax.grad(lambda a, b: loss(a, b, policy), argnums=(0, 1))).trace(*x)
        return roofline.matmul_flops(traced.jaxpr)

    assert flops(None) == 5 * 4 * one
    assert flops(jax.checkpoint_policies.dots_saveable) == 5 * 3 * one


# ---------------------------------------------------------------- the table


def toy_program(**more):
    traced = jax.jit(jnp.matmul).trace(*[jax.ShapeDtypeStruct((512, 512), jnp.float32)] * 2)
    return roofline.Program(name="toy", traced=traced, **more)


def test_rows_of_the_table():
    """3 MB at 1 GB/s take 3.15 ms; 268 MFLOP at 1 TFLOP/s less."""
    program = toy_program(tokens=100, least_bytes=2**21)
    (cost,) = roofline.compile_all([program], chips=1)
    assert (cost.argument_bytes, cost.result_bytes, cost.link_bytes) == (2 * 2**20, 2**20, 0)
    assert cost.flops == 2 * 512**3 and cost.hbm_bytes == 3 * 2**20
    assert cost.seconds(CHIP) == 3 * 2**20 / 1e9
    slow = dataclasses.replace(CHIP, flops_per_second=1e10)
    assert cost.seconds(slow) == 2 * 512**3 / 1e10
    heading, line, row = roofline.table([cost], CHIP).splitlines()
    assert heading.count("|") == line.count("|") == row.count("|") == 13
    assert re.match(r"\| toy \| \d+\.\d \| 0\.00 \|", row)
    assert row.endswith("| 0.3 | 0.003 | 0.000 | 3.15 | HBM | 31,789 | 1.500 |")
    halved = roofline.compile_all([dataclasses.replace(program, steps=2)], chips=4)[0]
    assert (halved.flops, halved.hbm_bytes) == (2 * 512**3 / 8, 3 * 2**19)


def test_time_is_the_slowest_of_three_or_with_the_links_on_top():
    cost = roofline.Cost(program=toy_program(), flops=2e12, hbm_bytes=1e9, link_bytes=3e8)
    assert cost.parts(CHIP) == {"FLOPs": 2.0, "HBM": 1.0, "links": 3.0}
    assert (cost.seconds(CHIP), cost.serial_seconds(CHIP)) == (3.0, 5.0)
    assert "| 3000.00 | links |" in roofline.table([cost], CHIP)


def test_what_a_program_needs_for_itself():
    """Arguments that are alive anyway are not its own; a donated one's result is no new array."""
    (cost,) = roofline.compile_all([toy_program(alive_bytes=2**20)], chips=1)
    assert cost.own_bytes == 2 * 2**20 + cost.temporary_bytes
    (cost,) = roofline.compile_all([toy_program(alive_bytes=2**30)], chips=1)
    assert cost.own_bytes == 0


def test_a_program_too_large_for_the_compiler(monkeypatch):
    """What libtpu says then; any other failure of a compiler is raised."""
    said = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, needs 298G of 15.75G.\nmore"

    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(said)

    program = toy_program()
    monkeypatch.setattr(type(program.traced), "lower", lambda self: Lowered())
    (cost,) = roofline.compile_all([program], chips=1)
    assert cost.refusal == said.splitlines()[0]
    assert "| toy | does not fit | – |" in roofline.table([cost], CHIP)
    said = "INTERNAL: something else"
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        roofline.compile_all([program], chips=1)
