"""Log-probabilities and entropy of given tokens against float64, and what never exists."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1s_jax.models.decoder import DecoderConfig, abstract_params, bind
from r1s_jax.models.logprobs import How, score, token_logprobs
from r1s_jax.models.packed import packed_attend
from r1s_jax.sharding import MeshConfig, make_mesh, named_sharding
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


@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("chunk", [1024, 5], ids=["whole", "blocks of 128"])
def test_gradient_against_float64(entropy_gradient, chunk):
    """By hidden states and output matrix, where blocks do not divide the vocabulary."""
    rng, temperature = np.random.default_rng(1), 0.7
    hidden, table = rng.normal(size=(2, 9, 6)), rng.normal(size=(300, 6))
    targets = rng.integers(0, 300, (2, 9))
    by_logprob, by_entropy = rng.normal(size=(2, 2, 9))
    logits = hidden @ table.T / temperature
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    picked = np.take_along_axis(np.log(p), targets[..., None], -1)[..., 0]
    entropy = -(p * np.log(p)).sum(-1)
    d_logits = by_logprob[..., None] * (np.eye(300)[targets] - p)
    if entropy_gradient:
        d_logits -= by_entropy[..., None] * p * (np.log(p) + entropy[..., None])
    d_logits /= temperature
    expected = (picked, entropy, d_logits @ table, np.einsum("btv,btd->vd", d_logits, hidden))

    @jax.jit
    def run(hidden, table):
        how = How(None, temperature, entropy_gradient, chunk)
        out, back = jax.vjp(lambda *x: score(how, *x, jnp.asarray(targets)), hidden, table)
        return *out, *back((jnp.float32(by_logprob), jnp.float32(by_entropy)))

    got = run(jnp.float32(hidden), jnp.float32(table))
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_one_gradient_fits():
    """With a vocabulary of 152k the logits cost nothing beside parameters, Adam and activations."""
    model = DecoderConfig(
        vocab_size=151_936,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
    params, _ = abstract_params(model)
    shape = (8, 1024)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)

    def with_logits(params, ids):
        logprobs, entropy = token_logprobs(
            model, params, ids, segments_BT=ids, scan=True, remat="full", entropy_gradient=True
        )
        return (logprobs + entropy).sum()

    def without(params, ids):
        run = partial(bind(model, params), scan=True, remat="full")
        return run(ids, ids, packed_attend(ids))[0].sum()

    compiled, bare = (
        jax.jit(jax.grad(f)).lower(params, tokens).compile() for f in (with_logits, without)
    )
    kept = sum(4 * leaf.size for leaf in jax.tree.leaves(params))
    floor = 3 * kept + bare.memory_analysis().temp_size_in_bytes
    # One time `kept` more: the gradient itself.
    assert 4 * kept + compiled.memory_analysis().temp_size_in_bytes < 1.3 * floor
    assert max(map(math.prod, arrays(compiled))) < math.prod(shape) * model.vocab_size / 16


def test_vocabulary_stays_split():
    """On a mesh no device gets more of matrix or logits than its own half, nor its gradient."""
    model, mesh = tiny.MODEL, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shapes, axes = abstract_params(model)
    layout = jax.tree.map(
        partial(named_sharding, mesh), axes, is_leaf=lambda x: isinstance(x, tuple)
    )
    params = jax.tree.map(
        lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s), shapes, layout
    )
    rows = named_sharding(mesh, ("rows", None))

    def loss(params, tokens):
        return token_logprobs(model, params, tokens, mesh=mesh, scan=True)[0].sum()

    tokens = jax.ShapeDtypeStruct((8, 16), jnp.int32, sharding=rows)
    compiled = jax.jit(jax.grad(loss), out_shardings=layout).lower(params, tokens).compile()
    found = list(arrays(compiled))
    assert any(model.vocab_size // 2 in shape for shape in found)
    assert not any(model.vocab_size in shape for shape in found)


def arrays(compiled):
    """The shapes in a compiled program, those on one device."""
    for dimensions in set(re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", compiled.as_text())):
        yield tuple(map(int, dimensions.split(",")))


@pytest.mark.slow
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
