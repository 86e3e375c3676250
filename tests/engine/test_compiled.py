"""Layouts of the engine's weights: stacked or not, and from the learner's mesh to the lanes'."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1s_jax.engine.compiled import Programs
from r1s_jax.engine.engine import Engine
from r1s_jax.engine.plan import plan_memory
from r1s_jax.models.decoder import abstract_params, init_params
from r1s_jax.models.logprobs import token_logprobs
from r1s_jax.rollout.episode import STOP_STRINGS
from r1s_jax.sharding import MeshConfig, lane_mesh, make_mesh, named_sharding
from tests import tiny
from tests.turns import play_turn

# Four key/value heads, so that four devices can share them.
MODEL = dataclasses.replace(tiny.MODEL, num_key_value_heads=4, qk_norm=True)
PROMPTS = [[(7 * i + 3 * j) % 256 for j in range(3 + 5 * i)] for i in range(6)]
BUDGET = 15


def programs(*, mesh, tensor, scan_layers, dtype=jnp.float32):
    mesh = lane_mesh(make_mesh(mesh), tensor)
    config = dataclasses.replace(tiny.CONFIG, rows=8, extend_rows=8, scan_layers=scan_layers)
    plan = plan_memory(MODEL, config, mesh, dtype, limit_bytes=10**8)
    return Programs(MODEL, config, plan, mesh, dtype)


@functools.cache
def learner_params():
    """Parameters as the learner holds them: split over fsdp and tensor."""
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    _, axes = abstract_params(MODEL)
    is_names = lambda x: isinstance(x, tuple)  # noqa: E731
    layout = jax.tree.map(lambda names: named_sharding(mesh, names), axes, is_leaf=is_names)
    params = jax.tree.map(jax.device_put, init_params(MODEL, 3), layout)
    assert params["layers"]["q_kernel"].addressable_shards[0].data.shape == (2, 8, 16)
    return params


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_place(tensor, scan_layers, dtype):
    """The learner's values, rounded, each device with its share of heads and all of the rest."""
    made = programs(
        mesh=MeshConfig(fsdp=4, tensor=2), tensor=tensor, scan_layers=scan_layers, dtype=dtype
    )
    placed = made.place(learner_params())
    described = made.abstract_params()
    assert jax.tree.structure(placed) == jax.tree.structure(described)
    for got, said in zip(jax.tree.leaves(placed), jax.tree.leaves(described), strict=True):
        assert (got.shape, got.dtype) == (said.shape, said.dtype)
        assert got.sharding.is_equivalent_to(said.sharding, got.ndim)
    expected = jax.tree.map(lambda p: np.asarray(p.astype(dtype)), learner_params())
    layers = placed["layers"]
    if not scan_layers:
        assert layers[0]["q_kernel"].addressable_shards[0].data.shape == (32, 32 // tensor)
        layers = jax.tree.map(lambda *ps: np.stack([np.asarray(p) for p in ps]), *layers)
    else:
        assert layers["q_kernel"].addressable_shards[0].data.shape == (2, 32, 32 // tensor)
    jax.tree.map(
        lambda got, want: np.testing.assert_array_equal(np.asarray(got), want),
        placed | {"layers": layers},
        expected,
    )


def test_pages_belong_to_lanes_and_heads():
    """Each device holds its own lane's pages of all layers, and its own heads of them."""
    made = programs(mesh=MeshConfig(fsdp=4, tensor=2), tensor=2, scan_layers=False)
    keys, values = made.empty_pages()
    pages = made.plan.pages
    assert keys.shape == (4 * 2 * pages, 4, 8, 16) and values.shape == (4 * 2 * pages, 4, 16, 8)
    assert {s.data.shape for s in keys.addressable_shards} == {(2 * pages, 2, 8, 16)}
    assert {s.data.shape for s in values.addressable_shards} == {(2 * pages, 2, 16, 8)}


def learners(tokens):
    """The learner's log-probs of a turn of each prompt."""
    longest = max(len(p) + len(t) for p, t in zip(PROMPTS, tokens, strict=True))
    ids = np.zeros((len(PROMPTS), longest), np.int32)
    for row, prompt, turn in zip(ids, PROMPTS, tokens, strict=True):
        row[: len(prompt) + len(turn)] = [*prompt, *turn]
    logprobs, _ = jax.jit(functools.partial(token_logprobs, tiny.MODEL))(tiny.params(), ids)
    return [
        np.asarray(row[len(p) : len(p) + len(t)])
        for row, p, t in zip(logprobs, PROMPTS, tokens, strict=True)
    ]


@functools.cache
def usual_turns():
    return play_turn(tiny.engine(), PROMPTS, tiny.SAMPLED, BUDGET)


def test_an_engine_agrees_with_its_learner():
    """Invariant 3, right after a sync."""
    tokens, logprobs, _ = zip(*usual_turns(), strict=True)
    np.testing.assert_allclose(
        np.concatenate(logprobs), np.concatenate(learners(tokens)), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    "changes", [{"scan_layers": True}, {"mesh": MeshConfig(fsdp=4, tensor=2)}], ids=["scan", "mesh"]
)
def test_layouts_sample_the_same(changes):
    """Invariant 7: one layer's program or all of them, one device or four lanes of two."""
    engine = tiny.new_engine(**changes)
    tokens, logprobs, stops = zip(*play_turn(engine, PROMPTS, tiny.SAMPLED, BUDGET), strict=True)
    usual_tokens, usual, usual_stops = zip(*usual_turns(), strict=True)
    assert (tokens, stops) == (usual_tokens, usual_stops)
    np.testing.assert_allclose(np.concatenate(logprobs), np.concatenate(usual), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_bf16_engine_is_near_an_f32_learner():
    """Weights and activations keep 8 bits, so a log-prob of some units is off by a few hundredths:
    0.1 at most and 0.02 in the mean (0.04 and 0.008 were seen), and less would be no bf16."""
    engine = Engine(
        tiny.MODEL,
        tiny.CONFIG,
        mesh=make_mesh(MeshConfig()),
        token_bytes=tiny.tokenizer().token_bytes,
        stop_strings=STOP_STRINGS,
        eos_ids=tiny.tokenizer().eos_ids,
        dtype=jnp.bfloat16,
    )
    engine.set_weights(tiny.params(), 1)
    tokens, logprobs, _ = zip(*play_turn(engine, PROMPTS, tiny.SAMPLED, BUDGET), strict=True)
    gaps = np.concatenate(logprobs) - np.concatenate(learners(tokens))
    assert len(gaps) > 80 and abs(gaps).max() < 0.1 and 1e-3 < abs(gaps).mean() < 0.02
