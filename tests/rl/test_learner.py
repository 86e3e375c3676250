"""The learner: its mesh, what it leaves out or skips, what it tells. Numbers: test_update."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1s_jax.models.decoder import DecoderConfig, init_params
from r1s_jax.rl.algorithm import AlgorithmConfig
from r1s_jax.rl.config import LearnerConfig
from r1s_jax.rl.learner import Learner
from r1s_jax.sharding import MeshConfig, make_mesh
from r1s_jax.types import Question, StopReason, TokenSource, Trajectory, UserError
from tests import tiny

MODEL = DecoderConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    tie_word_embeddings=True,
    attention_bias=True,
)
CONFIG = LearnerConfig(
    learning_rate=1e-2, updates_per_rollout=2, rows=4, row_tokens=24, remat="none"
)
LENGTHS = (7, 16, 16, 7, 7, 16, 7, 7, 16, 16)  # rows of three sevens, or of both
REWARDS = np.array([1.0, 0.0, 0.5, 0.25, 0.0, 1.0, 1.0, 1.0, -2.0, 0.3])
GROUPS = np.repeat(np.arange(5), 2)


@pytest.fixture(scope="module")
def params():
    return init_params(MODEL, 0)


def episodes():
    """Episodes whose sampled tokens surround an observation; sampler log-probs are off by 0.5."""
    rng = np.random.default_rng(0)
    made = []
    for index, length in enumerate(LENGTHS):
        sources = np.full(length, TokenSource.SAMPLED, np.int8)
        sources[:2] = TokenSource.PROMPT
        sources[4 : length - 2] = TokenSource.OBSERVATION
        made.append(
            Trajectory(
                question=Question(id=str(index // 2), text="?", answers=("a",)),
                attempt=0,
                sample=index % 2,
                weights_version=0,
                token_ids_T=rng.integers(1, MODEL.vocab_size, length).astype(np.int32),
                sources_T=sources,
                logprobs_T=np.full(length, -4.0, np.float32),
                drawn_logprobs_T=np.full(length, -4.0, np.float32),
                segments=(),
                searches=(),
                stop_reason=StopReason.ANSWER,
            )
        )
    return made


@pytest.fixture(scope="module")
def trajectories():
    return episodes()


def learner(params, mesh=None, **changes) -> Learner:
    return Learner(
        MODEL,
        dataclasses.replace(CONFIG, **changes),
        mesh=make_mesh(mesh or MeshConfig()),
        params=params,
        temperature=1.0,
        pad_id=0,
    )


def watch(one: Learner, read) -> list:
    """What `read` makes of the state, now and (once they come) after each optimizer update."""
    states, apply = [read(one.state)], one._programs.apply

    def watched(state, grads):
        state, step = apply(state, grads)
        states.append(read(state))
        return state, step

    one._programs.apply = watched
    return states


@jax.jit
def plain_logprobs(params, ids):
    """Log-softmax of full logits of one unpadded row."""
    logits = tiny.full_logits(MODEL, params, ids[None])[0]
    return jax.nn.log_softmax(logits)[jnp.arange(len(ids) - 1), ids[1:]]


def assert_close(a, b, tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=tolerance, rtol=0)


@pytest.fixture(scope="module")
def updated(params, trajectories):
    one = learner(params)
    metrics = one.update(trajectories, REWARDS, GROUPS)
    return one, metrics


def test_eight_devices_make_the_update_of_one(params, trajectories, updated):
    """Mesh 2x2x2: parameters, optimiser and rows split; the result is one device's."""
    eight = learner(params, MeshConfig(data=2, fsdp=2, tensor=2))
    metrics = eight.update(trajectories, REWARDS, GROUPS)
    kernel = eight.state.params["layers"]["gate_kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 8, 16)
    assert_close(eight.state.params, updated[0].state.params, 2e-4)
    # The moments are sums of gradients: there round-off stays round-off.
    for x, y in zip(
        jax.tree.leaves(eight.state.opt_state),
        jax.tree.leaves(updated[0].state.opt_state),
        strict=True,
    ):
        x, y = np.asarray(x), np.asarray(y)
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max())
    for name, value in updated[1].items():
        assert metrics[name] == pytest.approx(value, abs=1e-5), name


def test_gap_is_against_the_samplers_logprobs_before_the_first_update(
    params, trajectories, updated
):
    gaps = []
    for t in trajectories:
        sampled = t.sources_T[1:] == TokenSource.SAMPLED
        gaps += np.abs(np.asarray(plain_logprobs(params, t.token_ids_T)) + 4.0)[sampled].tolist()
    assert updated[1]["logprob_gap"] == pytest.approx(np.mean(gaps), abs=1e-5)


def test_first_ratio_is_one_and_entropy_is_below_uniform(params, trajectories):
    metrics = learner(params, updates_per_rollout=1).update(trajectories, REWARDS, GROUPS)
    assert metrics["ratio_mean"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["clip_fraction"] == 0.0
    assert 0.0 < metrics["entropy"] < np.log(MODEL.vocab_size)


def test_groups_without_contrast_are_left_out(params, trajectories):
    """The update is that of the others alone; with none left nothing moves."""
    others = [i for i in range(10) if i not in (6, 7)]  # both of these have 1.0
    dropping = AlgorithmConfig(drop_zero_variance=True)
    whole, part = learner(params, algorithm=dropping), learner(params)
    metrics = whole.update(trajectories, REWARDS, GROUPS)
    part.update([trajectories[i] for i in others], REWARDS[others], GROUPS[others])
    assert metrics["learned_episodes"] == 8
    jax.tree.map(np.testing.assert_array_equal, whole.state.params, part.state.params)

    start = learner(params, algorithm=dropping)
    nothing = start.update(trajectories, np.ones(10), GROUPS)
    assert nothing.keys() == metrics.keys()  # a row of metrics.jsonl always has the same names
    assert nothing["learned_episodes"] == 0 and np.isnan(nothing["logprob_gap"])
    jax.tree.map(np.testing.assert_array_equal, start.state.params, params)


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(params, trajectories):
    bad = {**params, "embedding": params["embedding"] * jnp.nan}
    one = learner(bad)
    before = jax.tree.map(np.asarray, one.state.opt_state)
    metrics = one.update(trajectories, REWARDS, GROUPS)
    assert metrics["skipped_updates"] == metrics["skipped_at_end"] == 2.0
    assert_close(one.state.opt_state, before, 0.0)


def test_kl_weight_pulls_towards_the_reference_and_zero_never_evaluates_it(params, trajectories):
    one = learner(params)
    assert one.reference is None
    held = learner(params, algorithm=AlgorithmConfig(kl_weight=0.1))
    moved = jax.tree.map(lambda x: x + np.float32(0.05), params)
    held.restore({"state": learner(moved).state, "reference": held.reference})
    metrics = held.update(trajectories, np.zeros(10), GROUPS)  # only the KL term acts
    k1 = [
        np.asarray(plain_logprobs(moved, t.token_ids_T) - plain_logprobs(params, t.token_ids_T))[
            t.sources_T[1:] == TokenSource.SAMPLED
        ]
        for t in trajectories
    ]
    assert metrics["kl_ref"] == pytest.approx(np.concatenate(k1).mean(), abs=1e-5)
    assert any(
        not np.array_equal(np.asarray(a), b)
        for a, b in zip(jax.tree.leaves(held.state.params), jax.tree.leaves(moved), strict=True)
    )


def test_rows_must_divide_over_the_mesh(params):
    with pytest.raises(UserError, match=r"rows = 6 .* 4 devices"):
        learner(params, MeshConfig(data=2, fsdp=2, tensor=2), rows=6)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field, 0) for field in ("updates_per_rollout", "rows", "row_tokens", "clip_norm")),
        ("learning_rate", -1e-6),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("clip_norm", float("inf")),
        ("weight_decay", -0.1),
        ("adam_b1", 1.0),
        ("adam_b2", -0.1),
        ("first_moment_dtype", "float16"),
    ],
)
def test_settings_out_of_range(field, value):
    with pytest.raises(UserError, match=rf"^learner\.{field} = {value!r}[,:] [^\n]+$"):
        LearnerConfig(**{field: value})
