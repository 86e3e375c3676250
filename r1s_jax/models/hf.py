"""Hugging Face folders in and out: `config.json` and safetensors, one key table for both ways."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from r1s_jax.models.decoder import DecoderConfig, Params, abstract_params
from r1s_jax.sharding import check_divisible, named_sharding
from r1s_jax.types import UserError

FAMILIES = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
)

# Our name -> (Hugging Face's name, stored transposed). `{i}` is the layer.
_TOP = {
    "embedding": ("model.embed_tokens.weight", False),
    "final_norm": ("model.norm.weight", False),
    "lm_head": ("lm_head.weight", False),
}
_LAYER = {
    "input_norm": ("model.layers.{i}.input_layernorm.weight", False),
    "mlp_norm": ("model.layers.{i}.post_attention_layernorm.weight", False),
    **{f"{n}_kernel": (f"model.layers.{{i}}.self_attn.{n}_proj.weight", True) for n in "qkvo"},
    **{f"{n}_bias": (f"model.layers.{{i}}.self_attn.{n}_proj.bias", False) for n in "qkv"},
    **{
        f"{n}_kernel": (f"model.layers.{{i}}.mlp.{n}_proj.weight", True)
        for n in ("gate", "up", "down")
    },
}


def read_config(folder: str | Path) -> DecoderConfig:
    """Reads `config.json`. Raises UserError, naming the field, for what is not supported."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(
            f"{path}: not found; download the model (config.json, tokenizer.json, *.safetensors) "
            f"into {folder}"
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as e:
        raise UserError(f"{path}:{e.lineno}: not valid JSON: {e.msg}") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 text: {e.reason} at byte {e.start}") from e
    if not isinstance(raw, dict):
        raise UserError(f"{path}: holds a JSON {type(raw).__name__}, must be an object")
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{path}: model_type is {family!r}, must be one of {sorted(FAMILIES)}")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    refused = {
        "rope_type": rope_type if rope_type != "default" else None,
        "use_sliding_window": raw.get("use_sliding_window") or None,
        "hidden_act": raw["hidden_act"] if raw.get("hidden_act", "silu") != "silu" else None,
        "mlp_bias": raw.get("mlp_bias") or None,
        # Llama's flag stands for four biases, the output projection's among them.
        "attention_bias": (family == "llama" and raw.get("attention_bias")) or None,
    }
    for field, value in refused.items():
        if value is not None:
            raise UserError(f"{path}: {field} = {value!r} is not supported")
    for field in _SIZES:
        value = raw.get(field)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise UserError(f"{path}: {field} = {value!r}, must be a whole number above 0")
    try:
        return DecoderConfig(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_hidden_layers=raw["num_hidden_layers"],
            num_attention_heads=raw["num_attention_heads"],
            num_key_value_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
            head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
            rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10_000.0),
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            attention_bias=family == "qwen2",
            max_position_embeddings=raw.get("max_position_embeddings", 32_768),
        )
    except KeyError as e:
        raise UserError(f"{path}: field {e.args[0]!r} is missing") from e


def config_json(config: DecoderConfig, eos_ids: tuple[int, ...], pad_id: int) -> dict[str, Any]:
    """The `config.json` that transformers reads back into the same decoder."""
    family = "qwen2" if config.attention_bias else "llama"
    return {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_sliding_window": False,
        "bos_token_id": None,
        "eos_token_id": eos_ids[0] if len(eos_ids) == 1 else list(eos_ids),
        "pad_token_id": pad_id,
        "torch_dtype": "float32",
    }


def require_weights(folder: str | Path) -> list[Path]:
    """The weight files of a folder. Raises UserError where there are none."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no *.safetensors; download the model's weights into it")
    return files


def load_params(
    folder: str | Path, config: DecoderConfig, mesh: Mesh, dtype: Any = jnp.float32
) -> Params:
    """Reads `*.safetensors` into the layout of the mesh. Raises what `check_weights` raises."""
    from safetensors import safe_open

    where = check_weights(folder, config)
    abstract, axes = abstract_params(config, dtype)

    def read(key: str) -> np.ndarray:
        with safe_open(where[key], framework="np") as f:
            return f.get_tensor(key)

    def place(name: str, value: np.ndarray, names: tuple[str, ...]) -> jax.Array:
        check_divisible(mesh, name, value.shape, names)
        return jax.device_put(value.astype(dtype), named_sharding(mesh, names))

    params: Params = {
        name: place(name, _oriented(read(_TOP[name][0]), _TOP[name][1]), axes[name])
        for name in abstract
        if name != "layers"
    }
    params["layers"] = {
        name: place(
            name,
            np.stack(
                [
                    _oriented(read(_LAYER[name][0].format(i=i)), _LAYER[name][1])
                    for i in range(config.num_hidden_layers)
                ]
            ),
            axes["layers"][name],
        )
        for name in abstract["layers"]
    }
    return params


def check_weights(folder: str | Path, config: DecoderConfig) -> dict[str, Path]:
    """The file of every tensor, by Hugging Face's name; reads headers only.

    Raises UserError listing missing, surplus or misshapen tensors.
    """
    from safetensors import SafetensorError, safe_open

    files = require_weights(folder)
    where: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for file in files:
        try:
            with safe_open(file, framework="np") as f:
                where.update({k: (file, tuple(f.get_slice(k).get_shape())) for k in f.keys()})  # noqa: SIM118
        except SafetensorError as e:
            raise UserError(f"{file}: not a complete safetensors file: {e}") from e
    wanted = dict(_wanted(config, abstract_params(config)[0]))
    surplus = set(where) - set(wanted) - {"lm_head.weight"}
    problems = [f"missing {k}" for k in sorted(set(wanted) - set(where))]
    problems += [f"surplus {k}" for k in sorted(surplus)]
    problems += [
        f"{k} is {list(where[k][1])}, config.json says {list(shape)}"
        for k, shape in sorted(wanted.items())
        if k in where and where[k][1] != shape
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise UserError(f"{folder}: {'; '.join(problems[:3])}{more}")
    return {key: file for key, (file, _) in where.items()}


def export(
    folder: str | Path,
    config: DecoderConfig,
    params: Params,
    *,
    tokenizer_folder: str | Path,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> Path:
    """Writes a folder that `transformers` loads, f32; it appears whole or not at all."""
    from safetensors.numpy import save_file

    folder = Path(folder)
    part = folder.with_name(folder.name + ".part")
    if part.exists():
        shutil.rmtree(part)
    part.mkdir(parents=True)
    raw = config_json(config, eos_ids, pad_id)
    (part / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    weights = part / "model.safetensors"
    save_file(dict(_tensors(params)), weights, metadata={"format": "pt"})
    weights.chmod((part / "config.json").stat().st_mode)  # safetensors makes it private
    generation = {k: raw[k] for k in ("eos_token_id", "pad_token_id")}
    (part / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    for name in TOKENIZER_FILES:
        if (source := Path(tokenizer_folder) / name).is_file():
            shutil.copyfile(source, part / name)
    if folder.exists():
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        part.rename(folder)
        shutil.rmtree(old)
    else:
        part.rename(folder)
    return folder


def _tensors(params: Params) -> Iterator[tuple[str, np.ndarray]]:
    to_host: Callable[[Any], np.ndarray] = lambda x: np.asarray(jax.device_get(x), np.float32)  # noqa: E731
    for name, value in params.items():
        if name != "layers":
            key, transposed = _TOP[name]
            yield key, _oriented(to_host(value), transposed)
    for name, value in params["layers"].items():
        key, transposed = _LAYER[name]
        for i, one in enumerate(to_host(value)):
            yield key.format(i=i), _oriented(one, transposed)


def _wanted(config: DecoderConfig, abstract: Params) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, value in abstract.items():
        if name != "layers":
            yield _TOP[name][0], _flip(value.shape, _TOP[name][1])
    for name, value in abstract["layers"].items():
        key, transposed = _LAYER[name]
        for i in range(config.num_hidden_layers):
            yield key.format(i=i), _flip(value.shape[1:], transposed)


def _flip(shape: tuple[int, ...], transposed: bool) -> tuple[int, ...]:
    return tuple(reversed(shape)) if transposed else tuple(shape)


def _oriented(value: np.ndarray, transposed: bool) -> np.ndarray:
    return np.ascontiguousarray(value.T) if transposed else value
