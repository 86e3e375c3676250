"""The text encoder of the embedders (BERT architecture: BGE, E5, GTE, MiniLM) as a Flax module.

Bidirectional, post-norm, learned positions. Unlike the decoder it keeps no cache, so its layers
run in a scan over the stacked axis L. Embedders are small: every device holds all parameters,
and rows of text are what is split over the mesh (logical axis `texts`).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from r1s_jax.models.attention import attention
from r1s_jax.models.families import read_json, refuse, require_sizes
from r1s_jax.models.params import Params, abstract, bound
from r1s_jax.models.weights import Key, load
from r1s_jax.types import UserError

# Whether an activation is the tanh approximation of gelu or the exact one.
_TANH = {"gelu": False, "gelu_new": True, "gelu_pytorch_tanh": True}
_FIXED = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "quantization_config": None,
}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "type_vocab_size",
)

# Our name -> Hugging Face's, stored transposed. `{i}` is the layer.
KEYS = {
    "word_embedding": Key("embeddings.word_embeddings.weight"),
    "position_embedding": Key("embeddings.position_embeddings.weight"),
    "type_embedding": Key("embeddings.token_type_embeddings.weight"),
    "norm_scale": Key("embeddings.LayerNorm.weight"),
    "norm_bias": Key("embeddings.LayerNorm.bias"),
    "layers": {
        f"{ours}_{kind}": Key(f"encoder.layer.{{i}}.{theirs}.{suffix}", kind == "kernel")
        for ours, theirs, weight in (
            ("q", "attention.self.query", "kernel"),
            ("k", "attention.self.key", "kernel"),
            ("v", "attention.self.value", "kernel"),
            ("o", "attention.output.dense", "kernel"),
            ("attention_norm", "attention.output.LayerNorm", "scale"),
            ("up", "intermediate.dense", "kernel"),
            ("down", "output.dense", "kernel"),
            ("output_norm", "output.LayerNorm", "scale"),
        )
        for kind, suffix in ((weight, "weight"), ("bias", "bias"))
    },
}
# A checkpoint of `BertForMaskedLM` and the like puts the encoder below "bert." and brings heads;
# the pooler is a dense layer for classification that no embedder here uses.
PREFIXES = ("", "bert.")
IGNORED = ("*embeddings.position_ids", "*pooler.*", "cls.*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The shape of an encoder, in the field names of Hugging Face's `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"


class EncoderLayers(nnx.Module):
    """The parameters of all layers, stacked: every array begins with the axis L."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        layers, width, inner = (
            config.num_hidden_layers,
            config.hidden_size,
            config.intermediate_size,
        )

        def kernel(fan_in: int, fan_out: int) -> nnx.Param:
            init = nnx.initializers.normal(fan_in**-0.5)
            value = init(rngs.params(), (layers, fan_in, fan_out), dtype)
            return nnx.Param(value, axes=("layers", None, None))

        def vector(size: int, value: float = 0.0) -> nnx.Param:
            return nnx.Param(jnp.full((layers, size), value, dtype), axes=("layers", None))

        self.q_kernel, self.q_bias = kernel(width, width), vector(width)
        self.k_kernel, self.k_bias = kernel(width, width), vector(width)
        self.v_kernel, self.v_bias = kernel(width, width), vector(width)
        self.o_kernel, self.o_bias = kernel(width, width), vector(width)
        self.attention_norm_scale, self.attention_norm_bias = vector(width, 1.0), vector(width)
        self.up_kernel, self.up_bias = kernel(width, inner), vector(inner)
        self.down_kernel, self.down_bias = kernel(inner, width), vector(width)
        self.output_norm_scale, self.output_norm_bias = vector(width, 1.0), vector(width)


class Encoder(nnx.Module):
    """Token ids to hidden states, all tokens seeing each other; token types are all 0."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.config = config
        width = config.hidden_size
        init = nnx.initializers.normal(0.02)

        def table(size: int) -> nnx.Param:
            return nnx.Param(init(rngs.params(), (size, width), dtype), axes=(None, None))

        self.word_embedding = table(config.vocab_size)
        self.position_embedding = table(config.max_position_embeddings)
        self.type_embedding = table(config.type_vocab_size)
        self.norm_scale = nnx.Param(jnp.ones((width,), dtype), axes=(None,))
        self.norm_bias = nnx.Param(jnp.zeros((width,), dtype), axes=(None,))
        self.layers = EncoderLayers(config, rngs=rngs, dtype=dtype)

    def __call__(
        self, tokens_BT: Int[Array, "B T"], mask_BT: Bool[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """Hidden states after the last layer; `mask` is True where a token is none of padding.

        T is at most `max_position_embeddings`. States of padding mean nothing.
        """
        return self._run(tokens_BT, mask_BT, keep=False)[1]

    def hidden_states(
        self, tokens_BT: Int[Array, "B T"], mask_BT: Bool[Array, "B T"]
    ) -> Float[Array, "layers B T D"]:
        """The embeddings' output, then every layer's: L + 1 arrays, stacked."""
        first_BTD, _, every_LBTD = self._run(tokens_BT, mask_BT, keep=True)
        return jnp.concatenate([first_BTD[None], every_LBTD])

    def _run(self, tokens_BT: Array, mask_BT: Array, *, keep: bool) -> tuple[Array, Array, Any]:
        """The embeddings, the last layer's states, and with `keep` every layer's."""
        length = tokens_BT.shape[1]
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"texts of {length} tokens, the encoder has "
                f"{self.config.max_position_embeddings} positions"
            )
        x_BTD = self.word_embedding[...][tokens_BT] + self.position_embedding[...][:length]
        x_BTD = layer_norm(
            x_BTD + self.type_embedding[...][0],
            self.norm_scale[...],
            self.norm_bias[...],
            self.config.layer_norm_eps,
        )

        def step(x: Array, params: Params) -> tuple[Array, Array | None]:
            x = encoder_layer(self.config, params, x, mask_BT)
            return x, x if keep else None

        stacked: Params = nnx.to_pure_dict(nnx.state(self.layers))
        return x_BTD, *jax.lax.scan(step, x_BTD, stacked)


def encoder_layer(
    config: EncoderConfig,
    params: Params,
    x_BTD: Float[Array, "B T D"],
    mask_BT: Bool[Array, "B T"],
) -> Float[Array, "B T D"]:
    """One post-norm block: attention, then a feed-forward network, a LayerNorm after each."""
    rows, length, width = x_BTD.shape
    heads, eps = config.num_attention_heads, config.layer_norm_eps
    q, k, v = (
        (x_BTD @ params[f"{n}_kernel"] + params[f"{n}_bias"]).reshape(rows, length, heads, -1)
        for n in "qkv"
    )
    mask_BTS = jnp.broadcast_to(mask_BT[:, None], (rows, length, length))
    mixed_BTD = attention(q, k, v, mask_BTS).reshape(rows, length, width)
    x_BTD = layer_norm(
        x_BTD + mixed_BTD @ params["o_kernel"] + params["o_bias"],
        params["attention_norm_scale"],
        params["attention_norm_bias"],
        eps,
    )
    up_BTF = x_BTD @ params["up_kernel"] + params["up_bias"]
    up_BTF = jax.nn.gelu(up_BTF, approximate=_TANH[config.hidden_act])
    return layer_norm(
        x_BTD + up_BTF @ params["down_kernel"] + params["down_bias"],
        params["output_norm_scale"],
        params["output_norm_bias"],
        eps,
    )


def layer_norm(
    x: Float[Array, "*B D"], scale: Float[Array, " D"], bias: Float[Array, " D"], eps: float
) -> Float[Array, "*B D"]:
    """Layer norm (Ba et al. 2016), computed in f32."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(variance + eps)
    return (normed * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def read_encoder_config(folder: str | Path) -> EncoderConfig:
    """Reads `config.json`. Raises UserError, naming the field, for what is not supported."""
    path = Path(folder) / "config.json"
    raw = read_json(path)
    if raw.get("model_type") != "bert":
        raise UserError(f"{path}: model_type is {raw.get('model_type')!r}, must be 'bert'")
    if (act := raw.get("hidden_act", "gelu")) not in list(_TANH):
        raise UserError(f"{path}: hidden_act is {act!r}, must be one of {sorted(_TANH)}")
    refuse(path, raw, _FIXED)
    require_sizes(path, raw, _SIZES)
    eps = raw.get("layer_norm_eps", EncoderConfig.layer_norm_eps)
    if not isinstance(eps, int | float) or not eps > 0:
        raise UserError(f"{path}: layer_norm_eps = {eps!r}, must be a number above 0")
    fields = dataclasses.fields(EncoderConfig)
    for field in fields:
        if field.default is dataclasses.MISSING and raw.get(field.name) is None:
            raise UserError(f"{path}: field {field.name!r} is missing")
    values: dict[str, Any] = {f.name: raw[f.name] for f in fields if raw.get(f.name) is not None}
    config = EncoderConfig(**values)
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"{path}: hidden_size = {config.hidden_size} is not divisible by "
            f"num_attention_heads = {config.num_attention_heads}"
        )
    return config


def abstract_encoder(
    config: EncoderConfig, dtype: DTypeLike = jnp.float32
) -> tuple[Params, Params]:
    """Returns (ShapeDtypeStructs, logical axes), two trees of the same form, without allocating."""
    return abstract(lambda: Encoder(config, rngs=nnx.Rngs(0), dtype=dtype))


def load_encoder(
    folder: str | Path, config: EncoderConfig, mesh: Mesh, dtype: DTypeLike = jnp.float32
) -> Params:
    """Reads `*.safetensors`, whole on every device of the mesh.

    Raises UserError for missing, surplus or misshapen tensors.
    """
    abstract, axes = abstract_encoder(config, dtype)
    return load(folder, KEYS, abstract, axes, mesh, prefixes=PREFIXES, ignored=IGNORED)


def bind_encoder(config: EncoderConfig, params: Params) -> Encoder:
    """The module over these parameters; cheap, meant to be called inside jitted functions."""
    return bound(lambda: Encoder(config, rngs=nnx.Rngs(0)), params)
