"""Draws against probabilities, numpy and transformers' warpers, and the keys they depend on."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec
from scipy import stats
from transformers.generation import logits_process as warpers

from r1s_jax.engine import sampling
from r1s_jax.engine.sampling import SamplingConfig, inverse_cdf, row_seed, sample, uniforms
from r1s_jax.sharding import MeshConfig, make_mesh
from r1s_jax.types import UserError

RNG = np.random.default_rng(0)
draw = jax.jit(inverse_cdf)
PINNED, PINNED_UNIFORMS = [259195805, 789675520], [0.9777026176452637, 0.7741895914077759]
TRUNCATIONS = [
    SamplingConfig(top_k=7),
    SamplingConfig(top_p=0.9),
    SamplingConfig(min_p=0.02),
    ALL := SamplingConfig(temperature=0.7, top_k=100, top_p=0.95, min_p=0.003),
]


def softmax(x):
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def run(config):
    return jax.jit(partial(sample, config=config))


def keys(rows):
    return jnp.asarray(RNG.integers(0, 2**32, (rows, 2), dtype=np.uint32))


def kept(logits, config):
    """The tokens that the truncations leave, [B, V]."""
    blocks = sampling.in_blocks(jnp.asarray(logits, jnp.float32), -jnp.inf)
    left = jax.jit(partial(sampling.truncate, config=config))(blocks, blocks.max(axis=(1, 2)))
    return np.isfinite(np.asarray(left).reshape(len(logits), -1)[:, : logits.shape[1]])


def transformers_kept(logits, config):
    """The same by transformers, in float64; and by how much of the mass no token could change."""
    scores = torch.tensor(np.asarray(logits, np.float64))
    scores = warpers.TemperatureLogitsWarper(config.temperature)(None, scores)
    sure = np.ones(len(scores), bool)
    if config.top_k:
        scores = warpers.TopKLogitsWarper(config.top_k)(None, scores)
    if config.top_p < 1:
        mass = scores.softmax(-1).sort(descending=True).values.cumsum(-1)
        sure &= ((mass - config.top_p).abs().min(-1).values > 1e-6).numpy()
        scores = warpers.TopPLogitsWarper(config.top_p)(None, scores)
    if config.min_p:
        probs = scores.softmax(-1)
        ratio = probs / probs.amax(-1, keepdim=True)
        sure &= ((ratio - config.min_p).abs().min(-1).values > 1e-6).numpy()
        scores = warpers.MinPLogitsWarper(config.min_p)(None, scores)
    return torch.isfinite(scores).numpy(), sure


def chi_square(drawn, probs, cells):
    """p-value of draws put into cells, rare cells in one."""
    expected = np.bincount(cells, probs) * len(drawn)
    observed = np.bincount(cells[drawn], minlength=len(expected))
    often = expected > 5
    observed = np.append(observed[often], observed[~often].sum())
    expected = np.append(expected[often], expected[~often].sum())
    assert not observed[expected == 0].any()
    some = expected > 0
    return stats.chisquare(observed[some], expected[some]).pvalue if some.sum() > 1 else 1.0


@pytest.mark.parametrize("size", [1, 5, 37, 312])
def test_draws_follow_the_weights(size):
    """Chi-square of 20,000 draws; weights of zero are never drawn."""
    weights = RNG.random(size) ** 3
    weights[RNG.random(size) < 0.3] = 0
    weights[size // 2] = 0.5
    rows = jnp.broadcast_to(jnp.asarray(weights, jnp.float32), (20_000, size))
    drawn = np.asarray(draw(rows, jnp.asarray(RNG.random(20_000), jnp.float32)))
    assert (weights[drawn] > 0).all()
    assert chi_square(drawn, weights / weights.sum(), np.arange(size)) > 1e-4


def test_the_cells_of_the_unit_interval():
    """u in [cdf[i-1], cdf[i]) draws i: exact where all sums are."""
    weights = jnp.tile(jnp.array([[0.0, 1, 2, 0, 1, 4, 0, 0]]), (9, 1))
    u = jnp.array([0, 1, 2, 3, 4, 5, 6, 7, 7.999]) / 8
    np.testing.assert_array_equal(draw(weights, u), [1, 2, 2, 4, 5, 5, 5, 5, 5])


def test_a_weight_of_zero_is_never_drawn():
    """Bug: XLA's running sums rise by rounding where the weight is zero, and a draw fell into it.

    From 512 weights on, i.e. at real vocabularies. The uniforms are put on the very sums.
    """
    rows, size = 4000, 512
    weights = (RNG.random((rows, size)) ** 8).astype(np.float32)
    weights[RNG.random((rows, size)) < 0.5] = 0
    weights[:, 0] = 0.1
    sums = np.asarray(jnp.cumsum(jnp.asarray(weights), axis=-1))
    trap = (np.diff(sums) > 0) & (weights[:, 1:] == 0)
    assert trap.any(1).mean() > 0.5
    at = np.where(trap.any(1), trap.argmax(1), size - 1)
    u = sums[np.arange(rows), at] / np.asarray(jnp.asarray(weights).sum(-1))
    for nearby in (u, np.nextafter(u, np.float32(0)), np.nextafter(u, np.float32(1))):
        index = draw(jnp.asarray(weights), jnp.asarray(nearby))
        assert (weights[np.arange(rows), index] > 0).all()


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24, 1.0])
def test_the_ends_of_the_interval(u):
    """Rounding past the last sum takes the last positive weight, never a zero."""
    weights = RNG.random((64, 300)).astype(np.float32) ** 4
    weights[:, -7:] = 0
    weights[:, :3] = 0
    weights[:, [3, 292]] = 0.5
    index = draw(jnp.asarray(weights), jnp.full(64, u, jnp.float32))
    assert (np.asarray(index) == (3 if u == 0 else 292)).all()


@pytest.mark.parametrize("vocab, spread", [(41, 1.0), (3000, 1.5), (3000, 5.0)])
@pytest.mark.parametrize("config", TRUNCATIONS, ids=str)
def test_kept_tokens_are_those_of_transformers(config, vocab, spread):
    """Away from ties and from boundaries nearer than 1e-6; spread decides how few blocks do."""
    logits = RNG.normal(0, spread, (40, vocab)).astype(np.float32)
    expected, sure = transformers_kept(logits, config)
    assert sure.mean() > 0.8
    np.testing.assert_array_equal(kept(logits, config)[sure], expected[sure])


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.95, 0.998])
def test_top_p_keeps_the_smallest_set(top_p):
    """Against a sort in float64, rows with few and with many likely tokens together."""
    logits = RNG.normal(0, 1, (24, 5000)) * np.linspace(0.3, 6, 24)[:, None]
    probs = softmax(logits.astype(np.float32).astype(np.float64))
    mass = np.cumsum(-np.sort(-probs), axis=-1)
    count = (mass < top_p).sum(-1) + 1
    sure = np.abs(mass - top_p).min(-1) > 1e-6
    assert sure.mean() > 0.7
    got = kept(logits, SamplingConfig(top_p=top_p))
    np.testing.assert_array_equal(got.sum(-1)[sure], count[sure])
    lowest = np.where(got, probs, np.inf).min(-1)
    assert (np.where(got, 0, probs).max(-1) < lowest).all()


def test_the_search_goes_to_the_last_bit():
    """Weights one unit in the last place apart; 1; a target out of reach, which keeps all."""
    steps = np.float32(0.3).view(np.int32) + np.arange(4, dtype=np.int32)
    near = steps.view(np.float32)[::-1]
    weights = np.stack([near] * 4 + [[1, 1e-30, 0, 0]] * 2)
    target = np.append(
        near[0] * np.array([0.5, 1.5, 2.5, 3.5]), [1.0, 1.001]
    )  # the last: more than there is
    found = jax.jit(sampling.search)(
        jnp.asarray(weights[:, None], jnp.float32), jnp.asarray(target, jnp.float32)
    )
    np.testing.assert_array_equal(found, np.append(near, [1.0, 0.0]).astype(np.float32))


def test_the_order_of_truncations():
    """top-k, then top-p of what is left, then min-p: another order would keep other tokens."""
    logits = np.log([[0.5, 0.2, 0.15, 0.1, 0.05]])

    def left(**options):
        return np.nonzero(kept(logits, SamplingConfig(**options))[0])[0].tolist()

    assert left(top_p=0.7) == [0, 1] and left(top_k=2, top_p=0.7) == [0]
    assert left(top_p=0.8) == [0, 1, 2] == left(min_p=0.25)
    assert left(top_p=0.8, min_p=0.25) == [0, 1, 2]  # 0.8 of three tokens would be two
    assert left(top_k=99) == [0, 1, 2, 3, 4]


def test_ties_stay_together():
    """By thresholds; transformers does so in top-k and min-p, and splits a tie in top-p."""
    logits = np.log([[0.4, 0.2, 0.1, 0.2, 0.1]])
    for config, split in (
        (SamplingConfig(top_k=2), False),
        (SamplingConfig(top_p=0.5), True),
        (SamplingConfig(min_p=0.4), False),
    ):
        got = kept(logits, config)[0]
        assert got.tolist() == [True, True, False, True, False]
        theirs = transformers_kept(logits, config)[0][0]
        assert theirs.sum() == got.sum() - split
    assert kept(np.zeros((2, 300)), SamplingConfig(top_k=1, top_p=0.1)).all()


def test_truncation_after_a_ban():
    """Shares are of what may be drawn: a banned token counts for nothing."""
    logits = jnp.tile(jnp.log(jnp.array([[0.6, 0.2, 0.15, 0.05]])), (200, 1))
    banned = jnp.tile(jnp.array([[True, False, False, False]]), (200, 1))
    for config, allowed in (
        (SamplingConfig(top_p=0.5), {1}),
        (SamplingConfig(top_k=2, top_p=0.8), {1, 2}),
        (SamplingConfig(min_p=0.2), {1, 2, 3}),
    ):
        got = run(config)(logits, keys(200), jnp.arange(200), forbidden_BV=banned)
        assert set(np.asarray(got.tokens_B).tolist()) == allowed


SEEDS = jnp.asarray(
    np.stack([row_seed(0, "train", 0, f"q{i}", 0, 0) for i in range(400)]), jnp.uint32
)
POSITIONS = jnp.arange(400)
LOGITS = jnp.asarray(RNG.normal(0, 2, (400, 300)), jnp.float32)


@pytest.mark.parametrize(
    "config, banned",
    [
        (SamplingConfig(temperature=0.5), False),
        (SamplingConfig(temperature=0.5), True),
        (SamplingConfig(temperature=0.0), False),
        (SamplingConfig(temperature=0.0), True),
        (ALL, False),
        (ALL, True),
    ],
    ids=str,
)
def test_both_logprobs(config, banned):
    """Of the full softmax, as the learner recomputes it (invariant 3); of what was drawn from."""
    forbidden = np.tile(np.arange(300) % 3 == 0, (400, 1)) if banned else None
    got = run(config)(
        LOGITS, SEEDS, POSITIONS, forbidden_BV=None if forbidden is None else jnp.asarray(forbidden)
    )
    tokens, rows = np.asarray(got.tokens_B), np.arange(400)
    scores = np.asarray(LOGITS, np.float64)
    probs = softmax(scores / (config.temperature or 1.0))
    np.testing.assert_allclose(got.logprobs_B, np.log(probs[rows, tokens]), atol=3e-6)
    allowed = scores if forbidden is None else np.where(forbidden, -np.inf, scores)
    if config.temperature == 0.0:
        np.testing.assert_array_equal(tokens, allowed.argmax(-1))
        np.testing.assert_array_equal(got.drawn_logprobs_B, np.zeros(400))
        return
    left, sure = transformers_kept(allowed, config)
    drawn = softmax(np.where(left, allowed, -np.inf) / config.temperature)[rows, tokens]
    assert sure.mean() > 0.9 and (drawn[sure] > 0).all()
    np.testing.assert_allclose(got.drawn_logprobs_B[sure], np.log(drawn[sure]), atol=3e-6)


@pytest.mark.parametrize("config", [SamplingConfig(temperature=0.8), *TRUNCATIONS], ids=str)
def test_draws_at_a_real_vocabulary(config):
    """800 draws from 151,936 tokens, put into cells by block, by place in it and by rank."""
    vocab, rows, steps = 151_936, 8, 100
    logits = RNG.normal(0, 3, vocab).astype(np.float32)
    program = run(config)
    tiled, seeds = jnp.tile(jnp.asarray(logits), (rows, 1)), keys(rows)
    drawn = [program(tiled, seeds, jnp.full(rows, t, jnp.int32)).tokens_B for t in range(steps)]
    left, _ = transformers_kept(logits[None], config)
    probs = softmax(np.where(left[0], logits.astype(np.float64), -np.inf) / config.temperature)
    ids, drawn = np.arange(vocab), np.concatenate(drawn)
    assert (probs[drawn] > 0).all()
    rank = np.empty(vocab, int)
    rank[np.argsort(-logits)] = ids
    for cells in (ids // 4096, ids % 64, np.minimum(rank, 30) + (rank // 4000), rank % 20):
        assert chi_square(drawn, probs, cells) > 1e-4


def test_temperature():
    """Frequencies over many keys follow softmax(logits / temperature)."""
    rows, temperature = 20_000, 0.5
    logits = jnp.broadcast_to(jnp.array([0.0, 1.0, -1.0, 2.0, 0.5]), (rows, 5))
    got = run(SamplingConfig(temperature=temperature))(
        logits, keys(rows), jnp.zeros(rows, jnp.int32)
    )
    expected = softmax(np.asarray(logits[0], np.float64) / temperature)
    assert chi_square(np.asarray(got.tokens_B), expected, np.arange(5)) > 1e-4


@pytest.mark.parametrize("config", [SamplingConfig(temperature=0.0), ALL], ids=str)
def test_all_tokens_but_one_banned(config):
    """It is drawn, however unlikely; its own log-probability is the full one all the same."""
    vocab = 301
    only = RNG.integers(0, vocab, 64)
    logits = RNG.normal(0, 2, (64, vocab)).astype(np.float32)
    logits[np.arange(64), only] = -2000.0
    forbidden = np.arange(vocab) != only[:, None]
    got = run(config)(
        jnp.asarray(logits), keys(64), jnp.arange(64), forbidden_BV=jnp.asarray(forbidden)
    )
    np.testing.assert_array_equal(got.tokens_B, only)
    np.testing.assert_array_equal(got.drawn_logprobs_B, np.zeros(64))
    scaled = logits.astype(np.float64) / (config.temperature or 1.0)
    level = np.log(np.exp(scaled).sum(-1))
    np.testing.assert_allclose(got.logprobs_B, scaled[np.arange(64), only] - level, rtol=1e-6)


@pytest.mark.parametrize(
    "config",
    [SamplingConfig(temperature=1e-30), SamplingConfig(temperature=0.0), ALL],
    ids=str,
)
def test_extreme_logits(config):
    """±1e4 and -inf neither overflow nor are drawn wrongly; two equal peaks share the draws."""
    logits = np.full((400, 260), -1e4, np.float32)
    logits[:, 5] = -np.inf
    logits[:, [130, 258]] = 1e4
    got = run(config)(jnp.asarray(logits), SEEDS, POSITIONS)
    tokens = np.asarray(got.tokens_B)
    np.testing.assert_allclose(got.logprobs_B, np.full(400, np.log(0.5)), rtol=1e-6)
    if config.temperature == 0.0:
        assert (tokens == 130).all()  # the first of equals
    else:
        np.testing.assert_allclose(got.drawn_logprobs_B, np.full(400, np.log(0.5)), rtol=1e-6)
        assert set(tokens.tolist()) == {130, 258} and 150 < (tokens == 130).sum() < 250


def test_row_seed_differs_for_each_component():
    """Seed, phase, step, question, attempt and sample each make another key (invariant 7)."""
    values = [(0, 1), ("train", "eval"), (0, 1, 11), ("q", "q1", "q|1"), (0, 1, 11), (0, 1, 11)]
    seeds = {row_seed(*parts).tobytes() for parts in itertools.product(*values)}
    assert len(seeds) == 2 * 2 * 3 * 3 * 3 * 3
    assert (
        row_seed(3, "train", 1, "ü", 0, 2).tolist() == row_seed(3, "train", 1, "ü", 0, 2).tolist()
    )


def test_keys_are_pinned():
    """Runs are resumed and repeated with the same keys: the numbers may never change."""
    assert row_seed(0, "train", 0, "q", 0, 0).tolist() == PINNED
    assert uniforms(jnp.array([1, 2], jnp.uint32), jnp.int32(3)).tolist() == PINNED_UNIFORMS


def test_the_default_generator_does_not_matter():
    """Bug: keys were wrapped in JAX's default generator, which a flag changes."""
    with jax.default_prng_impl("rbg"):
        got = uniforms(jnp.array([1, 2], jnp.uint32), jnp.int32(3)).tolist()
    assert got == PINNED_UNIFORMS


def test_uniforms():
    """Every position draws anew, and its two numbers have nothing to do with each other."""
    numbers = np.asarray(jax.vmap(uniforms, (None, 0))(SEEDS[0], jnp.arange(2000)))
    assert numbers.shape == (2000, 2) and len(np.unique(numbers)) > 3990
    assert numbers.min() >= 0 and numbers.max() < 1
    for column in numbers.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    assert stats.pearsonr(*numbers.T).pvalue > 1e-3


@pytest.mark.parametrize("config", [SamplingConfig(), ALL], ids=str)
def test_a_draw_depends_on_its_row_alone(config):
    """Bit for bit: at another row, and among rows that need all blocks searched or do not."""
    program = run(config)
    flat = jnp.asarray(RNG.normal(0, 0.1, (8, 3000)), jnp.float32)
    peaked = jnp.asarray(RNG.normal(0, 9, (8, 3000)), jnp.float32)
    mixed = jnp.concatenate([flat[:4], peaked[4:]])
    seeds, positions, order = SEEDS[:8], POSITIONS[:8], RNG.permutation(8)
    one, other, both = (program(x, seeds, positions) for x in (flat, peaked, mixed))
    shuffled = program(mixed[order], seeds[order], positions[order])
    for of_flat, of_peaked, of_both, of_shuffled in zip(one, other, both, shuffled, strict=True):
        np.testing.assert_array_equal(of_both[:4], of_flat[:4])
        np.testing.assert_array_equal(of_both[4:], of_peaked[4:])
        np.testing.assert_array_equal(of_shuffled, of_both[order])


@pytest.mark.parametrize("config", [SamplingConfig(), SamplingConfig(top_p=0.9)], ids=str)
def test_a_sharded_vocabulary(config):
    """Rows over two devices, the vocabulary over four: the same draws, and no device holds all."""
    vocab = 4096
    logits = jnp.asarray(RNG.normal(0, 3, (16, vocab)), jnp.float32)
    alone = run(config)(logits, SEEDS[:16], POSITIONS[:16])
    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    over = [
        jax.device_put(x, NamedSharding(mesh, PartitionSpec("data", *rest)))
        for x, rest in ((logits, ("tensor",)), (SEEDS[:16], ()), (POSITIONS[:16], ()))
    ]
    program = run(config).lower(*over).compile()
    assert f",{vocab}]" not in program.as_text()
    shared = program(*over)
    np.testing.assert_array_equal(shared.tokens_B, alone.tokens_B)
    for got, expected in zip(shared[1:], alone[1:], strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-6)


OUT_OF_RANGE = [("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf"))]
OUT_OF_RANGE += [("top_p", 0.0), ("top_p", 1.1), ("top_k", -1), ("min_p", -0.1), ("min_p", 1.0)]


@pytest.mark.parametrize("field, value", OUT_OF_RANGE)
def test_values_out_of_range(field, value):
    """One line that names field and value."""
    with pytest.raises(UserError, match=rf"^sampling\.{field} = {value}: [^\n]+$"):
        SamplingConfig(**{field: value})
