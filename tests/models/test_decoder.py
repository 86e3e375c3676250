"""Each family against transformers' own implementation: hidden states, logits, cached decoding."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from r1s_jax.engine.engine import Engine
from r1s_jax.engine.programs import Stop
from r1s_jax.engine.sampling import SamplingConfig
from r1s_jax.engine.state import EngineConfig
from r1s_jax.models import hf
from r1s_jax.models.attention import attention, causal_attend
from r1s_jax.models.decoder import (
    DecoderConfig,
    RopeScaling,
    bind,
    layer,
    rope_frequencies,
    rope_table,
)
from r1s_jax.models.families import read_config
from r1s_jax.sharding import MeshConfig, make_mesh
from tests import hf_models, tiny
from tests.turns import play_turn

TOKENS = np.random.default_rng(1).integers(0, hf_models.SIZES["vocab_size"], (3, 12))


@pytest.fixture(scope="module", params=hf_models.KINDS)
def loaded(request, tmp_path_factory):
    """(kind, config, params) of a checkpoint that transformers wrote."""
    folder = hf_models.save(request.param, tmp_path_factory.mktemp(request.param))
    config = read_config(folder)
    return request.param, config, hf.load_params(folder, config, make_mesh(MeshConfig()))


def theirs(kind, tokens, mask=None, positions=None):
    """(logits, hidden states before each layer and after the last one's norm) of transformers."""
    give = lambda x: None if x is None else torch.from_numpy(np.array(x))  # noqa: E731
    with torch.no_grad():
        out = hf_models.model(kind)(
            give(tokens),
            attention_mask=give(mask),
            position_ids=give(positions),
            output_hidden_states=True,
        )
    return out.logits.numpy(), [h.numpy() for h in out.hidden_states]


def ours(config, params, tokens, positions, mask_BTS):
    """The same of the decoder, run layer by layer through its own blocks."""

    def run(params, tokens, positions, mask_BTS):
        decoder = bind(config, params)
        attend = lambda *qkv: (attention(*qkv, mask_BTS), None)  # noqa: E731
        logits = decoder.unembed(decoder(tokens, positions, lambda _, __, *qkv: attend(*qkv))[0])
        cos, sin = rope_table(positions, rope_frequencies(config))
        states = [params["embedding"][tokens]]
        for i in range(config.num_hidden_layers):
            block = jax.tree.map(lambda p, i=i: p[i], params["layers"])
            states.append(layer(config, block, states[-1], cos, sin, attend)[0])
        states[-1] = decoder(tokens, positions, lambda _, __, *qkv: attend(*qkv))[0]
        return logits, states

    given = (jnp.asarray(x) for x in (tokens, positions, mask_BTS))
    return jax.tree.map(np.asarray, jax.jit(run)(params, *given))


def close(got, expected, where=np.s_[:]):
    """The largest difference, which must be within 1e-5."""
    np.testing.assert_allclose(got[where], expected[where], atol=1e-5, rtol=0)
    return np.abs(got[where] - expected[where]).max()


@pytest.mark.parametrize("side", ["right", "left"])
def test_hidden_states_and_logits(loaded, side):
    """Every layer, over rows of different lengths padded on either side."""
    kind, config, params = loaded
    kept = np.ones(TOKENS.shape, np.int64)
    kept[1, np.s_[9:] if side == "right" else np.s_[:3]] = 0
    kept[2, np.s_[4:] if side == "right" else np.s_[:8]] = 0
    positions = np.maximum(np.cumsum(kept, axis=1) - 1, 0)
    mask = np.tril(np.ones((12, 12), bool))[None] & (kept[:, None] == 1)
    logits, states = theirs(kind, TOKENS, kept, positions)
    got_logits, got_states = ours(config, params, TOKENS, positions, mask)
    where = kept == 1
    assert len(states) == len(got_states) == config.num_hidden_layers + 1
    largest = [close(*pair, where) for pair in zip(got_states, states, strict=True)]
    print(f"{kind}, {side}: logits {close(got_logits, logits, where):.1e}, {max(largest):.1e}")


def test_far_positions(loaded):
    """At the end of the context, far beyond the original one where the rotation is stretched."""
    kind, config, params = loaded
    start = config.max_position_embeddings - 12
    positions = np.broadcast_to(np.arange(start, start + 12), TOKENS.shape)
    mask = np.tril(np.ones((12, 12), bool))[None]
    logits, states = theirs(kind, TOKENS, positions=positions)
    got_logits, got_states = ours(config, params, TOKENS, positions, mask)
    largest = [close(*pair) for pair in zip(got_states, states, strict=True)]
    print(f"{kind}, far: logits {close(got_logits, logits):.1e}, {max(largest):.1e}")


def test_cached_decoding(loaded):
    """Prompts of several lengths through the engine, token by token: the full pass's own figures.

    The likeliest token each time, and its log-probability to 1e-5.
    """
    kind, config, params = loaded
    engine = Engine(
        config,
        EngineConfig(rows=3, chunk=5, context=64, page=8, extend_rows=2, extend_tokens=4),
        mesh=make_mesh(MeshConfig()),
        token_bytes=[b"x"] * config.vocab_size,
        stop_strings=(),
        eos_ids=(),
    )
    engine.set_weights(params, 0)
    rows = [TOKENS[0].tolist(), TOKENS[1, :9].tolist(), TOKENS[2, :4].tolist()]
    starts = [len(row) for row in rows]
    turns = play_turn(engine, rows, SamplingConfig(temperature=0.0), 10)
    assert all(len(tokens) == 10 and stop == Stop.BUDGET for tokens, _, stop in turns)
    logprobs = [got for _, got, _ in turns]
    rows = [row + tokens for row, (tokens, _, _) in zip(rows, turns, strict=True)]
    largest = []
    for row, start, got in zip(rows, starts, logprobs, strict=True):
        logits, _ = theirs(kind, np.array([row]))
        logits = logits[0, start - 1 : -1].astype(np.float64)
        expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        assert row[start:] == expected.argmax(-1).tolist()
        largest.append(close(got, expected.max(-1)))
    print(f"{kind}, cached: log-probs {max(largest):.1e}")


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_scanned_layers_give_what_unrolled_ones_give(remat):
    """The same figures, the cache included, and the same gradients, whatever is recomputed."""
    count = tiny.MODEL.num_hidden_layers

    def loss(scan, remat, params):
        def attend(layer, cache, q, k, v):
            return causal_attend(5)(layer, None, q, k, v)[0], cache.at[layer].set(k)

        positions = jnp.broadcast_to(jnp.arange(5), tokens.shape)
        decoder = bind(tiny.MODEL, params)
        shape = (count, *tokens.shape, tiny.MODEL.num_key_value_heads, tiny.MODEL.head_dim)
        hidden, cache = decoder(tokens, positions, attend, jnp.zeros(shape), scan=scan, remat=remat)
        return (decoder.unembed(hidden) ** 2).sum(), (hidden, cache)

    tokens = jnp.asarray(TOKENS[:, :5])
    run = lambda *how: jax.jit(jax.grad(partial(loss, *how), has_aux=True))(tiny.params())  # noqa: E731
    plain, (hidden, cache) = run(False, "none")
    scanned, again = run(True, remat)
    assert all((cache[layer] != 0).all() for layer in range(count))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), again, (hidden, cache))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-3), scanned, plain)


def test_frequencies_are_those_of_transformers():
    """Bit for bit, for the published settings: a last bit is worth 0.006 rad at 100,000 tokens."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    for factor, head_dim in ((8.0, 128), (32.0, 64)):
        rope = {**hf_models.SCALED, "factor": factor, "original_max_position_embeddings": 8192}
        config = LlamaConfig(
            head_dim=head_dim, max_position_embeddings=131_072, rope_parameters=rope
        )
        expected, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
        assert attention_factor == 1.0
        scaling = RopeScaling(
            factor=factor,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        )
        got = rope_frequencies(
            DecoderConfig(
                **sizes,
                num_attention_heads=1,
                num_key_value_heads=1,
                head_dim=head_dim,
                rope_theta=500_000.0,
                rope_scaling=scaling,
            )
        )
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, expected.numpy())
