"""Draws against probabilities and numpy, and the keys they depend on."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from r1s_jax.engine.sampling import (
    SamplingConfig,
    inverse_cdf,
    row_seed,
    sample,
    truncate_top_p,
    uniform,
)

RNG = np.random.default_rng(0)
draw = jax.jit(inverse_cdf)
PINNED, PINNED_UNIFORM = [259195805, 789675520], 0.9777026176452637


def softmax(x):
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("vocab", [1, 5, 37, 312])
def test_draws_follow_the_weights(vocab):
    """Chi-square of 20,000 draws; weights of zero are never drawn; blocks need not be full."""
    weights = RNG.random(vocab) ** 3
    weights[RNG.random(vocab) < 0.3] = 0
    weights[vocab // 2] = 0.5
    rows = jnp.broadcast_to(jnp.asarray(weights, jnp.float32), (20_000, vocab))
    drawn = np.bincount(draw(rows, jnp.asarray(RNG.random(20_000), jnp.float32)), minlength=vocab)
    assert drawn.sum() == 20_000 and not drawn[weights == 0].any()
    expected = weights / weights.sum() * 20_000
    often = expected > 5  # the usual condition of the test; the rest goes into one cell
    cells = [(drawn[often], expected[often]), (drawn[~often].sum(), expected[~often].sum())]
    observed, expected = (np.append(*pair) for pair in zip(*cells, strict=True))
    kept = expected > 0
    if kept.sum() > 1:
        assert stats.chisquare(observed[kept], expected[kept]).pvalue > 1e-4


def test_the_cells_of_the_unit_interval():
    """u in [cdf[i-1], cdf[i]) draws i: exact where all sums are."""
    weights = jnp.tile(jnp.array([[0.0, 1, 2, 0, 1, 4, 0, 0]]), (9, 1))
    u = jnp.array([0, 1, 2, 3, 4, 5, 6, 7, 7.999]) / 8
    np.testing.assert_array_equal(draw(weights, u), [1, 2, 2, 4, 5, 5, 5, 5, 5])


def test_a_weight_of_zero_is_never_drawn():
    """Bug: XLA's running sums rise by rounding where the weight is zero, and a draw fell into it.

    From 512 weights on, i.e. at real vocabularies. The uniforms are put on the very sums.
    """
    rows, vocab = 4000, 512
    weights = (RNG.random((rows, vocab)) ** 8).astype(np.float32)
    weights[RNG.random((rows, vocab)) < 0.5] = 0
    weights[:, 0] = 0.1
    from r1s_jax.engine.sampling import _pick

    sums = np.asarray(jnp.cumsum(jnp.asarray(weights), axis=-1))
    trap = (np.diff(sums) > 0) & (weights[:, 1:] == 0)
    at = np.where(trap.any(1), trap.argmax(1), vocab - 1)
    index, _ = jax.jit(_pick)(jnp.asarray(weights), jnp.asarray(sums[np.arange(rows), at]))
    assert (weights[np.arange(rows), index] > 0).all()


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
def test_the_ends_of_the_interval(u):
    """Rounding past the last sum takes the last positive weight, never padding or a zero."""
    weights = RNG.random((64, 300)).astype(np.float32) ** 4
    weights[:, -7:] = 0
    weights[:, :3] = 0
    weights[:, [3, 292]] = 0.5
    index = draw(jnp.asarray(weights), jnp.full(64, u, jnp.float32))
    assert (np.asarray(index) == (3 if u == 0 else 292)).all()


def reference_top_p(probs, top_p):
    """The smallest set of likeliest tokens that reaches top_p."""
    kept, total = set(), 0.0
    for i in np.argsort(-probs):
        kept.add(int(i))
        total += probs[i]
        if total >= top_p:
            break
    return kept


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9, 0.999])
def test_top_p(top_p):
    """The kept tokens are the reference's, their log-probabilities untouched; one always stays."""
    logprobs = np.log(softmax(RNG.normal(0, 2, (20, 41)))).astype(np.float32)
    kept = np.asarray(truncate_top_p(jnp.asarray(logprobs), top_p))
    for row, before in zip(kept, logprobs, strict=True):
        assert set(np.nonzero(np.isfinite(row))[0]) == reference_top_p(np.exp(before), top_p)
        np.testing.assert_array_equal(row[np.isfinite(row)], before[np.isfinite(row)])


def test_top_p_after_a_ban():
    """The share is of what may be drawn: a banned token counts for nothing."""
    logprobs = jnp.log(jnp.array([[0.6, 0.2, 0.15, 0.05]])).at[0, 0].set(-jnp.inf)
    assert np.isfinite(truncate_top_p(logprobs, 0.5))[0].tolist() == [False, True, False, False]
    assert np.isfinite(truncate_top_p(logprobs, 0.8))[0].tolist() == [False, True, True, False]


SEEDS = jnp.asarray(
    np.stack([row_seed(0, "train", 0, f"q{i}", 0, 0) for i in range(400)]), jnp.uint32
)
POSITIONS = jnp.arange(400)
LOGITS = jnp.asarray(RNG.normal(0, 2, (400, 37)), jnp.float32)


@pytest.mark.parametrize(
    "temperature, top_p, banned",
    [(1.0, 1.0, False), (0.5, 1.0, True), (0.5, 0.6, True), (0.0, 1.0, False), (0.0, 1.0, True)],
)
def test_logprob_is_that_of_the_full_softmax(temperature, top_p, banned):
    """At the sampling temperature (1 when greedy), before truncation and bans.

    Hence it is what the learner recomputes (invariant 3).
    """
    config = SamplingConfig(temperature=temperature, top_p=top_p)
    forbidden = jnp.tile(jnp.arange(37) % 3 == 0, (400, 1)) if banned else None
    tokens, logprobs = jax.jit(partial(sample, config=config))(
        LOGITS, SEEDS, POSITIONS, forbidden_BV=forbidden
    )
    probs = softmax(np.asarray(LOGITS, np.float64) / (temperature or 1.0))
    tokens = np.asarray(tokens)
    expected = np.log(probs[np.arange(400), tokens])
    np.testing.assert_allclose(logprobs, expected, atol=1e-5)
    allowed = np.where(np.asarray(forbidden), 0, probs) if banned else probs
    assert (allowed[np.arange(400), tokens] > 0).all()
    if temperature == 0.0:
        np.testing.assert_array_equal(tokens, allowed.argmax(-1))
    elif top_p < 1:
        for row, token in zip(allowed / allowed.sum(-1, keepdims=True), tokens, strict=True):
            assert int(token) in reference_top_p(row, top_p)


def test_temperature():
    """Frequencies over many keys follow softmax(logits / temperature)."""
    rows, temperature = 20_000, 0.5
    seeds = jnp.asarray(RNG.integers(0, 2**32, (rows, 2), dtype=np.uint32))
    logits = jnp.broadcast_to(jnp.array([0.0, 1.0, -1.0, 2.0, 0.5]), (rows, 5))
    run = jax.jit(partial(sample, config=SamplingConfig(temperature=temperature)))
    tokens, _ = run(logits, seeds, jnp.zeros(rows, jnp.int32))
    expected = softmax(np.asarray(logits[0], np.float64) / temperature) * rows
    assert stats.chisquare(np.bincount(tokens, minlength=5), expected).pvalue > 1e-4


def test_row_seed_differs_for_each_component():
    """Seed, phase, step, question, attempt and sample each make another key (invariant 7)."""
    values = [(0, 1), ("train", "eval"), (0, 1, 11), ("q", "q1", "q|1"), (0, 1, 11), (0, 1, 11)]
    seeds = {row_seed(*parts).tobytes() for parts in itertools.product(*values)}
    assert len(seeds) == 2 * 2 * 3 * 3 * 3 * 3
    assert (
        row_seed(3, "train", 1, "ü", 0, 2).tolist() == row_seed(3, "train", 1, "ü", 0, 2).tolist()
    )


def test_row_seed_is_pinned():
    """Runs are resumed and repeated with the same keys: the numbers may never change."""
    assert row_seed(0, "train", 0, "q", 0, 0).tolist() == PINNED
    assert uniform(jnp.array([1, 2], jnp.uint32), jnp.int32(3)) == PINNED_UNIFORM


def test_a_draw_depends_on_its_key_and_position_alone():
    """Same key, same draw, at another row and among other rows; every position draws anew."""
    run = jax.jit(partial(sample, config=SamplingConfig()))
    tokens, logprobs = run(LOGITS, SEEDS, POSITIONS)
    order = RNG.permutation(400)
    mixed = run(LOGITS[order], SEEDS[order], POSITIONS[order])
    np.testing.assert_array_equal(mixed[0], tokens[order])
    np.testing.assert_array_equal(mixed[1], logprobs[order])
    numbers = np.asarray(jax.vmap(uniform, (None, 0))(SEEDS[0], jnp.arange(2000)))
    assert len(np.unique(numbers)) > 1990 and stats.kstest(numbers, "uniform").pvalue > 1e-3
    assert numbers.min() >= 0 and numbers.max() < 1


def test_the_default_generator_does_not_matter():
    """Bug: keys were wrapped in JAX's default generator, which a flag changes."""
    with jax.default_prng_impl("rbg"):
        got = float(uniform(jnp.array([1, 2], jnp.uint32), jnp.int32(3)))
    assert got == PINNED_UNIFORM
