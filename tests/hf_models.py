"""Small random models made by transformers, one of each kind that the decoder supports."""

import functools

import numpy as np
import torch
import transformers

SIZES = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
PLAIN = {"rope_type": "default", "rope_theta": 5000.0}
# What each kind changes. Head widths that are not hidden_size / heads, as in Qwen3 and Llama 3.2.
KINDS = {
    "qwen2": ("qwen2", {"rope_parameters": PLAIN}),
    "qwen2_tied": ("qwen2", {"rope_parameters": PLAIN, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"rope_parameters": PLAIN, "head_dim": 16}),
    "llama": ("llama", {"rope_parameters": PLAIN, "head_dim": 16, "num_key_value_heads": 4}),
    "llama_scaled": ("llama", {"rope_parameters": SCALED}),
    # three heads to one, as in SmolLM2
    "llama_tied": (
        "llama",
        {
            "rope_parameters": PLAIN,
            "hidden_size": 48,
            "num_attention_heads": 6,
            "tie_word_embeddings": True,
        },
    ),
}


@functools.cache
def model(kind):
    """The torch model, f32; no parameter is 0 or 1, so that each of them counts."""
    torch.set_num_threads(1)
    name, changes = KINDS[kind]
    torch.manual_seed(0)  # from_config draws the weights from torch's own stream
    made = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(name, **{**SIZES, **changes}), attn_implementation="eager"
    )
    rng = np.random.default_rng(len(kind))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += torch.from_numpy(rng.normal(0, 0.1, parameter.shape).astype(np.float32))
    return made.eval()


def save(kind, folder):
    """Writes the model as transformers does."""
    model(kind).save_pretrained(folder)
    return folder
