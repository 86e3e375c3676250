"""Advantages against plain float64 loops over tokens, and the edge cases by hand."""

import numpy as np
import pytest

from r1s_jax.rl.advantages import (
    advantages,
    check_group_size,
    estimator_by_name,
    has_contrast,
    kl_returns,
    token_advantages,
)
from r1s_jax.types import UserError

REINFORCE = "reinforce_plus_plus_baseline"


def _random_rollout(seed=0, groups=5, tokens=7):
    """Groups of unequal size (some lost members) in shuffled order."""
    rng = np.random.default_rng(seed)
    ids = np.concatenate([np.full(rng.integers(2, 5), 10 * g) for g in range(groups)])
    rng.shuffle(ids)
    rewards = np.round(rng.normal(size=len(ids)) * 2, 1)
    rewards[ids == 0] = 0.3  # a group without variance
    mask = rng.random((len(ids), tokens)) < 0.6
    mask[:, 1] = True
    mask[3] = np.arange(tokens) == 4  # a one-token response
    return rewards, ids, mask


def _token_loop(rewards, ids, mask, estimator, penalty=None):
    """The definition, token by token: baseline, reward on the last token, return-to-go, whiten."""
    returns, kept = {}, []
    for i in range(len(rewards)):
        group = [min(max(rewards[j], -10.0), 10.0) for j in range(len(ids)) if ids[j] == ids[i]]
        mean = sum(group) / len(group)
        value = min(max(rewards[i], -10.0), 10.0) - mean
        if estimator == "grpo":
            variance = sum((g - mean) ** 2 for g in group) / (len(group) - 1)
            value /= variance**0.5 + 1e-9
        positions = [t for t in range(mask.shape[1]) if mask[i, t]]
        reward_t = {t: 0.0 if penalty is None else penalty[i, t] for t in positions}
        if positions:
            reward_t[positions[-1]] += value
        flow = 0.0
        for t in reversed(positions):
            flow += reward_t[t]
            returns[i, t] = flow
            kept.append((i, t))
    if estimator == REINFORCE:
        values = [returns[k] for k in kept]
        mean = sum(values) / len(values)
        sigma = (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5
        returns = {k: (v - mean) / sigma for k, v in returns.items()}
    out = np.zeros(mask.shape)
    for key in kept:
        out[key] = returns[key]
    return out


@pytest.mark.parametrize("estimator", [REINFORCE, "grpo"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_episode_advantages_equal_the_token_loop(estimator, seed):
    rewards, ids, mask = _random_rollout(seed)
    got = advantages(rewards, ids, mask.sum(1), estimator=estimator)
    assert got.dtype == np.float32
    want = _token_loop(rewards, ids, mask, estimator)
    np.testing.assert_allclose(got[:, None] * mask, want, atol=2e-6)


@pytest.mark.parametrize("estimator", [REINFORCE, "grpo"])
def test_token_advantages_with_kl_equal_the_token_loop(estimator):
    rewards, ids, mask = _random_rollout(3)
    rng = np.random.default_rng(4)
    old, ref = rng.normal(size=(2, *mask.shape))
    old[~mask], ref[~mask] = np.inf, np.nan  # documents and padding may hold anything
    got = token_advantages(rewards, ids, mask, old, ref, kl_coefficient=0.3, estimator=estimator)
    with np.errstate(invalid="ignore"):
        want = _token_loop(rewards, ids, mask, estimator, penalty=-0.3 * (old - ref))
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_without_kl_the_token_advantages_are_the_episode_advantages():
    rewards, ids, mask = _random_rollout(5)
    zeros = np.zeros(mask.shape)
    got = token_advantages(rewards, ids, mask, zeros, zeros, kl_coefficient=0.0, estimator="grpo")
    whole = advantages(rewards, ids, mask.sum(1), estimator="grpo")
    np.testing.assert_array_equal(got, whole[:, None] * mask)


def test_kl_return_to_go_by_hand():
    old = np.log([[0.5, 0.5, 0.25, 0.5]])
    ref = np.log([[0.25, 0.5, 0.5, 0.25]])
    mask = np.array([[True, False, True, True]])
    k1 = np.log(2.0) * np.array([1.0, 0.0, -1.0, 1.0])
    want = -0.1 * np.array([[k1[0] + k1[2] + k1[3], k1[2] + k1[3], k1[2] + k1[3], k1[3]]])
    np.testing.assert_allclose(kl_returns(old, ref, mask, 0.1), want)


def test_reinforce_by_hand_weights_statistics_by_tokens():
    # Baselined: +1, -1 (group 7) and 0, 0 (group 8); tokens 1, 3, 2, 2.
    got = advantages(
        np.array([2.0, 0.0, 1.0, 1.0]), np.array([7, 7, 8, 8]), np.array([1, 3, 2, 2]),
        estimator=REINFORCE,
    )  # fmt: skip
    mean = (1 - 3) / 8
    sigma = np.sqrt((1 + 3) / 8 - mean**2)
    np.testing.assert_allclose(got, (np.array([1, -1, 0, 0]) - mean) / sigma, rtol=1e-6)
    assert got[2] > 0.0  # faithful: a group without variance is moved by whitening


def test_groups_of_equal_rewards_have_no_contrast():
    rewards, ids = np.array([2.0, 1.0, 0.0, 1.0, 11.0, 50.0]), np.array([7, 8, 7, 8, 9, 9])
    # The last two differ only beyond the clamp.
    assert has_contrast(rewards, ids).tolist() == [True, False, True, False, False, False]
    assert has_contrast(np.zeros(0), np.zeros(0, int)).shape == (0,)


@pytest.mark.parametrize("estimator", [REINFORCE, "grpo"])
def test_all_rewards_equal_gives_exactly_zero(estimator):
    """0.1 + 0.1 + 0.1 over 3 is not 0.1: the rounding used to be whitened into advantages."""
    ids, counts = np.array([0, 0, 0, 1, 1, 1]), np.arange(1, 7)
    got = advantages(np.full(6, 0.1), ids, counts, estimator=estimator)
    np.testing.assert_array_equal(got, np.zeros(6))


def test_grpo_uses_the_unbiased_deviation_and_no_whitening():
    got = advantages(
        np.array([1.0, 0.0, 5.0, 5.0, 2.0]), np.array([0, 0, 1, 1, 1]), np.array([1, 900, 1, 1, 1]),
        estimator="grpo",
    )  # fmt: skip
    third = np.sqrt(1 / 3)
    np.testing.assert_allclose(
        got, [np.sqrt(0.5), -np.sqrt(0.5), third, third, -2 * third], rtol=1e-6
    )


def test_rewards_are_clamped_before_the_baseline():
    counts = np.array([1, 1])
    far = advantages(np.array([1e6, -10.0]), np.array([0, 0]), counts, estimator="grpo")
    near = advantages(np.array([10.0, -10.0]), np.array([0, 0]), counts, estimator="grpo")
    np.testing.assert_array_equal(far, near)
    skew = advantages(
        np.array([1e6, 0.0, 0.0, 8.0]), np.array([0, 0, 1, 1]), np.ones(4, int), estimator=REINFORCE
    )
    np.testing.assert_allclose(skew, np.array([5, -5, -4, 4]) / np.sqrt(20.5), rtol=1e-6)


def test_empty_rollout_and_nothing_sampled():
    nothing = np.zeros(0)
    for estimator in (REINFORCE, "grpo"):
        got = advantages(nothing, nothing.astype(int), nothing.astype(int), estimator=estimator)
        assert got.shape == (0,)
    got = advantages(np.array([1.0, 0.0]), np.array([0, 0]), np.zeros(2, int), estimator=REINFORCE)
    np.testing.assert_array_equal(got, [0.0, 0.0])


def test_refusals():
    pair = np.array([0, 0])
    with pytest.raises(ValueError, match="group 4 has 1 episode"):
        advantages(np.zeros(3), np.array([0, 0, 4]), np.ones(3, int), estimator=REINFORCE)
    with pytest.raises(ValueError, match="not finite"):
        advantages(np.array([0.0, np.nan]), pair, pair, estimator=REINFORCE)
    with pytest.raises(ValueError, match="not finite"):
        has_contrast(np.array([0.0, np.nan]), pair)
    # Here the annotations catch it, without the type checker a ValueError does.
    with pytest.raises((ValueError, TypeError), match="token_counts"):
        advantages(np.zeros(2), pair, np.ones(3, int), estimator=REINFORCE)
    with pytest.raises((ValueError, TypeError), match="group_ids"):
        advantages(np.zeros(3), pair, np.ones(3, int), estimator=REINFORCE)
    with pytest.raises(ValueError, match=r"-0\.5"):
        zeros = np.zeros((2, 1))
        token_advantages(
            np.zeros(2), pair, zeros > 0, zeros, zeros, kl_coefficient=-0.5, estimator="grpo"
        )
    with pytest.raises(UserError, match=r"'ppo'.*reinforce_plus_plus_baseline, grpo"):
        estimator_by_name("ppo")


@pytest.mark.parametrize("estimator", [REINFORCE, "grpo"])
def test_group_size_is_refused_at_start(estimator):
    check_group_size(2, estimator)
    with pytest.raises(UserError, match=f"samples_per_question = 1.*'{estimator}'.*2"):
        check_group_size(1, estimator)
