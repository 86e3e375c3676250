"""Our decoder against transformers, over folders written by our export; and what is refused."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from r1s_jax.models import hf
from r1s_jax.models.attention import attention, causal_mask
from r1s_jax.models.decoder import abstract_params, bind, init_params
from r1s_jax.sharding import MeshConfig, make_mesh, partition_spec
from r1s_jax.types import UserError
from tests import tiny

QWEN = dataclasses.replace(tiny.MODEL, rope_theta=5000.0, rms_norm_eps=1e-5)
KINDS = {
    "qwen2": QWEN,
    "qwen2_tied": dataclasses.replace(QWEN, tie_word_embeddings=True),
    # a head width that is not hidden_size / heads, and as many KV heads as heads
    "llama": dataclasses.replace(QWEN, attention_bias=False, head_dim=16, num_key_value_heads=4),
}
TOKENS = np.random.default_rng(1).integers(0, QWEN.vocab_size, (2, 11))


def randomised(config, seed=0):
    """Parameters none of which is 0 or 1, so that each of them counts."""
    tree = init_params(config, seed)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: p + rng.normal(0, 0.1, p.shape).astype(np.float32), tree)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.fast_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def exported(request, tmp_path_factory, tokenizer_folder):
    """(config, params, folder) of each kind."""
    config = KINDS[request.param]
    params = randomised(config)
    folder = tmp_path_factory.mktemp(request.param) / "hf"
    hf.export(
        folder, config, params, tokenizer_folder=tokenizer_folder, eos_ids=(289, 290), pad_id=289
    )
    return config, params, folder


@pytest.fixture()
def folder(tmp_path, tokenizer_folder):
    """A Qwen2 folder of one's own, to be damaged."""
    return hf.export(
        tmp_path / "hf",
        QWEN,
        init_params(QWEN, 0),
        tokenizer_folder=tokenizer_folder,
        eos_ids=(289,),
        pad_id=289,
    )


def logits(config, params, tokens):
    def run(params, tokens):
        decoder = bind(config, params)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        mask = causal_mask(tokens.shape[1])
        return decoder.unembed(
            decoder(tokens, positions, lambda _, q, k, v: attention(q, k, v, mask))
        )

    return np.asarray(jax.jit(run)(params, tokens))


def one_device():
    return make_mesh(MeshConfig())


def test_logits_equal_those_of_transformers(exported):
    """An exported folder loads in transformers, without a warning of missing keys, same logits."""
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    config, params, folder = exported
    torch.set_num_threads(1)
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        theirs = model.eval()(torch.from_numpy(TOKENS)).logits.numpy()
    np.testing.assert_allclose(logits(config, params, TOKENS), theirs, atol=1e-5, rtol=0)
    assert model.generation_config.eos_token_id == [289, 290]
    text = "x<|end_of_query|>\n ü"
    # Not AutoTokenizer, which rebuilds a Qwen2 tokenizer with Qwen2's own splitting rules.
    theirs = PreTrainedTokenizerFast.from_pretrained(folder).encode(text)
    assert theirs == tiny.tokenizer().encode(text)


def test_round_trip_is_bit_exact(exported):
    """What was exported comes back: the same configuration, every parameter bit for bit."""
    config, params, folder = exported
    assert hf.read_config(folder) == config
    back = hf.load_params(folder, config, one_device())
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_mesh_loading(exported):
    """On 2x2x2 devices every parameter is laid out by its axes, and the logits are the same."""
    config, params, folder = exported
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    sharded = hf.load_params(folder, config, mesh)
    _, axes = abstract_params(config)
    layouts = jax.tree.map(
        lambda p, a: p.sharding.spec == partition_spec(a) and len(p.sharding.device_set) == 8,
        sharded,
        axes,
    )
    assert all(jax.tree.leaves(layouts))
    if config is QWEN:  # one compilation is enough
        np.testing.assert_allclose(
            logits(config, sharded, TOKENS), logits(config, params, TOKENS), atol=1e-5, rtol=0
        )


def test_mesh_that_does_not_divide(folder):
    """One line with the parameter and both numbers."""
    with pytest.raises(UserError, match=r"has 16 along 'kv_heads', not divisible by 3") as e:
        hf.load_params(folder, QWEN, make_mesh(MeshConfig(tensor=3)))
    assert "\n" not in str(e.value)


def test_bf16_checkpoint(folder):
    """Published checkpoints are bf16: they come in exactly, as f32 or as bf16."""
    file = folder / "model.safetensors"
    rounded = {k: v.astype(ml_dtypes.bfloat16) for k, v in load_file(file).items()}
    save_file(rounded, file)
    wanted = rounded["model.layers.1.mlp.up_proj.weight"]
    for dtype in (jnp.float32, jnp.bfloat16):
        params = hf.load_params(folder, QWEN, one_device(), dtype)
        got = params["layers"]["up_kernel"][1]
        assert got.dtype == dtype
        np.testing.assert_array_equal(np.asarray(got, np.float32).T, wanted.astype(np.float32))


def test_weights_split_over_files(folder):
    """A checkpoint of several files is read whole; a tied one may carry a copy of the head."""
    whole = load_file(folder / "model.safetensors")
    expected = hf.load_params(folder, QWEN, one_device())
    (folder / "model.safetensors").unlink()
    names = sorted(whole)
    for i in range(3):
        save_file({n: whole[n] for n in names[i::3]}, folder / f"model-{i + 1}-of-3.safetensors")
    jax.tree.map(
        np.testing.assert_array_equal, hf.load_params(folder, QWEN, one_device()), expected
    )
    tied = dataclasses.replace(QWEN, tie_word_embeddings=True)
    assert "lm_head" not in hf.load_params(folder, tied, one_device())


def edit_config(folder, **changes):
    raw = json.loads((folder / "config.json").read_text()) | changes
    raw = {k: v for k, v in raw.items() if v is not ...}
    (folder / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "gpt2"}, r"model_type is 'gpt2', must be one of \['llama', 'qwen2'\]"),
        ({"model_type": ...}, r"model_type is None"),
        ({"use_sliding_window": True}, r"use_sliding_window = True is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope_type = 'linear' is not"),
        ({"rope_parameters": {"rope_type": "yarn"}}, r"rope_type = 'yarn' is not supported"),
        ({"hidden_act": "gelu"}, r"hidden_act = 'gelu' is not supported"),
        ({"mlp_bias": True}, r"mlp_bias = True is not supported"),
        ({"hidden_size": ...}, r"field 'hidden_size' is missing"),
        ({"model_type": "llama", "attention_bias": True}, r"attention_bias = True is not supp"),
        ({"num_hidden_layers": "two"}, r"num_hidden_layers = 'two', must be a whole number"),
    ],
)
def test_configs_that_are_refused(folder, changes, message):
    """Another architecture is refused in one line naming file and field, never half understood.

    Bugs: a Llama with attention_bias (which has an o bias too) and a number that is none.
    """
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=message) as e:
        hf.read_config(folder)
    assert "\n" not in str(e.value) and str(folder / "config.json") in str(e.value)


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"model_type":\n "qwen2",', r"config.json:2: not valid JSON"),
        (b"[1, 2]", r"config.json: holds a JSON list, must be an object"),
        (b'{"a": "\xff"}', r"config.json: not UTF-8"),
        (None, r"config.json: not found; download the model"),
    ],
)
def test_broken_config_files(folder, content, message):
    """Broken JSON names its line. Bug: a list or a byte that is no UTF-8 gave a traceback."""
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as e:
        hf.read_config(folder)
    assert "\n" not in str(e.value)


def test_defaults_of_a_sparse_config(folder):
    """What older files leave out gets the value that transformers would take."""
    dropped = ("head_dim", "rope_theta", "num_key_value_heads", "use_sliding_window")
    edit_config(folder, **dict.fromkeys(dropped, ...))
    config = hf.read_config(folder)
    assert (config.head_dim, config.rope_theta, config.num_key_value_heads) == (8, 10_000.0, 4)


def without(tensors, name):
    del tensors[name]


def reshaped(tensors, name):
    tensors[name] = np.zeros((3, 5), np.float32)


def added(tensors, name):
    tensors[name] = np.zeros(3, np.float32)


@pytest.mark.parametrize(
    "damage, name, message",
    [
        (without, "model.norm.weight", r"missing model.norm.weight$"),
        (without, "lm_head.weight", r"missing lm_head.weight$"),
        (
            reshaped,
            "model.layers.1.self_attn.k_proj.weight",
            r"k_proj.weight is \[3, 5\], config.json says \[16, 32\]$",
        ),
        (added, "model.layers.0.self_attn.q_norm.weight", r"surplus .*q_norm.weight$"),
        (added, "model.layers.2.input_layernorm.weight", r"surplus model.layers.2"),
    ],
)
def test_tensors_that_do_not_fit(folder, damage, name, message):
    """Missing, misshapen and surplus tensors are named before anything is loaded."""
    tensors = load_file(folder / "model.safetensors")
    damage(tensors, name)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=message) as e:
        hf.load_params(folder, QWEN, one_device())
    assert "\n" not in str(e.value)


def test_many_wrong_tensors_are_counted(folder):
    """Three are named, the rest is a number."""
    deeper = dataclasses.replace(QWEN, num_hidden_layers=3)  # 12 tensors more
    with pytest.raises(UserError, match=r"missing .*; missing .*; missing .* \(and 9 more\)$"):
        hf.load_params(folder, deeper, one_device())


def test_truncated_or_missing_weights(folder):
    """A download that broke off is told from a good one; no file says what to fetch."""
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 10)
    with pytest.raises(UserError, match=r"model.safetensors: not a complete safetensors file") as e:
        hf.load_params(folder, QWEN, one_device())
    assert "\n" not in str(e.value)
    file.write_bytes(b"")
    with pytest.raises(UserError, match=r"model.safetensors: not a complete"):
        hf.load_params(folder, QWEN, one_device())
    file.unlink()
    with pytest.raises(UserError, match=r"no \*.safetensors; download"):
        hf.load_params(folder, QWEN, one_device())


def test_export_replaces_a_folder_whole(folder, tokenizer_folder):
    """A second export leaves exactly its own files, and no part or old folder behind."""
    (folder / "stale.txt").write_text("x")
    files = {"eos_ids": (289,), "pad_id": 289, "tokenizer_folder": tokenizer_folder}
    hf.export(folder, QWEN, init_params(QWEN, 3), **files)
    assert not (folder / "stale.txt").exists()
    assert sorted(p.name for p in folder.parent.iterdir()) == ["hf"]
    back = hf.load_params(folder, QWEN, one_device())
    jax.tree.map(np.testing.assert_array_equal, back, init_params(QWEN, 3))
