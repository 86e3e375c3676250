"""The memory plan against numbers worked out by hand."""

from __future__ import annotations

import dataclasses
import functools
import os
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from r1s_jax.engine import plan as memory
from r1s_jax.engine import tpu
from r1s_jax.engine.plan import device_memory, plan_memory, weight_bytes
from r1s_jax.engine.state import EngineConfig
from r1s_jax.models.decoder import DecoderConfig
from r1s_jax.sharding import MeshConfig, lane_mesh, make_mesh
from r1s_jax.types import UserError

# Embedding and lm_head 64 * 8 each, final norm 8; a layer's norms 16, q and o 8 * 16 each, k and v
# 8 * 8 each, three feed-forward matrices 8 * 12 each: 1,032 + 2 * 688 parameters.
SMALL = DecoderConfig(
    vocab_size=64,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
)
SMALL_BYTES = 2408 * 4
# A page: 2 layers, keys and values, 2 heads, 4 wide, 4 tokens, f32.
PAGE_BYTES = 2 * 2 * 2 * 4 * 4 * 4
CONFIG = EngineConfig(rows=4, context=10, page=4, extend_rows=2, extend_tokens=4)
# Four rows' logits four times over; the activations of 8 tokens (2,560 bytes) are fewer.
WORK_BYTES = 4 * 64 * 4 * 4
QWEN_7B = DecoderConfig(
    vocab_size=152_064,
    hidden_size=3584,
    intermediate_size=18_944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    head_dim=128,
    attention_bias=True,
)


def plan(model=SMALL, config=CONFIG, *, pages, dtype=jnp.float32, mesh=None, reserved=0, **bytes_):
    """The plan for a device on which so many pages' bytes, and seven more bytes, are left."""
    taken = bytes_.get("weights", SMALL_BYTES) + bytes_.get("work", WORK_BYTES) + reserved
    left = pages * bytes_.get("page", PAGE_BYTES) + 7
    limit = -(-(taken + left) * 10 // 9)  # a tenth is the runtime's
    mesh = lane_mesh(make_mesh(mesh or MeshConfig()))
    return plan_memory(model, config, mesh, dtype, limit_bytes=limit, reserved_bytes=reserved)


def test_what_fits_is_filled():
    """All but a tenth of a device: weights, what the programs need, others' bytes; then pages."""
    for pages in (6, 20, 53):
        found = plan(pages=pages)
        assert (found.pages, found.cache_bytes) == (pages, pages * PAGE_BYTES)
        assert found.weight_bytes == SMALL_BYTES
        assert (found.lanes, found.rows, found.extend_rows, found.slots) == (1, 4, 2, 16)
        assert found.pages_per_episode == 3
    assert plan(pages=20, reserved=12_345).pages == 20


def test_no_more_pages_than_can_be_used():
    """Three for each of 16 slots, three for a prompt on its way in, two to spare."""
    assert plan(pages=1000).pages == 53


def test_long_blocks_need_more_than_logits():
    """16 * 8 tokens of 4 * (8 + 12) activations in f32."""
    config = dataclasses.replace(CONFIG, extend_rows=16, extend_tokens=8)
    assert plan(config=config, pages=20, work=128 * 80 * 4).pages == 20


def test_lanes_split_rows_not_pages():
    """Four lanes of two devices: a row and its four slots each; half of all but the norms. Four
    tokens of 4 * (8 + 12 / 2) activations in f32 are more than a row's logits."""
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    norms = 5 * 8 * 4
    weights = (SMALL_BYTES - norms) // 2 + norms
    config = dataclasses.replace(CONFIG, extend_rows=4)
    found = plan(
        config=config, mesh=mesh, pages=11, weights=weights, page=PAGE_BYTES // 2, work=896
    )
    assert (found.lanes, found.rows, found.slots, found.extend_rows) == (4, 1, 4, 1)
    assert (found.pages, found.cache_bytes) == (11, 11 * PAGE_BYTES // 2)
    assert found.weight_bytes == weights


def test_qwen_7b_over_four_devices():
    """7,615,616,512 parameters, 204,288 of them in norms, which every device holds; a page of 64
    tokens is 28 layers, keys and values, one head of 128 in bf16."""
    mesh = MeshConfig(data=2, tensor=4)
    weights = 2 * ((7_615_616_512 - 204_288) // 4 + 204_288)
    page = 28 * 2 * 128 * 64 * 2
    config = EngineConfig(rows=128, context=8192, page=64, extend_rows=8, extend_tokens=64)
    work = 64 * 152_064 // 4 * 4 * 4  # 4 * 64 tokens of 4 * (3,584 + 18,944 / 4) in bf16 are less
    mesh_of_two_lanes = lane_mesh(make_mesh(mesh))
    assert weight_bytes(QWEN_7B, mesh_of_two_lanes, jnp.bfloat16) == weights
    found = plan(
        QWEN_7B, config, mesh=mesh, dtype=jnp.bfloat16, pages=9000, weights=weights, page=page,
        work=work,
    )  # fmt: skip
    assert (found.lanes, found.rows, found.slots, found.extend_rows) == (2, 64, 256, 4)
    assert (found.pages, found.pages_per_episode, found.cache_bytes) == (9000, 128, 9000 * page)
    assert str(found) == (
        "128 episodes decode at a time, 512 have a place: 8.26 GB of cache and 3.81 GB of weights "
        "on a device of 13.4 GB, room for 140 episodes of full length"
    )


def test_a_context_that_cannot_fit_is_refused():
    """One line with what is needed and what is left, also where the weights alone are too many."""
    with pytest.raises(UserError, match=r"^engine.context = 10: one episode needs 0.00 GB") as e:
        plan(pages=5)
    assert "\n" not in str(e.value)
    gigabyte = 10**9
    config = EngineConfig(rows=8, context=32_768, page=64)
    mesh = lane_mesh(make_mesh(MeshConfig(tensor=4)))
    for limit, reserved, message in [
        # 515 pages of 917,504 bytes; 4.86 GB less weights, 17 MB of work.
        (5.4, 0.7, "needs 0.47 GB of cache on a device, 0.33 GB of 5.40 are left beside 3.81 GB "
         "of weights and 0.70 GB of the learner's"),
        (4.0, 0.0, "needs 0.47 GB of cache on a device, 0.00 GB of 4.00 are left beside 3.81 GB "
         "of weights and 0.00 GB of the learner's"),
    ]:  # fmt: skip
        with pytest.raises(UserError) as e:
            plan_memory(
                QWEN_7B, config, mesh, jnp.bfloat16, limit_bytes=int(limit * gigabyte),
                reserved_bytes=int(reserved * gigabyte),
            )  # fmt: skip
        assert str(e.value) == f"engine.context = 32768: one episode {message}"


def test_what_cannot_be_is_refused_before_memory_is_counted(monkeypatch):
    """A context beyond the model's reach; integers that are padded to what they should save."""
    config = EngineConfig(rows=8, context=200_000)
    mesh = lane_mesh(make_mesh(MeshConfig(tensor=4)))
    fit = functools.partial(plan_memory, QWEN_7B, dtype=jnp.bfloat16, limit_bytes=10**12)
    with pytest.raises(UserError, match=r"engine.context = 200000, .* max_position_embeddings = "):
        fit(config=config, mesh=mesh)
    monkeypatch.setattr(memory, "cache_backend", lambda mesh: tpu)
    config = EngineConfig(rows=8, context=8192, int8_cache=True)
    with pytest.raises(UserError, match=r"int8_cache = True saves nothing: .* 1 key/value head"):
        fit(config=config, mesh=mesh)
    two_heads = lane_mesh(make_mesh(MeshConfig(tensor=2)))
    halved, whole = (
        fit(config=dataclasses.replace(config, int8_cache=small), mesh=two_heads).cache_bytes
        for small in (True, False)
    )
    assert halved * 2 == whole


def test_device_memory():
    """What the device says; of a CPU's, a share of half of the machine."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert device_memory(jax.devices()[0]) == total // 2 // 8
    chip = mock.Mock(spec=jax.Device, platform="tpu")
    chip.memory_stats.return_value = {"bytes_limit": 17_000_000_000, "bytes_in_use": 5}
    assert device_memory(chip) == 17_000_000_000
