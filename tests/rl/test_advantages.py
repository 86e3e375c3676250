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
every_estimator = pytest.mark.parametrize("estimator", [REINFORCE, "grpo", "rloo", "dr_grpo"])


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


def _token_loop(rewards, ids, mask, estimator, penalty=None, kept_N=None):
    """The definition, token by token: baseline, reward on the last token, return-to-go, whiten."""
    returns, kept = {}, []
    for i in range(len(rewards)):
        if kept_N is not None and not kept_N[i]:
            continue
        members = [j for j in range(len(ids)) if ids[j] == ids[i]]
        group = [min(max(rewards[j], -10.0), 10.0) for j in members]
        mean = sum(group) / len(group)
        if estimator == "rloo":
            others = [g for j, g in zip(members, group, strict=True) if j != i]
            mean = sum(others) / len(others)
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


@every_estimator
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_episode_advantages_equal_the_token_loop(estimator, seed):
    rewards, ids, mask = _random_rollout(seed)
    got = advantages(rewards, ids, mask.sum(1), estimator=estimator)
    assert got.dtype == np.float32
    want = _token_loop(rewards, ids, mask, estimator)
    np.testing.assert_allclose(got[:, None] * mask, want, atol=2e-6)


@every_estimator
def test_left_out_episodes_count_in_their_group_and_nowhere_else(estimator):
    rewards, ids, mask = _random_rollout(6)
    kept = np.random.default_rng(6).random(len(ids)) < 0.6
    got = advantages(rewards, ids, mask.sum(1), estimator=estimator, kept_N=kept)
    want = _token_loop(rewards, ids, mask, estimator, kept_N=kept)
    np.testing.assert_allclose(got[:, None] * mask, want, atol=2e-6)
    assert not got[~kept].any() and got[kept].any() and not kept.all()
    # Whatever their lengths are, they do not move the whitening.
    longer = np.where(kept, mask.sum(1), 1000)
    again = advantages(rewards, ids, longer, estimator=estimator, kept_N=kept)
    np.testing.assert_array_equal(got, again)
    nobody = np.zeros(len(ids), bool)
    got = advantages(rewards, ids, mask.sum(1), estimator=estimator, kept_N=nobody)
    np.testing.assert_array_equal(got, np.zeros(len(ids)))


@every_estimator
def test_token_advantages_with_kl_equal_the_token_loop(estimator):
    """Episodes of any length, some left out; documents may hold anything."""
    rewards, ids, mask = _random_rollout(3)
    rng = np.random.default_rng(4)
    lengths = np.where(mask[:, 5:].any(1), 7, rng.integers(5, 8, len(ids)))
    assert len(set(lengths)) > 1
    kept = rng.random(len(ids)) < 0.8
    kept[0] = False
    old, ref = rng.normal(size=(2, *mask.shape))
    old[~mask], ref[~mask] = np.inf, np.nan
    cut = [[row[:n] for row, n in zip(x, lengths, strict=True)] for x in (old, ref, mask)]
    returns = [kl_returns(*parts, 0.3) if k else None for k, *parts in zip(kept, *cut, strict=True)]
    masks = [m if k else None for k, m in zip(kept, cut[2], strict=True)]
    got = token_advantages(rewards, ids, returns, masks, estimator=estimator)
    with np.errstate(invalid="ignore"):
        want = _token_loop(rewards, ids, mask, estimator, -0.3 * (old - ref), kept_N=kept)
    for i, values in enumerate(got):
        if not kept[i]:
            assert values is None
            continue
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, want[i, : lengths[i]], atol=2e-6)


@every_estimator
def test_without_kl_the_token_advantages_are_the_episode_advantages(estimator):
    rewards, ids, mask = _random_rollout(5)
    zeros = [np.zeros(mask.shape[1])] * len(ids)
    got = token_advantages(rewards, ids, zeros, list(mask), estimator=estimator)
    whole = advantages(rewards, ids, mask.sum(1), estimator=estimator)
    np.testing.assert_allclose(np.stack(got), whole[:, None] * mask, rtol=1e-6)


def test_kl_return_to_go_by_hand():
    old, ref = np.log([0.5, 0.5, 0.25, 0.5]), np.log([0.25, 0.5, 0.5, 0.25])
    mask = np.array([True, False, True, True])
    # log 2 on token 0, -log 2 on token 2, log 2 on token 3
    want = -0.1 * np.log(2.0) * np.array([1.0, 0.0, 0.0, 1.0])
    np.testing.assert_allclose(kl_returns(old, ref, mask, 0.1), want, atol=1e-15)
    nothing = kl_returns(old * np.nan, ref, np.zeros(4, bool), 0.1)
    np.testing.assert_array_equal(nothing, np.zeros(4))


def test_leave_one_out_by_hand():
    rewards, ids = np.array([3.0, 7.0, 0.0, 1.0, 9.0]), np.array([0, 1, 0, 0, 1])
    got = advantages(rewards, ids, np.arange(1, 6), estimator="rloo")
    np.testing.assert_allclose(got, [3 - 0.5, 7 - 9, 0 - 2, 1 - 1.5, 9 - 7], rtol=1e-7)
    got = advantages(rewards, ids, np.arange(1, 6), estimator="dr_grpo")
    np.testing.assert_allclose(got, [5 / 3, -1, -4 / 3, -1 / 3, 1], rtol=1e-7)


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


@every_estimator
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


@every_estimator
def test_empty_rollout_and_nothing_sampled(estimator):
    nothing = np.zeros(0)
    got = advantages(nothing, nothing.astype(int), nothing.astype(int), estimator=estimator)
    assert got.shape == (0,)
    assert token_advantages(nothing, nothing.astype(int), [], [], estimator=estimator) == []
    rewards, pair = np.array([1.0, 0.0]), np.array([0, 0])
    got = advantages(rewards, pair, np.zeros(2, int), estimator=estimator)
    assert np.isfinite(got).all() and got.any() == (estimator != REINFORCE)
    masks = [np.zeros(2, bool), np.zeros(3, bool)]
    returns = [np.ones(2), np.ones(3)]
    got = token_advantages(rewards, pair, returns, masks, estimator=estimator)
    np.testing.assert_array_equal(np.concatenate(got), np.zeros(5))
    assert (
        token_advantages(rewards, pair, [None] * 2, [None] * 2, estimator=estimator) == [None] * 2
    )


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
    with pytest.raises(ValueError, match="2 rewards, 1 returns, 2 masks"):
        token_advantages(np.zeros(2), pair, [None], [None, None], estimator="grpo")
    zeros = np.zeros(3)
    with pytest.raises(ValueError, match=r"kl_weight = -0\.5"):
        kl_returns(zeros, zeros, zeros > 0, -0.5)
    with pytest.raises((ValueError, TypeError), match=r"shapes|ref_logprobs"):
        kl_returns(zeros, zeros[:2], zeros > 0, 0.5)
    with pytest.raises(UserError, match=r"'ppo'.*_baseline, grpo, rloo, dr_grpo"):
        estimator_by_name("ppo")


@every_estimator
def test_group_size_is_refused_at_start(estimator):
    check_group_size(2, estimator)
    with pytest.raises(UserError, match=f"samples_per_question = 1.*'{estimator}'.*2"):
        check_group_size(1, estimator)
