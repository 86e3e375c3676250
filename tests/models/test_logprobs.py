"""Log-probabilities and entropy of given tokens against float64, and what never exists."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1s_jax.models.decoder import abstract_params
from r1s_jax.models.logprobs import token_logprobs
from tests import tiny

TOKENS = jax.random.randint(jax.random.key(0), (3, 10), 0, tiny.MODEL.vocab_size)


@pytest.fixture(scope="module")
def logits():
    """In float64."""
    return np.asarray(
        jax.jit(partial(tiny.full_logits, tiny.MODEL))(tiny.params(), TOKENS), np.float64
    )


@pytest.mark.parametrize(
    "temperature, chunk, scan, remat",
    [(1.0, 1024, False, "none"), (0.7, 4, True, "full"), (1.0, 8, False, "dots")],
)
def test_against_float64(logits, temperature, chunk, scan, remat):
    """log-softmax and entropy at the temperature, also where chunks do not divide the positions."""
    scaled = logits / temperature
    log_softmax = scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))
    expected = np.take_along_axis(log_softmax[:, :-1], TOKENS[:, 1:, None], axis=-1)[..., 0]
    entropy = -(np.exp(log_softmax) * log_softmax).sum(-1)[:, :-1]
    run = partial(
        token_logprobs,
        tiny.MODEL,
        temperature=temperature,
        scan=scan,
        remat=remat,
        positions_per_chunk=chunk,
    )
    got = jax.jit(run)(tiny.params(), TOKENS)
    for ours, theirs in zip(got, (expected, entropy), strict=True):
        np.testing.assert_array_equal(ours[:, 0], 0)
        np.testing.assert_allclose(ours[:, 1:], theirs, atol=2e-5, rtol=0)


def test_right_padding_changes_nothing():
    """What stands behind a row's tokens is never looked at: invariant 7 on the learner's side."""
    run = jax.jit(lambda tokens: token_logprobs(tiny.MODEL, tiny.params(), tokens)[0])
    other = TOKENS.at[:, 7:].set(5)
    np.testing.assert_array_equal(run(TOKENS)[:, :7], run(other)[:, :7])


@pytest.mark.parametrize("scan, remat", [(False, "full"), (True, "dots")])
def test_gradient_is_that_of_the_plain_formula(scan, remat):
    """Chunks, scan and remat leave the gradient alone; the entropy gives none."""
    model, params = tiny.MODEL, tiny.params()
    weights = jnp.asarray(np.random.default_rng(1).normal(size=TOKENS.shape), jnp.float32)

    def ours(params):
        logprobs, entropy = token_logprobs(
            model,
            params,
            TOKENS,
            temperature=0.7,
            scan=scan,
            remat=remat,
            positions_per_chunk=4,
        )
        return (weights * (logprobs + entropy)).sum()

    def plain(params):
        logprobs = jax.nn.log_softmax(tiny.full_logits(model, params, TOKENS) / 0.7)[:, :-1]
        picked = jnp.take_along_axis(logprobs, TOKENS[:, 1:, None], axis=-1)[..., 0]
        return (weights[:, 1:] * picked).sum()

    got, expected = (jax.jit(jax.grad(f))(params) for f in (ours, plain))
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, atol=2e-4, rtol=1e-4), got, expected)


def sizes(jaxpr):
    """Element counts of every value in a jaxpr and in the jaxprs inside it."""
    for eqn in jaxpr.eqns:
        yield from (math.prod(v.aval.shape) for v in eqn.outvars if hasattr(v.aval, "shape"))
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from sizes(inner)


def test_no_logits_of_all_positions():
    """At a real vocabulary no value of forward or backward pass comes near [B, T, V]."""
    vocab, rows, length, chunk = 151_936, 4, 256, 32
    model = dataclasses.replace(tiny.MODEL, vocab_size=vocab)
    shapes, _ = abstract_params(model)
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def loss(params, tokens):
        return token_logprobs(model, params, tokens, remat="full", positions_per_chunk=chunk)[
            0
        ].sum()

    largest = max(sizes(jax.make_jaxpr(jax.value_and_grad(loss))(shapes, tokens).jaxpr))
    assert chunk * vocab <= largest < rows * length * vocab / 16


def test_computing_in_bf16():
    """Parameters stay f32 and get f32 gradients; the figures are those of bf16 parameters."""
    params, half = tiny.params(), jax.tree.map(lambda p: p.astype(jnp.bfloat16), tiny.params())
    mixed = jax.jit(partial(token_logprobs, tiny.MODEL, dtype=jnp.bfloat16))
    got = mixed(params, TOKENS)[0]
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(
        got, jax.jit(partial(token_logprobs, tiny.MODEL))(half, TOKENS)[0]
    )
    exact = jax.jit(partial(token_logprobs, tiny.MODEL))(params, TOKENS)[0]
    assert 1e-4 < np.abs(got - exact).max() < 0.2
    grads = jax.grad(lambda p: mixed(p, TOKENS)[0].sum())(params)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(grads))
