"""Bytes over the links, counted in programs for CPUs and in lines as libtpu writes them."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from r1s_jax.aot.hlo_bytes import hbm_bytes
from r1s_jax.aot.hlo_links import group_size, link_bytes
from r1s_jax.sharding import MeshConfig, make_mesh

MESH = make_mesh(MeshConfig(fsdp=4, tensor=2))
SIZE = 64 * 128 * 4  # of the whole array


def sent(fn, split, result, **options):
    """What each device sends where an array [64, 128] of f32 comes split as `split`."""
    shared = jax.shard_map(fn, mesh=MESH, in_specs=split, out_specs=result, check_vma=False)
    x = jax.ShapeDtypeStruct((64, 128), jnp.float32)
    text = jax.jit(shared).lower(x).compile().as_text()
    assert text
    return link_bytes(text, **options)


def test_collectives_as_on_a_ring():
    """Over 4 devices of an axis: 3/4 of the array; of a sum that all get, twice that."""
    rows = P("fsdp")
    gather = lambda x: jax.lax.all_gather(x, "fsdp", tiled=True)  # noqa: E731
    assert sent(gather, rows, P()) == SIZE * 3 // 4
    # Half of the array on each: it is split over the other axis as well.
    assert sent(gather, P("fsdp", "tensor"), P(None, "tensor")) == SIZE // 2 * 3 // 4
    assert sent(lambda x: jax.lax.psum(x, "fsdp"), P(), P()) == 2 * SIZE * 3 // 4
    scatter = lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True)  # noqa: E731
    assert sent(scatter, P(), rows) == SIZE * 3 // 4
    turn = lambda x: jax.lax.all_to_all(x, "fsdp", 1, 0, tiled=True)  # noqa: E731
    assert sent(turn, rows, P(None, "fsdp")) == SIZE // 4 * 3 // 4
    ring = [(i, (i + 1) % 4) for i in range(4)]
    assert sent(lambda x: jax.lax.ppermute(x, "fsdp", ring), rows, rows) == SIZE // 4
    assert sent(lambda x: 2 * x, rows, rows) == 0


def test_loops_count_as_often_as_they_run():
    def summed(x):
        return jax.lax.fori_loop(0, 5, lambda _, c: jnp.sin(jax.lax.psum(c, "fsdp")), x)

    def until(x):
        return jax.lax.while_loop(
            lambda c: c[0, 0] > 0, lambda c: jnp.sin(jax.lax.psum(c, "fsdp")), x
        )

    once = 2 * SIZE * 3 // 4
    assert sent(summed, P(), P()) == 5 * once
    assert sent(until, P(), P(), open_trips=7) == 7 * once


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}, use_global", 2),
        ("replica_groups=[2,4]<=[8], dimensions={0}", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={1}", 2),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4] {'axis_0'}, to_apply", 2),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, x", 4),
        ("replica_groups=mesh['a'=4,'b'=2] {'a','b'}, x", 8),
    ],
)
def test_how_libtpu_names_groups(groups, size):
    assert group_size(f"%x), channel_id=1, {groups}") == size


def test_groups_in_another_form_are_refused():
    with pytest.raises(ValueError, match="no replica groups in: %x"):
        group_size("%x), replica_groups={}")


# As libtpu writes them, shortened: a sum of which each chip keeps its part, in a fusion of its own;
# and a gather that runs beside other work.
TPU = """
HloModule jit_f, is_scheduled=true

%all-reduce-scatter (p.0: bf16[896,3584]) -> bf16[896,1792] {
  %p.0 = bf16[896,3584]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.1 = bf16[896,3584]{1,0:T(8,128)(2,1)} all-reduce(%p.0), channel_id=1, replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
  %constant.1 = u32[] constant(0)
  ROOT %dynamic-slice.1 = bf16[896,1792]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.1, %constant.1, %constant.1), dynamic_slice_sizes={896,1792}
}

ENTRY %main (a: bf16[896,3584], b: f32[8,128]) -> bf16[896,1792] {
  %a = bf16[896,3584]{1,0:T(8,128)(2,1)} parameter(0)
  %b = f32[8,128]{1,0:T(8,128)} parameter(1)
  %all-gather-start.1 = (f32[8,128]{1,0:T(8,128)}, f32[32,128]{1,0:T(8,128)}) all-gather-start(%b), channel_id=2, replica_groups=[2,4]<=[8], dimensions={0}
  %all-gather-done.1 = f32[32,128]{1,0:T(8,128)} all-gather-done(%all-gather-start.1)
  ROOT %fusion.1 = bf16[896,1792]{1,0:T(8,128)(2,1)} fusion(%a), kind=kCustom, calls=%all-reduce-scatter
}
"""  # noqa: E501


def test_a_sum_that_is_scattered_and_a_gather_in_the_background():
    assert link_bytes(TPU) == 896 * 3584 * 2 // 2 + 32 * 128 * 4 * 3 // 4


# A gather begun in one fusion, that goes on beside a matmul in the next; a third waits for it.
ASYNC = """
HloModule jit_f, is_scheduled=true

%start (p.0: bf16[8,128]) -> (bf16[8,128], bf16[32,128], u32[]) {
  %p.0 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[32,128]{1,0:T(8,128)(2,1)} all-gather(%p.0), channel_id=5, replica_groups=[2,4]<=[8], backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}
  ROOT %custom-call.1 = (bf16[8,128]{1,0:T(8,128)(2,1)}, bf16[32,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%beside (p.1: bf16[8,128], p.2: bf16[32,128], p.3: bf16[128,128]) -> (bf16[128,128], bf16[32,128], bf16[32,128]) {
  %p.1 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %p.2 = bf16[32,128]{1,0:T(8,128)(2,1)} parameter(1)
  %p.3 = bf16[128,128]{1,0:T(8,128)(2,1)} parameter(2)
  %all-gather.2 = bf16[32,128]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=5, replica_groups=[2,4]<=[8], backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
  %convolution.1 = bf16[128,128]{1,0:T(8,128)(2,1)} convolution(%p.3, %p.3), dim_labels=bf_io->bf
  ROOT %tuple.1 = (bf16[128,128]{1,0:T(8,128)(2,1)}, bf16[32,128]{1,0:T(8,128)(2,1)}, bf16[32,128]{1,0:T(8,128)(2,1)}) tuple(%convolution.1, %p.2, %all-gather.2)
}

%done (p.4: bf16[8,128], p.5: bf16[32,128]) -> bf16[32,128] {
  %p.4 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %p.5 = bf16[32,128]{1,0:T(8,128)(2,1)} parameter(1)
  %all-gather.3 = bf16[32,128]{1,0:T(8,128)(2,1)} all-gather(%p.4), channel_id=5, replica_groups=[2,4]<=[8], backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}
  ROOT %custom-call.2 = bf16[32,128]{1,0:T(8,128)(2,1)} custom-call(%p.4, %p.5, %all-gather.3), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: bf16[8,128], b: bf16[128,128]) -> bf16[32,128] {
  %a = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[128,128]{1,0:T(8,128)(2,1)} parameter(1)
  %fusion.1 = (bf16[8,128]{1,0:T(8,128)(2,1)}, bf16[32,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) fusion(%a), kind=kCustom, calls=%start
  %get-tuple-element.1 = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%fusion.1), index=0
  %get-tuple-element.2 = bf16[32,128]{1,0:T(8,128)(2,1)} get-tuple-element(%fusion.1), index=1
  %fusion.2 = (bf16[128,128]{1,0:T(8,128)(2,1)}, bf16[32,128]{1,0:T(8,128)(2,1)}, bf16[32,128]{1,0:T(8,128)(2,1)}) fusion(%get-tuple-element.1, %get-tuple-element.2, %b), kind=kCustom, calls=%beside
  %get-tuple-element.3 = bf16[32,128]{1,0:T(8,128)(2,1)} get-tuple-element(%fusion.2), index=1
  ROOT %fusion.3 = bf16[32,128]{1,0:T(8,128)(2,1)} fusion(%get-tuple-element.1, %get-tuple-element.3), kind=kCustom, calls=%done
}
"""  # noqa: E501


def test_a_collective_in_three_fusions_counts_once():
    """It was counted three times, which doubled what a learner on 64 chips seemed to send."""
    shard, whole, square = 8 * 128 * 2, 32 * 128 * 2, 128 * 128 * 2
    assert link_bytes(ASYNC) == whole * 3 // 4
    # Read and written with the gather; then the matmul's factor, read once, and its product.
    assert hbm_bytes(ASYNC) == 2 * shard + whole + 2 * square
