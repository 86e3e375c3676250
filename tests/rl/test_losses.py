"""The loss and its gradient against float64 loops; micro-batches against the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1s_jax.rl.losses import policy_loss


def _inputs(seed=0, rows=6, tokens=5):
    rng = np.random.default_rng(seed)
    old = -rng.exponential(size=(rows, tokens)).astype(np.float32)
    new = old + rng.normal(size=old.shape, scale=0.4).astype(np.float32)
    advantages = rng.normal(size=rows).astype(np.float32)
    mask = rng.random(old.shape) < 0.6
    mask[0] = np.arange(tokens) == 2  # a one-token response
    mask[1] = False  # a padding row
    mask[2] = True
    return new, old, advantages, mask


def _reference(new, old, advantages, mask, total, low, high):
    """Value, gradient with respect to `new`, and diagnostics, by hand in float64."""
    new, old = new.astype(np.float64), old.astype(np.float64)
    value, gradient = 0.0, np.zeros_like(new)
    aux = dict.fromkeys(("clip_fraction", "ratio_mean", "approx_kl"), 0.0)
    for b in range(len(new)):
        positions = np.flatnonzero(mask[b])
        for t in positions:
            weight = 1.0 / (len(positions) * total)
            ratio = np.exp(new[b, t] - old[b, t])
            a = float(advantages[b] if advantages.ndim == 1 else advantages[b, t])
            cut = (a > 0 and ratio > 1 + high) or (a < 0 and ratio < 1 - low)
            bound = 1 + high if a > 0 else 1 - low
            value -= weight * a * (bound if cut else ratio)
            gradient[b, t] = 0.0 if cut else -weight * a * ratio
            aux["clip_fraction"] += weight * cut
            aux["ratio_mean"] += weight * ratio
            aux["approx_kl"] += weight * (ratio - 1 - np.log(ratio))
    return value, gradient, aux


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28)])
@pytest.mark.parametrize("per_token", [False, True])
def test_value_gradient_and_diagnostics_equal_float64(seed, low, high, per_token):
    new, old, advantages, mask = _inputs(seed)
    if per_token:
        advantages = np.random.default_rng(9).normal(size=new.shape).astype(np.float32)

    def loss(x):
        return policy_loss(
            x, jnp.asarray(old), jnp.asarray(advantages), jnp.asarray(mask),
            total_sequences=5, clip_low=low, clip_high=high,
        )  # fmt: skip

    (value, aux), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(new))
    want, want_gradient, want_aux = _reference(new, old, advantages, mask, 5, low, high)
    assert want_aux["clip_fraction"] > 0.05  # the clip is at work in this test
    np.testing.assert_allclose(value, want, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(gradient, want_gradient, rtol=1e-5, atol=1e-7)
    assert aux.keys() == want_aux.keys()
    for name, number in want_aux.items():
        np.testing.assert_allclose(aux[name], number, rtol=1e-5, atol=1e-6)


def test_by_hand():
    """Ratios 2 and 1/2 on tokens 1 and 3 of one row, advantage 1, clip 0.2."""
    new = jnp.log(jnp.array([[0.9, 0.8, 0.1, 0.2]]))
    old = jnp.log(jnp.array([[0.1, 0.4, 0.9, 0.4]]))
    mask = jnp.array([[False, True, False, True]])
    value, aux = policy_loss(new, old, jnp.array([1.0]), mask, total_sequences=1)
    np.testing.assert_allclose(value, -(1.2 + 0.5) / 2, rtol=1e-6)
    np.testing.assert_allclose(aux["clip_fraction"], 0.5)
    np.testing.assert_allclose(aux["ratio_mean"], 1.25, rtol=1e-6)
    value, aux = policy_loss(new, old, jnp.array([-1.0]), mask, total_sequences=1)
    np.testing.assert_allclose(value, (2.0 + 0.8) / 2, rtol=1e-6)


def test_on_policy_gradient_is_the_policy_gradient():
    """At ratio 1 nothing is cut: the gradient is -A / (tokens of the row x sequences)."""
    _, old, advantages, mask = _inputs()
    gradient = jax.grad(
        lambda x: policy_loss(
            x, jnp.asarray(old), jnp.asarray(advantages), jnp.asarray(mask), total_sequences=5
        )[0]
    )(jnp.asarray(old))
    want = -advantages[:, None] * mask / np.maximum(mask.sum(1), 1)[:, None] / 5
    np.testing.assert_allclose(gradient, want, rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_microbatches_add_up_to_the_whole(rows):
    arrays = tuple(jnp.asarray(a) for a in _inputs())

    def loss(new, old, advantages, mask):
        return policy_loss(new, old, advantages, mask, total_sequences=jnp.float32(5))

    grad = jax.value_and_grad(loss, has_aux=True)
    (whole, whole_aux), whole_gradient = grad(*arrays)
    parts = [grad(*(a[i : i + rows] for a in arrays)) for i in range(0, 6, rows)]
    np.testing.assert_allclose(sum(p[0][0] for p in parts), whole, rtol=1e-6)
    for name in whole_aux:
        np.testing.assert_allclose(sum(p[0][1][name] for p in parts), whole_aux[name], rtol=1e-5)
    np.testing.assert_array_equal(np.concatenate([p[1] for p in parts]), whole_gradient)


def test_padding_is_exactly_nothing_whatever_it_holds():
    """Infinite or NaN numbers off the mask used to reach the gradient as NaN."""
    new, old, advantages, mask = _inputs()
    dirty_new, dirty_old = np.where(mask, new, -np.inf), np.where(mask, old, np.nan)
    dirty_advantages = advantages.copy()
    dirty_advantages[1] = np.nan  # the empty row's

    def grad(x, old, advantages):
        return jax.value_and_grad(
            lambda x: policy_loss(
                x, jnp.asarray(old), jnp.asarray(advantages), jnp.asarray(mask), total_sequences=5
            )[0]
        )(jnp.asarray(x))

    clean, dirty = grad(new, old, advantages), grad(dirty_new, dirty_old, dirty_advantages)
    np.testing.assert_array_equal(clean[0], dirty[0])
    np.testing.assert_array_equal(clean[1], dirty[1])
    assert not np.asarray(clean[1])[~mask].any()

    value, aux = policy_loss(
        jnp.asarray(new), jnp.asarray(old), jnp.asarray(advantages), jnp.zeros(mask.shape, bool),
        total_sequences=5,
    )  # fmt: skip
    assert value == 0.0
    assert all(v == 0.0 for v in aux.values())


def test_old_logprobs_and_advantages_get_no_gradient():
    new, old, advantages, mask = (jnp.asarray(a) for a in _inputs())
    gradients = jax.grad(
        lambda o, a: policy_loss(new, o, a, mask, total_sequences=5)[0], argnums=(0, 1)
    )(old, advantages)
    assert not any(np.asarray(g).any() for g in gradients)


def test_shapes_are_checked():
    new, old, advantages, mask = (jnp.asarray(a) for a in _inputs())
    with pytest.raises((AssertionError, TypeError)):
        policy_loss(new, old[:, 1:], advantages, mask, total_sequences=5)
    with pytest.raises((AssertionError, TypeError)):
        policy_loss(new, old, advantages[:1], mask, total_sequences=5)
