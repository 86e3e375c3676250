"""`config.json` and the decoder's shape, in both directions, for every family that is supported.

transformers is the reference: a field that changes what it computes is either understood here or
refused by name; fields it ignores are ignored.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from r1s_jax.models.decoder import DecoderConfig, RopeScaling
from r1s_jax.types import UserError

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
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
_REQUIRED = _SIZES[:5]
# Value that a field may have, besides being absent or null.
_FIXED = {
    "use_sliding_window": False,
    "hidden_act": "silu",
    "mlp_bias": False,
    "quantization_config": None,
    "rope_interleaved": False,
    "partial_rotary_factor": 1.0,
}


def read_config(folder: str | Path) -> DecoderConfig:
    """Reads `config.json`. Raises UserError, naming the field, for what is not supported."""
    path = Path(folder) / "config.json"
    raw = read_json(path)
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        known = sorted(ARCHITECTURES)
        raise UserError(f"{path}: model_type is {family!r}, must be one of {known}")
    refuse(path, raw, _FIXED)
    if family != "qwen2":  # there all layers have q, k and v biases, whatever the file says
        # Elsewhere the flag stands for four biases, the output projection's among them.
        refuse(path, raw, {"attention_bias": False})
    kinds = raw.get("layer_types") or ["full_attention"]
    if not isinstance(kinds, list):
        raise UserError(f"{path}: layer_types = {kinds!r}, must be a list")
    for kind in kinds:
        if kind != "full_attention":
            raise UserError(f"{path}: layer_types holds {kind!r}, which is not supported")
    tied = raw.get("tie_word_embeddings") or False
    if not isinstance(tied, bool):
        raise UserError(f"{path}: tie_word_embeddings = {tied!r}, must be true or false")
    require_sizes(path, raw, _SIZES)
    for field in _REQUIRED:
        if raw.get(field) is None:
            raise UserError(f"{path}: field {field!r} is missing")
    heads, kv_heads = raw["num_attention_heads"], _kv_heads(family, raw)
    if heads % kv_heads:
        raise UserError(
            f"{path}: num_attention_heads = {heads} is not divisible by num_key_value_heads = "
            f"{kv_heads}"
        )
    theta, scaling = _rope(path, raw)
    return DecoderConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_hidden_layers=raw["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=_head_dim(family, raw, path),
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=_positive(path, "rms_norm_eps", raw.get("rms_norm_eps", 1e-6)),
        tie_word_embeddings=tied,
        attention_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        max_position_embeddings=raw.get("max_position_embeddings")
        or (2048 if family == "llama" else 32_768),
    )


def config_json(config: DecoderConfig, eos_ids: tuple[int, ...], pad_id: int) -> dict[str, Any]:
    """The `config.json` that transformers reads back into the same decoder."""
    family = "qwen3" if config.qk_norm else "qwen2" if config.attention_bias else "llama"
    scaling = config.rope_scaling
    rope = (
        {}
        if scaling is None
        else {"rope_scaling": {"rope_type": "llama3", **dataclasses.asdict(scaling)}}
    )
    return {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        **{field: getattr(config, field) for field in _SIZES},
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        **rope,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_sliding_window": False,
        "bos_token_id": None,
        "eos_token_id": eos_ids[0] if len(eos_ids) == 1 else list(eos_ids),
        "pad_token_id": pad_id,
    }


def _kv_heads(family: str, raw: dict[str, Any]) -> int:
    absent = None if family == "llama" else 32  # transformers' default
    return raw.get("num_key_value_heads", absent) or raw["num_attention_heads"]


def _head_dim(family: str, raw: dict[str, Any], path: Path) -> int:
    width, heads = raw["hidden_size"], raw["num_attention_heads"]
    # Qwen3's default in transformers is 128, whatever the other sizes.
    given = raw.get("head_dim") or (128 if family == "qwen3" else None)
    if given is None and width % heads:
        raise UserError(
            f"{path}: hidden_size = {width} is not divisible by num_attention_heads = {heads}, "
            "and head_dim is not given"
        )
    head_dim = given or width // heads
    if head_dim % 2:
        raise UserError(f"{path}: head_dim = {head_dim}, must be even: positions rotate pairs")
    return head_dim


def _positive(path: Path, field: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and 0 < value < math.inf):
        raise UserError(f"{path}: {field} = {value!r}, must be a number above 0")
    return value


def _rope(path: Path, raw: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """(theta, scaling): all in `rope_parameters`, or `rope_theta` beside `rope_scaling`."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_scaling = {rope!r}, must be an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = rope.get("rope_theta", raw.get("rope_theta"))
    theta = float(_positive(path, "rope_theta", 10_000.0 if theta is None else theta))
    refuse(path, rope, {"partial_rotary_factor": 1.0})
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UserError(f"{path}: rope_type = {kind!r} is not supported")
    fields = [field.name for field in dataclasses.fields(RopeScaling)]
    for field in fields:
        _positive(path, f"rope_scaling.{field}", rope.get(field))
    scaling = RopeScaling(**{field: rope[field] for field in fields})
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise UserError(
            f"{path}: rope_scaling.high_freq_factor = {scaling.high_freq_factor}, must be above "
            f"low_freq_factor = {scaling.low_freq_factor}"
        )
    return theta, scaling


# ------------------------------------------------------------------ what every config.json needs


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError, one line, for anything else."""
    if not path.is_file():
        raise UserError(
            f"{path}: not found; download the model (config.json, tokenizer.json, *.safetensors) "
            f"into {path.parent}"
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as e:
        raise UserError(f"{path}:{e.lineno}: not valid JSON: {e.msg}") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 text: {e.reason} at byte {e.start}") from e
    if not isinstance(raw, dict):
        raise UserError(f"{path}: holds a JSON {type(raw).__name__}, must be an object")
    return raw


def refuse(path: Path, raw: dict[str, Any], fixed: dict[str, Any]) -> None:
    """Raises UserError for the first field that is set to another value than the one given."""
    for field, value in fixed.items():
        if raw.get(field) is not None and raw[field] != value:
            raise UserError(f"{path}: {field} = {raw[field]!r} is not supported")


def require_sizes(path: Path, raw: dict[str, Any], fields: tuple[str, ...]) -> None:
    """Raises UserError for the first of these fields that is set to no whole number above 0."""
    for field in fields:
        value = raw.get(field)
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int) or value < 1
        ):
            raise UserError(f"{path}: {field} = {value!r}, must be a whole number above 0")
