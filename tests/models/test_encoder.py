"""Our encoder against transformers' BertModel, over folders that transformers wrote."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from r1s_jax.models.encoder import (
    EncoderConfig,
    abstract_encoder,
    bind_encoder,
    load_encoder,
    read_encoder_config,
)
from r1s_jax.sharding import MeshConfig, make_mesh
from r1s_jax.types import UserError

SHAPE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
    "layer_norm_eps": 1e-5,
}
TOKENS = np.random.default_rng(1).integers(0, 60, (4, 13)).astype(np.int32)
LENGTHS = np.array([13, 1, 7, 12])
MASK = np.arange(13) < LENGTHS[:, None]


def saved(folder, kind=transformers.BertModel, **changes):
    """A random model, none of its parameters 0 or 1, written by transformers."""
    torch.manual_seed(0)
    model = kind(transformers.BertConfig(**(SHAPE | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    saved(folder)
    return folder


@pytest.fixture()
def own_folder(tmp_path):
    """A folder of one's own, to be damaged."""
    saved(tmp_path)
    return tmp_path


def theirs(folder):
    """Hidden states [L + 1, B, T, D] of transformers, with the padding masked."""
    torch.set_num_threads(1)
    model = transformers.BertModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        output = model(
            input_ids=torch.from_numpy(TOKENS).long(),
            attention_mask=torch.from_numpy(MASK).long(),
            output_hidden_states=True,
        )
    return torch.stack(output.hidden_states).numpy()


def ours(folder, mesh=None, dtype=jnp.float32):
    """(every hidden state, what the plain call returns), f32."""
    config = read_encoder_config(folder)
    params = load_encoder(folder, config, mesh or make_mesh(MeshConfig()), dtype)

    def run(params, tokens, mask):
        encoder = bind_encoder(config, params)
        return encoder.hidden_states(tokens, mask), encoder(tokens, mask)

    every, last = jax.jit(run)(params, TOKENS, MASK)
    assert every.dtype == last.dtype == dtype
    return np.asarray(every, np.float32), np.asarray(last, np.float32)


def test_hidden_states_of_every_layer(folder):
    """Rows of different lengths side by side; what stands on padding counts for nobody."""
    every, last = ours(folder)
    expected = theirs(folder)
    assert every.shape == expected.shape == (4, 4, 13, 32)
    np.testing.assert_allclose(every[:, MASK], expected[:, MASK], atol=1e-5, rtol=0)
    np.testing.assert_array_equal(every[-1][MASK], last[MASK])
    changes = np.abs(np.diff(expected[:, MASK], axis=0)).mean(axis=(1, 2))
    assert (changes > 0.1).all()  # each layer does something


@pytest.mark.parametrize("act", ["gelu_new", "gelu_pytorch_tanh"])
def test_tanh_gelu(tmp_path, act):
    saved(tmp_path, hidden_act=act, layer_norm_eps=1e-12)
    np.testing.assert_allclose(ours(tmp_path)[1][MASK], theirs(tmp_path)[-1][MASK], atol=1e-5)


def test_bf16_is_close(folder):
    last, expected = ours(folder, dtype=jnp.bfloat16)[1][MASK], theirs(folder)[-1][MASK]
    assert np.abs(last - expected).mean() < 0.02 * np.abs(expected).mean()


def test_checkpoint_with_prefix_and_heads(tmp_path):
    """A language model's checkpoint has `bert.` before all names, and a head beside them."""
    saved(tmp_path, transformers.BertForMaskedLM)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert any(n.startswith("cls.") for n in names) and "bert.embeddings.LayerNorm.bias" in names
    np.testing.assert_allclose(ours(tmp_path)[1][MASK], theirs(tmp_path)[-1][MASK], atol=1e-5)


def test_stored_position_ids_are_ignored(own_folder):
    """Older checkpoints (MiniLM's) carry a table of whole numbers that is no weight."""
    file = own_folder / "model.safetensors"
    tensors = load_file(file) | {"embeddings.position_ids": np.arange(24)[None]}
    save_file(tensors, file)
    assert np.isfinite(ours(own_folder)[1]).all()


def test_every_device_holds_all_parameters(folder):
    config = read_encoder_config(folder)
    params = load_encoder(folder, config, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    for value in jax.tree.leaves(params):
        assert value.sharding.is_fully_replicated and len(value.sharding.device_set) == 8
    abstract, axes = abstract_encoder(config)
    shapes = jax.tree.map(lambda p: (p.shape, p.dtype), params)
    assert shapes == jax.tree.map(lambda p: (p.shape, p.dtype), abstract)
    assert set(axes) == set(abstract) and axes["layers"]["q_kernel"] == ("layers", None, None)


def test_more_tokens_than_positions(folder):
    config = read_encoder_config(folder)
    encoder = bind_encoder(config, abstract_encoder(config)[0])
    with pytest.raises(ValueError, match="texts of 25 tokens, the encoder has 24 positions"):
        encoder(jnp.zeros((1, 25), jnp.int32), jnp.ones((1, 25), bool))


def test_config_is_read(folder):
    assert read_encoder_config(folder) == EncoderConfig(**SHAPE)


def test_a_missing_tensor_is_named(own_folder):
    file = own_folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["encoder.layer.1.output.dense.bias"]
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"missing encoder.layer.1.output.dense.bias$") as e:
        ours(own_folder)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "xlm-roberta"}, r"model_type is 'xlm-roberta', must be 'bert'"),
        ({"model_type": ...}, r"model_type is None, must be 'bert'"),
        ({"hidden_act": "relu"}, r"hidden_act is 'relu', must be one of \['gelu', "),
        ({"position_embedding_type": "relative_key"}, r"_type = 'relative_key' is not supported"),
        ({"is_decoder": True}, r"is_decoder = True is not supported"),
        ({"add_cross_attention": True}, r"add_cross_attention = True is not supported"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config = {'bits': 4} is not supp"),
        ({"hidden_size": ...}, r"field 'hidden_size' is missing"),
        ({"num_hidden_layers": "two"}, r"num_hidden_layers = 'two', must be a whole number"),
        ({"layer_norm_eps": None}, r"layer_norm_eps = None, must be a number above 0"),
        ({"num_attention_heads": 5}, r"hidden_size = 32 is not divisible by .*_heads = 5"),
    ],
)
def test_configs_that_are_refused(own_folder, changes, message):
    path = own_folder / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))
    with pytest.raises(UserError, match=message) as e:
        read_encoder_config(own_folder)
    assert "\n" not in str(e.value) and str(path) in str(e.value)


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"model_type":\n "bert",', r"config.json:2: not valid JSON"),
        (b"[1, 2]", r"config.json: holds a JSON list, must be an object"),
        (b'{"a": "\xff"}', r"config.json: not UTF-8"),
        (None, r"config.json: not found; download"),
    ],
)
def test_broken_config_files(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as e:
        read_encoder_config(tmp_path)
    assert "\n" not in str(e.value)
