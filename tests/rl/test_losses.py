"""The policy loss on a row or two, worked out by hand; `test_algorithms` has the random batches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1s_jax.rl.algorithm import AlgorithmConfig
from r1s_jax.rl.losses import policy_loss, segment_sums, sum_names

# One row: episode 1 with ratios 2 and 1/2 around a document, episode 2 with a ratio of 1.1,
# padding. Every token weighs 1/2.
NEW = np.log([[0.9, 0.8, 0.1, 0.2, 0.9, 0.55, 0.9]])
OLD = np.log([[0.1, 0.4, 0.9, 0.4, 0.9, 0.50, 0.1]])
MASK = np.array([[0, 1, 0, 1, 0, 1, 0]], bool)
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 0]])
ENTROPY = np.array([[9.0, 1.0, 9.0, 2.0, 9.0, 4.0, 9.0]])


def run(
    advantages,
    *,
    new=NEW,
    old=OLD,
    drawn=OLD,
    ref=None,
    weights=0.5,
    mask=MASK,
    beside=0.0,
    **config,
):
    """(loss, gradient by log-prob, gradient by entropy, sums).

    `advantages` are those of the two episodes; off the mask stands `beside`.
    """
    per_token = np.where(MASK, np.choose(SEGMENTS, [0.0, *advantages]), beside)

    def loss(new, entropy):
        arrays = [old, drawn, ref, per_token, np.full(SEGMENTS.shape, weights)]
        f32 = [None if a is None else jnp.asarray(a, jnp.float32) for a in arrays]
        segments = jnp.asarray(SEGMENTS)
        return policy_loss(
            AlgorithmConfig(**config), new, entropy, *f32, jnp.asarray(mask), segments
        )

    (value, sums), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
        jnp.asarray(new, jnp.float32), jnp.asarray(ENTROPY, jnp.float32)
    )
    assert set(sums) == set(sum_names(AlgorithmConfig(**config)))
    return float(value), *map(np.asarray, gradients), {k: float(v) for k, v in sums.items()}


def sampled(gradient):
    """The three sampled tokens' part; the others' is exactly 0."""
    assert not gradient[~MASK].any()
    return gradient[MASK]


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-7)


def test_clip():
    value, gradient, by_entropy, sums = run((1.0, -1.0))
    close(value, 0.5 * (-1.2 - 0.5 + 1.1))
    close(sampled(gradient), [0.0, -0.25, 0.55])
    assert not by_entropy.any()
    close(sums["clip_fraction"], 1)
    close(sums["ratio_mean"], 2 + 0.5 + 1.1)
    close(sums["entropy"], 7)
    k3 = [r - 1 - np.log(r) for r in (2, 0.5, 1.1)]
    close(sums["approx_kl"], sum(k3))
    value, gradient, _, sums = run((-1.0, 1.0), clip_low=0.4, clip_high=0.05)
    close(value, 0.5 * (2 + 0.6 - 1.05))
    close(sampled(gradient), [1.0, 0.0, 0.0])
    close(sums["clip_fraction"], 2)


def test_cispo_keeps_the_gradient_of_what_it_clips():
    value, gradient, _, sums = run((1.0, -2.0), objective="cispo")
    close(value, 0.5 * (-1.2 * np.log(0.8) - 0.8 * np.log(0.2) + 2 * 1.1 * np.log(0.55)))
    close(sampled(gradient), [-0.6, -0.4, 1.1])
    close(sums["clip_fraction"], 2)


def test_sequence_ratio_is_the_geometric_mean_of_an_episode():
    """2 and 1/2 make 1; the neighbour in the row has its own 1.1."""
    value, gradient, _, sums = run((1.0, 3.0), ratio="sequence")
    close(value, 0.5 * (-1 - 1 - 3.3))
    close(sampled(gradient), [-0.5, -0.5, -1.65])
    close(sums["ratio_mean"], 3.1)
    _, gradient, _, sums = run((1.0, 3.0), ratio="sequence", clip_high=0.05)
    close(sampled(gradient), [-0.5, -0.5, 0])
    close(sums["clip_fraction"], 1)


def test_importance_weights_are_capped_and_get_no_gradient():
    drawn = OLD - np.log([[1, 1.5, 1, 4, 1, 0.5, 1]])  # pi_old / mu
    value, gradient, _, sums = run((1.0, -1.0), drawn=drawn, importance_cap=2.0)
    close(value, 0.5 * (-1.2 * 1.5 - 0.5 * 2 + 1.1 * 0.5))
    close(sampled(gradient), [0, -0.5, 0.275])
    close(sums["importance_weight"], 1.5 + 2 + 0.5)


@pytest.mark.parametrize(("second", "masked"), [(1.009, 0), (1.011, 1), (0.991, 0), (0.989, 1)])
def test_band_masks_whole_episodes(second, masked):
    """1.5 and 1 / 1.5 make 1: the mean counts, not each token."""
    drawn = OLD - np.log([[7, 1.5, 7, 1 / 1.5, 7, second, 7]])
    value, gradient, _, sums = run(
        (1.0, -1.0), drawn=drawn, sequence_band=(0.99, 1.01), entropy_weight=0.1
    )
    close(value, 0.5 * (-1.2 - 0.5 - 0.3 + (1 - masked) * (1.1 - 0.4)))
    close(sampled(gradient), [0, -0.25, 0.55 * (1 - masked)])
    assert sums["sequence_masked"] == masked
    assert sums["ratio_mean"] == pytest.approx(3.6)  # what is masked is still measured


@pytest.mark.parametrize(
    ("kl", "values", "slopes"),
    [
        ("k2", [np.log(2) ** 2 / 2, 0, np.log(2) ** 2 / 2], [np.log(2), 0, -np.log(2)]),
        ("k3", [0.5 - 1 + np.log(2), 0, 2 - 1 - np.log(2)], [0.5, 0, -1]),
    ],
)
def test_kl_in_the_loss(kl, values, slopes):
    ref = NEW - np.log([[1, 2, 1, 1, 1, 0.5, 1]])  # pi / ref
    value, gradient, _, sums = run((0.0, 0.0), ref=ref, kl=kl, kl_weight=0.3)
    close(value, 0.15 * sum(values))
    close(sampled(gradient), 0.15 * np.array(slopes))
    close(sums["kl_ref"], sum(values))


def test_entropy_bonus():
    value, gradient, by_entropy, _ = run((0.0, 0.0), entropy_weight=0.1)
    close(value, -0.05 * 7)
    close(sampled(by_entropy), [-0.05] * 3)
    assert not gradient.any()


def test_llds_holds_what_is_rewarded_in_episodes_that_fell():
    old = NEW + np.array([[0, 0.3, 0, -0.1, 0, 0.4, 0]])  # episode 1 fell by 0.2 in all
    extras = {"old": old, "llds_weight": 0.5, "clip_low": 9.0, "clip_high": 9.0}
    value, gradient, _, sums = run((0.0, -1.0), **extras)
    close(sums["llds"], 0.3)
    close(value, 0.5 * (0.5 * 0.3 + np.exp(-0.4)))
    close(sampled(gradient), [-0.25, 0, 0.5 * np.exp(-0.4)])
    extras["old"] = NEW + np.array([[0, 0.3, 0, -0.35, 0, 0, 0]])  # it rose; the other stood still
    _, gradient, _, sums = run((0.0, 0.0), **extras)
    assert sums["llds"] == 0.0 and not gradient.any()
    extras["old"] = NEW + np.array([[0, 0.3, 0, 0, 0, 0, 0]])  # token 3 kept its log-prob
    close(sampled(run((0.0, 0.0), **extras)[1]), [-0.25, 0, 0])


def test_small_divergences_are_not_round_off():
    """exp(x) - 1 - x is all noise in float32 for changes that one update makes."""
    old = -np.ones(NEW.shape) - np.array([[0, 2**-13, 0, -(2**-12), 0, 2**-14, 0]])
    new = -np.ones(NEW.shape)
    _, _, _, sums = run((1.0, 1.0), new=new, old=old, ref=old, kl="k3", kl_weight=1.0)
    want = sum(x**2 / 2 for x in (2.0**-13, 2.0**-12, 2.0**-14))
    assert sums["approx_kl"] == pytest.approx(want, rel=1e-3)
    assert sums["kl_ref"] == pytest.approx(want, rel=1e-3)


EVERYTHING = {
    "kl": "k3", "kl_weight": 0.3, "entropy_weight": 0.1, "llds_weight": 0.2, "importance_cap": 1.5,
    "sequence_band": (0.5, 2.0),
}  # fmt: skip


@pytest.mark.parametrize("dirt", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("objective", ["clip", "cispo"])
def test_what_stands_off_the_mask_is_nothing(dirt, ratio, objective):
    def dirty(x):
        return np.where(MASK, x, dirt)

    config = dict(ratio=ratio, objective=objective, **EVERYTHING)
    clean = run((1.0, -1.0), ref=OLD, **config)
    arrays = {"new": dirty(NEW), "old": dirty(OLD), "drawn": dirty(OLD), "ref": dirty(OLD)}
    again = run((1.0, -1.0), weights=dirty(0.5), beside=dirt, **arrays, **config)
    for a, b in zip(clean[:3], again[:3], strict=True):
        np.testing.assert_array_equal(a, b)
    assert clean[3] == again[3]
    assert all(np.isfinite(list(clean[3].values())))

    value, *gradients, sums = run(
        (1.0, -1.0), mask=np.zeros_like(MASK), weights=dirt, **arrays, **config
    )
    assert value == 0.0 and not any(g.any() for g in gradients) and not any(sums.values())


def test_only_log_probs_and_entropy_get_a_gradient():
    arrays = [jnp.asarray(a, jnp.float32) for a in (OLD, OLD, OLD, 1 + 0 * OLD, 1 + 0 * OLD)]

    def loss(old, drawn, ref, advantages, weights):
        new, entropy = jnp.asarray(NEW, jnp.float32), jnp.asarray(ENTROPY, jnp.float32)
        return policy_loss(
            AlgorithmConfig(**EVERYTHING), new, entropy, old, drawn, ref, advantages, weights,
            jnp.asarray(MASK), jnp.asarray(SEGMENTS),
        )[0]  # fmt: skip

    for gradient in jax.grad(loss, argnums=(0, 1, 2, 3, 4))(*arrays):
        assert not np.asarray(gradient).any()


def test_segment_sums():
    """Rows apart, numbers of a segment anywhere in the row, padding by itself."""
    values = jnp.array([[1.0, 2.0, 4.0, 8.0, 16.0, 32.0], [1.0, 1.0, 2.0, 3.0, 5.0, 8.0]])
    segments = jnp.array([[1, 1, 2, 2, 2, 0], [1, 2, 3, 64, 64, 0]])
    want = [[3, 3, 28, 28, 28, 32], [1, 1, 2, 8, 8, 8]]
    np.testing.assert_array_equal(segment_sums(values, segments), want)
    slope = jax.grad(lambda v: (segment_sums(v, segments) * jnp.arange(6)).sum())(values)
    np.testing.assert_array_equal(slope, [[1, 1, 9, 9, 9, 5], [0, 1, 2, 7, 7, 5]])


def test_shapes_are_checked():
    x = jnp.zeros((2, 3))
    mask, segments = jnp.zeros((2, 3), bool), jnp.zeros((2, 3), int)
    args = [x, x, x, x, None, x, x, mask, segments]
    policy_loss(AlgorithmConfig(), *args)
    for i in (0, 1, 2, 3, 5, 6, 7, 8):
        wrong = [*args[:i], args[i][:, 1:], *args[i + 1 :]]
        with pytest.raises((AssertionError, TypeError)):
            policy_loss(AlgorithmConfig(), *wrong)
