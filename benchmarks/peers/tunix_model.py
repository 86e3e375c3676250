"""A Qwen2 of a Hugging Face folder as tunix's own model, f32."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
from tunix.models.qwen2.model import ModelConfig, Qwen2
from tunix.models.qwen2.params import create_model_from_safe_tensors


def load_model(folder: Path) -> tuple[ModelConfig, Qwen2]:
    c = json.loads((folder / "config.json").read_text())
    config = ModelConfig(
        num_layers=c["num_hidden_layers"],
        vocab_size=c["vocab_size"],
        embed_dim=c["hidden_size"],
        hidden_dim=c["intermediate_size"],
        num_heads=c["num_attention_heads"],
        head_dim=c["hidden_size"] // c["num_attention_heads"],
        num_kv_heads=c["num_key_value_heads"],
        rope_theta=c["rope_theta"],
        norm_eps=c["rms_norm_eps"],
        use_tied_embedding=c["tie_word_embeddings"],
    )
    return config, create_model_from_safe_tensors(str(folder), config, dtype=jnp.float32)
