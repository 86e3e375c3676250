"""A cache of integers: what is kept of each number, and how near the log-probs stay."""

import jax.numpy as jnp
import numpy as np
import pytest

from r1s_jax.engine import quantize
from r1s_jax.models.logprobs import token_logprobs
from tests import tiny
from tests.turns import play_turn

TEXT = [(5 * i + i * i) % 256 for i in range(60)]
PROMPTS = [[(7 * i + 3 * j) % 256 for j in range(5 + 4 * i)] for i in range(12)]


def test_scales_cover_the_measured_text():
    """Every key, at any position, and value of the text lies within the integers' reach."""
    seen = []
    k_scale, v_scale = quantize.measure(tiny.MODEL, tiny.params(), jnp.array(TEXT))
    from r1s_jax.models.attention import causal_attend
    from r1s_jax.models.decoder import hidden_states

    def attend(layer, cache, q, k, v):
        seen.append((np.asarray(k), np.asarray(v)))
        return causal_attend(len(TEXT))(layer, cache, q, k, v)

    for start in (0, 100):
        positions = jnp.arange(start, start + len(TEXT))[None]
        hidden_states(tiny.MODEL, tiny.params(), jnp.array([TEXT]), positions, attend)
    layers = tiny.MODEL.num_hidden_layers
    for index, (k, v) in enumerate(seen):
        for x, scale in ((k, k_scale[index % layers]), (v, v_scale[index % layers])):
            largest = np.abs(x).max((0, 1)) / scale / quantize.LARGEST
            assert largest.max() <= 1 / quantize.HEADROOM + 1e-5
            # ... and not far beyond it: a channel's own largest number uses its integers.
            assert largest.max() > 0.3 / quantize.HEADROOM


def test_rounding_is_to_the_nearest_and_cut_at_the_ends():
    scale = jnp.array([[0.5, 2.0]])
    x = jnp.array([0.3, 1.1, -0.7, 3.2, 1000.0, -1000.0]).reshape(1, 3, 1, 2)
    got = np.asarray(quantize.rounded(x, scale))[0, :, 0]
    assert got.dtype == np.int8
    assert got.tolist() == [[1, 1], [-1, 2], [127, -127]]


def test_scaling_is_by_the_head_that_is_looked_at():
    """Four query heads on two key/value heads."""
    scale = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    got = quantize.scaled(jnp.ones((1, 1, 4, 2)), scale)[0, 0]
    assert got.tolist() == [[1, 2], [1, 2], [3, 4], [3, 4]]


@pytest.fixture(scope="module")
def engine():
    return tiny.new_engine(int8_cache=True, scale_ids=TEXT)


def test_log_probs_stay_near(engine):
    """The same policy, its KV in eight bits: log-probs of what it wrote within 0.1, mean 0.02."""
    played = play_turn(engine, PROMPTS, tiny.SAMPLED, 40)
    rows = [p + tokens for p, (tokens, _, _) in zip(PROMPTS, played, strict=True)]
    ids = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = tokens
    exact = np.asarray(token_logprobs(tiny.MODEL, tiny.params(), jnp.asarray(ids))[0])
    gaps = np.concatenate(
        [
            np.abs(got - exact[row, len(prompt) : len(prompt) + len(tokens)])
            for row, (prompt, (tokens, got, _)) in enumerate(zip(PROMPTS, played, strict=True))
        ]
    )
    print(f"int8 cache: largest gap {gaps.max():.3f}, mean {gaps.mean():.4f}")
    assert len(gaps) > 100 and gaps.max() < 0.1 and gaps.mean() < 0.02
    assert gaps.max() > 1e-5  # integers there are


def test_pages_are_integers(engine):
    """A quarter of the memory of f32; scales follow the weights."""
    assert all(pool.dtype == jnp.int8 for pool in engine._pages)
    plain = tiny.engine().plan
    assert engine.plan.pages == plain.pages
    assert 4 * engine.plan.cache_bytes == plain.cache_bytes
    before = np.asarray(engine._weights["cache_scales"][1])
    engine.set_weights({**tiny.params()}, 8)
    np.testing.assert_array_equal(engine._weights["cache_scales"][1], before)


def test_a_text_is_needed():
    with pytest.raises(ValueError, match=r"engine\.int8_cache needs a text"):
        tiny.new_engine(int8_cache=True)
