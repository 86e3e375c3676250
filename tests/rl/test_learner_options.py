"""The learner's options: layout of rows, low-rank adapters, reference in the loss, bf16 moments."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1s_jax.models.decoder import init_params
from r1s_jax.models.lora import LoraConfig, merged
from r1s_jax.rl.algorithm import AlgorithmConfig
from r1s_jax.sharding import MeshConfig
from tests.rl.test_learner import (
    GROUPS,
    MODEL,
    REWARDS,
    assert_close,
    episodes,
    learner,
    plain_logprobs,
)

LORA = LoraConfig(rank=2, alpha=4.0)
EVERYTHING = AlgorithmConfig(
    ratio="sequence",
    clip_low=0.01,
    clip_high=0.02,
    importance_cap=2.0,
    sequence_band=(0.5, 2.0),
    kl="k3",
    kl_weight=0.1,
    entropy_weight=0.01,
    llds_weight=0.2,
)


@pytest.fixture(scope="module")
def params():
    return init_params(MODEL, 0)


@pytest.fixture(scope="module")
def trajectories(params):
    """With the sampler's log-probs near the learner's: the band keeps some and drops others."""
    found = []
    for i, t in enumerate(episodes()):
        logprobs = np.zeros(len(t.token_ids_T), np.float32)
        logprobs[1:] = np.asarray(plain_logprobs(params, t.token_ids_T)) + (0.1, -0.3, 0.9)[i % 3]
        found.append(type(t)(**{**vars(t), "logprobs_T": logprobs, "drawn_logprobs_T": logprobs}))
    return found


@pytest.mark.slow
def test_the_layout_of_rows_changes_nothing_but_round_off(params, trajectories):
    """One episode a row or three: loss, metrics and moments are the same, every extra in use."""
    packed = learner(params, algorithm=EVERYTHING)
    other = learner(params, algorithm=EVERYTHING, rows=1, row_tokens=16)
    a, b = (each.update(trajectories, REWARDS, GROUPS) for each in (packed, other))
    assert 0 < a["sequence_masked"] < 1 and a["importance_weight"] != 1
    for name in a.keys() - {"packed_share"}:
        assert a[name] == pytest.approx(b[name], abs=2e-5), name
    for x, y in zip(
        jax.tree.leaves(packed.state.opt_state), jax.tree.leaves(other.state.opt_state), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max())


@pytest.mark.slow
def test_adapters_alone_train(params, trajectories):
    """The policy starts as the base; afterwards it is the base plus the adapters' products."""
    one = learner(params, lora=LORA)
    jax.tree.map(np.testing.assert_array_equal, one.policy(), params)
    assert set(one.checkpoint()["state"].params) == {"layers"}  # nothing of the base is saved
    metrics = one.update(trajectories, REWARDS, GROUPS)
    assert metrics["grad_norm"] > 0
    policy = one.policy()
    assert_close(policy, merged(params, one.state.params, LORA), 1e-6)
    np.testing.assert_array_equal(policy["embedding"], params["embedding"])
    moved = np.abs(
        np.asarray(policy["layers"]["q_kernel"]) - np.asarray(params["layers"]["q_kernel"])
    )
    assert moved.max() > 1e-3


def test_the_gradient_of_adapters_is_that_of_the_whole_policys_kernels(params, trajectories):
    """dL/db = a^T dL/dW alpha / rank, and dL/da = 0 while b is 0: in Adam's first moments."""
    moments = {}
    for name, options in {"lora": {"lora": LORA}, "full": {}}.items():
        one = learner(params, updates_per_rollout=1, clip_norm=1e9, **options)
        a = one.state.params["layers"].get("up_lora_a")
        moments[name] = a if a is None else np.asarray(a), one
        one.update(trajectories, REWARDS, GROUPS)
    (a, lora), (_, full) = moments["lora"], moments["full"]
    first = [one.state.opt_state[1][0].mu["layers"] for one in (lora, full)]
    expected = np.einsum("ldr,ldf->lrf", a, np.asarray(first[1]["up_kernel"])) * LORA.scale
    np.testing.assert_allclose(first[0]["up_lora_b"], expected, atol=1e-6)
    np.testing.assert_array_equal(first[0]["up_lora_a"], 0)


@pytest.mark.slow
def test_adapters_on_eight_devices(params, trajectories):
    one, eight = (
        learner(params, mesh, lora=LORA)
        for mesh in (MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2))
    )
    a, b = (each.update(trajectories, REWARDS, GROUPS) for each in (one, eight))
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    assert_close(one.policy(), eight.policy(), 2e-4)


@pytest.mark.slow
def test_a_reference_in_the_loss_pulls_back(params, trajectories):
    """Equal rewards: only k3 acts, and it brings the policy's log-probs nearer to the reference."""
    held = learner(params, algorithm=AlgorithmConfig(kl="k3", kl_weight=1.0), learning_rate=1e-4)
    moved = jax.tree.map(lambda x: x + np.float32(0.02), params)
    held.restore({"state": learner(moved).state, "reference": held.reference})
    kls = [held.update(trajectories, np.zeros(10), GROUPS)["kl_ref"] for _ in range(4)]
    assert kls[0] > kls[1] > kls[2] > kls[3] > 0


@pytest.mark.slow
def test_first_moments_in_bf16(params, trajectories):
    half, full = learner(params, first_moment_dtype="bfloat16"), learner(params)
    for each in (half, full):
        each.update(trajectories, REWARDS, GROUPS)
    (mu,), (nu,) = (
        {x.dtype for x in jax.tree.leaves(getattr(half.state.opt_state[1][0], name))}
        for name in ("mu", "nu")
    )
    assert (mu, nu) == (jnp.bfloat16, jnp.float32)
    for x, y, start in zip(
        *(jax.tree.leaves(t) for t in (half.state.params, full.state.params, params)), strict=True
    ):
        moved = np.abs(np.asarray(y) - np.asarray(start)).max()
        assert np.abs(np.asarray(x) - np.asarray(y)).max() < 0.05 * max(moved, 1e-6)
