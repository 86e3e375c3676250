"""config.json of each family into a decoder's shape and back; what is refused, and how."""

import json

import pytest
import transformers

from r1s_jax.models.decoder import RopeScaling
from r1s_jax.models.families import config_json, read_config
from r1s_jax.types import UserError
from tests import hf_models


@pytest.fixture()
def folder(tmp_path):
    """A Qwen2 config of one's own, to be damaged."""
    write(tmp_path, "qwen2")
    return tmp_path


def write(folder, kind):
    """config.json as transformers writes it."""
    name, changes = hf_models.KINDS[kind]
    config = transformers.AutoConfig.for_model(name, **{**hf_models.SIZES, **changes})
    config.save_pretrained(folder)


@pytest.mark.parametrize("kind", hf_models.KINDS)
def test_there_and_back(kind, tmp_path):
    """transformers reads what we write as the model it was; and so do we."""
    write(tmp_path, kind)
    config = read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config_json(config, (1, 2), 0)))
    assert read_config(tmp_path) == config
    back = transformers.AutoConfig.from_pretrained(tmp_path)
    name, changes = hf_models.KINDS[kind]
    wanted = {**hf_models.SIZES, **changes}
    assert back.model_type == name and back.eos_token_id == [1, 2] and back.pad_token_id == 0
    assert all(getattr(back, field) == value for field, value in wanted.items())


def test_what_the_families_differ_in(tmp_path):
    configs = {}
    for kind in hf_models.KINDS:
        write(tmp_path, kind)
        configs[kind] = read_config(tmp_path)
    assert [k for k, c in configs.items() if c.attention_bias] == ["qwen2", "qwen2_tied"]
    assert [k for k, c in configs.items() if c.qk_norm] == ["qwen3"]
    assert [k for k, c in configs.items() if c.tie_word_embeddings] == ["qwen2_tied", "llama_tied"]
    assert configs["llama_scaled"].rope_theta == 500_000.0
    assert configs["llama_scaled"].rope_scaling == RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
    )


def test_published_spelling_of_the_scaled_rotation(folder):
    """Llama 3.1's own file has rope_scaling beside rope_theta, unlike transformers 5."""
    rope = {k: v for k, v in hf_models.SCALED.items() if k != "rope_theta"}
    changes = {"model_type": "llama", "rope_scaling": rope, "rope_theta": 5e5}
    edit_config(folder, **changes, rope_parameters=..., attention_bias=False)
    config = read_config(folder)
    assert (config.rope_theta, config.rope_scaling.factor) == (5e5, 8.0)


def edit_config(folder, **changes):
    raw = json.loads((folder / "config.json").read_text()) | changes
    raw = {k: v for k, v in raw.items() if v is not ...}
    (folder / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"model_type": "gpt2"},
            r"model_type is 'gpt2', must be one of \['llama', 'qwen2', 'qwen3",
        ),
        ({"model_type": "qwen3_moe"}, r"model_type is 'qwen3_moe'"),
        ({"model_type": ...}, r"model_type is None"),
        ({"use_sliding_window": True}, r"use_sliding_window = True is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope_type = 'linear' is not"),
        ({"rope_parameters": {"rope_type": "yarn"}}, r"rope_type = 'yarn' is not supported"),
        (
            {"rope_parameters": {"rope_type": "llama3"}},
            r"rope_scaling.factor = None, must be a num",
        ),
        (
            {"rope_parameters": {**hf_models.SCALED, "high_freq_factor": 0.5}},
            r"high_freq_factor = 0.5, must be above low_freq_factor = 1.0",
        ),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            r"partial_rotary_factor = 0.5 is not",
        ),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            r"holds 'sliding_attention', wh",
        ),
        ({"quantization_config": {"bits": 4}}, r"quantization_config = \{'bits': 4\} is not supp"),
        ({"model_type": "qwen3", "attention_bias": True}, r"attention_bias = True is not supp"),
        ({"model_type": ["llama"]}, r"model_type is \['llama'\], must be one of"),
        ({"layer_types": 5}, r"layer_types = 5, must be a list"),
        ({"rms_norm_eps": "small"}, r"rms_norm_eps = 'small', must be a number above 0"),
        ({"rms_norm_eps": None}, r"rms_norm_eps = None, must be a number above 0"),
        ({"rope_parameters": {"rope_theta": -5}}, r"rope_theta = -5, must be a number above 0"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, r"rope_theta = '1e4', must be a number"),
        ({"num_key_value_heads": 3}, r"num_attention_heads = 4 is not divisible by num_key_value_"),
        ({"hidden_size": 30}, r"hidden_size = 30 is not divisible by num_attention_heads = 4, and"),
        ({"tie_word_embeddings": "no"}, r"tie_word_embeddings = 'no', must be true or false"),
        ({"head_dim": 7}, r"head_dim = 7, must be even"),
        ({"vocab_size": None}, r"field 'vocab_size' is missing"),
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
        read_config(folder)
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
        read_config(folder)
    assert "\n" not in str(e.value)


def test_defaults_of_a_sparse_config(folder):
    """What older files leave out gets the value that transformers would take."""
    dropped = (
        "head_dim",
        "rope_parameters",
        "max_position_embeddings",
        "rms_norm_eps",
        "use_sliding_window",
    )
    for family in ("qwen2", "qwen3", "llama"):
        edit_config(folder, **dict.fromkeys(dropped, ...), model_type=family, attention_bias=False)
        edit_config(folder, num_key_value_heads=... if family == "llama" else None)
        config, theirs = read_config(folder), transformers.AutoConfig.from_pretrained(folder)
        for field in ("num_key_value_heads", "rms_norm_eps", "max_position_embeddings"):
            assert getattr(config, field) == getattr(theirs, field), (family, field)
        assert config.head_dim == getattr(theirs, "head_dim", None) or 8
        assert config.rope_theta == theirs.rope_parameters["rope_theta"] == 10_000.0
