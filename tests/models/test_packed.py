"""Packed rows: attention within episodes against numpy, and the policy's episodes one by one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1s_jax.models import packed
from r1s_jax.models.logprobs import token_logprobs
from r1s_jax.sharding import MeshConfig, make_mesh
from tests import tiny

RNG = np.random.default_rng(0)


def reference(q, k, v, ids, d):
    """Attention in float64 and its gradients by q, k, v under weights `d`, one head at a time."""
    out, dq, dk, dv = (np.zeros(x.shape) for x in (q, q, k, v))
    share = q.shape[2] // k.shape[2]
    causal = np.tril(np.ones((q.shape[1],) * 2, bool))
    for b, head in np.ndindex(q.shape[0], q.shape[2]):
        group, scale = head // share, q.shape[-1] ** -0.5
        scores = q[b, :, head] @ k[b, :, group].T * scale
        scores[~(causal & (ids[b][:, None] == ids[b]))] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out[b, :, head] = weights @ v[b, :, group]
        d_weights = d[b, :, head] @ v[b, :, group].T
        d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) * scale
        dq[b, :, head] = d_scores @ k[b, :, group]
        dk[b, :, group] += d_scores.T @ q[b, :, head]
        dv[b, :, group] += weights.T @ d[b, :, head]
    return out, dq, dk, dv


def row(*lengths, total):
    """Segment ids of one row: episodes of these lengths, then padding."""
    ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return np.pad(ids, (0, total - len(ids)))


@pytest.mark.parametrize(
    "kv_heads, score_bytes", [(1, None), (2, 1), (4, None)], ids=["mqa", "in pieces", "mha"]
)
def test_attention_against_float64(monkeypatch, kv_heads, score_bytes):
    """Values and gradients, with episodes that end within a block, on its border, and padding."""
    monkeypatch.setattr(packed, "BLOCK", 16)  # the last of them shorter
    if score_bytes:
        monkeypatch.setattr(packed, "SCORE_BYTES", score_bytes)
    q, d = RNG.normal(size=(2, 2, 43, 4, 6))
    k, v = RNG.normal(size=(2, 2, 43, kv_heads, 6))
    ids = np.stack([row(16, 1, 20, total=43), row(43, total=43)])
    expected = reference(q, k, v, ids, d)
    for ours, theirs in zip(with_gradients(q, k, v, ids, d), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)


def with_gradients(q, k, v, ids, d):
    """What `packed_attention` gives, and its gradients."""

    @jax.jit
    def run(q, k, v, d):
        out, back = jax.vjp(lambda *qkv: packed.packed_attention(*qkv, jnp.asarray(ids)), q, k, v)
        return out, *back(d)

    return run(*(jnp.asarray(x, jnp.float32) for x in (q, k, v, d)))


@pytest.mark.parametrize("tile", [(8, 4), (4, 8), (16, 16), (6, 4)], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_long_rows_against_float64(monkeypatch, tile, kv_heads):
    """Tile by tile; padding's outcome is finite, and has no part in any gradient."""
    monkeypatch.setattr(packed, "LONG", 42)
    monkeypatch.setattr(packed, "CPU_TILE", tile)
    q, d = RNG.normal(size=(2, 5, 43, 4, 6))
    k, v = RNG.normal(size=(2, 5, 43, kv_heads, 6))
    # Numbers need not ascend; the last row holds nothing.
    rows = [row(16, 1, 20, total=43), row(43, total=43), row(8, 8, 3, total=43), -row(30, total=43)]
    ids = np.stack([*rows, row(total=43)])
    ids[0] = np.choose(ids[0], [0, 7, -3, 2])
    episodes = (ids != 0)[..., None, None]
    d *= episodes
    expected = reference(q, k, v, ids, d)
    out, *gradients = with_gradients(q, k, v, ids, d)
    assert np.isfinite(out).all()
    for ours, theirs in zip((out * episodes, *gradients), expected, strict=True):
        np.testing.assert_allclose(ours, theirs * episodes, atol=5e-6)


def test_an_episode_of_a_long_row_costs_no_more_than_alone(monkeypatch):
    """No tile before a block's earliest episode is visited, nor any for padding."""
    monkeypatch.setattr(packed, "CPU_TILE", (4, 8))
    starts, first, last = packed._bounds(jnp.asarray(row(18, 2, 12, total=48)))
    assert starts.tolist() == list(range(0, 48, 4))
    #                episode 1      1+2  3 (from 20, in tile 2)
    assert first.tolist()[:8] == [0, 0, 0, 0, 0, 2, 2, 2]
    assert last.tolist()[:8] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert (first == last).tolist()[8:] == [True] * 4


@pytest.mark.parametrize("with_ids", [True, False])
def test_scores_are_bounded(with_ids):
    """No array of a long row's forward and backward pass comes near all scores of a head."""
    length, kind = 4096, jax.ShapeDtypeStruct
    ids = jnp.ones((2, length), jnp.int32) if with_ids else None

    def total(q, k, v):
        return packed.packed_attention(q, k, v, ids).sum()

    q, kv = (kind((2, length, heads, 16), jnp.float32) for heads in (4, 2))
    compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(q, kv, kv).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 4 * length * length


EPISODES = [RNG.integers(0, tiny.MODEL.vocab_size, n) for n in (13, 5, 1, 20, 9, 7)]
ROWS = [(0, 1, 2), (3,), (4,), (5,)]  # which episode stands in which row
WIDTH = 22


def packed_rows():
    """Tokens, positions and segments; padding is full of tokens, which nobody may see."""
    tokens = RNG.integers(0, tiny.MODEL.vocab_size, (len(ROWS), WIDTH))
    positions, segments = np.zeros((2, *tokens.shape), int)
    for r, members in enumerate(ROWS):
        start = 0
        for number, e in enumerate(members, start=1):
            end = start + len(EPISODES[e])
            tokens[r, start:end] = EPISODES[e]
            positions[r, start:end] = np.arange(end - start)
            segments[r, start:end] = number
            start = end
    return [jnp.asarray(x) for x in (tokens, positions, segments)]


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, fsdp=2, tensor=2)], ids=["one", "eight"])
@pytest.mark.slow
def test_no_episode_sees_another(mesh):
    """Log-probs, entropies and the parameters' gradient are those of episodes alone in a row."""
    model, params = tiny.MODEL, tiny.params()
    weights = [RNG.normal(size=(2, len(e) - 1)) for e in EPISODES]
    tokens, positions, segments = packed_rows()
    spread = np.zeros((2, *tokens.shape), np.float32)
    for r, members in enumerate(ROWS):
        start = 0
        for e in members:
            spread[:, r, start + 1 : start + len(EPISODES[e])] = weights[e]
            start += len(EPISODES[e])

    def together(params):
        both = token_logprobs(
            model,
            params,
            tokens,
            positions_BT=positions,
            segments_BT=segments,
            mesh=mesh and make_mesh(mesh),
            entropy_gradient=True,
            scan=True,
            remat="full",
            positions_per_chunk=8,
        )
        return (spread * jnp.stack(both)).sum(), both

    def alone(params):
        """One whole forward pass per episode."""
        total, found = 0.0, []
        for episode, weight in zip(EPISODES, weights, strict=True):
            ids = jnp.asarray(episode)[None]
            p = jax.nn.log_softmax(tiny.full_logits(model, params, ids, scan=True)[0, :-1])
            both = jnp.stack(
                [p[jnp.arange(len(episode) - 1), ids[0, 1:]], -(jnp.exp(p) * p).sum(-1)]
            )
            total += (weight * both).sum()
            found.append(both)
        return total, found

    (_, got), grads = jax.jit(jax.value_and_grad(together, has_aux=True))(params)
    (_, expected), wanted = jax.jit(jax.value_and_grad(alone, has_aux=True))(params)
    assert np.isfinite(got).all()
    for r, members in enumerate(ROWS):
        start = 0
        for e in members:
            end = start + len(EPISODES[e])
            for ours, theirs in zip(got, expected[e], strict=True):
                np.testing.assert_allclose(ours[r, start + 1 : end], theirs, atol=2e-5, rtol=0)
            start = end
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-4), grads, wanted)
