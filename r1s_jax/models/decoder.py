"""The decoder policy (Qwen2, Qwen3 and Llama architectures) as a Flax nnx module.

One module serves all families, which differ by switches of its config, and all programs. It knows
nothing of caches: every attention layer hands its rotated queries, keys and values to an `attend`
callback, together with whatever the caller threads through the layers, and the caller (learner,
engine) decides what is attended to. Layers are stacked along a leading axis L, so a checkpoint has
one key table whether layers are unrolled or scanned.

Each parameter is declared once: shape, logical axes, initialiser. What is computed are functions of
plain trees, so that the engine can hold the same parameters in a layout of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from r1s_jax.models.params import Params, abstract, bound

# (layer, cache, q [B T H h], k [B T K h], v [B T K h]) -> (attended values [B T H h], cache).
# The cache is any pytree, or None, that goes from layer to layer; the layer is a traced number
# where layers are scanned.
Attend = Callable[[Any, Any, Array, Array, Array], tuple[Array, Any]]
# What the backward pass computes again: nothing, whole layers, or all but their matmuls' results.
Remat = Literal["none", "full", "dots"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's stretch of the context (`rope_type` "llama3"), in config.json's names."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The shape of a decoder, in the field names of Hugging Face's `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # bias of the q, k and v projections (Qwen2)
    qk_norm: bool = False  # each head's query and key are normed before they are rotated (Qwen3)
    max_position_embeddings: int = 32_768


class Layers(nnx.Module):
    """The parameters of all layers, stacked: every array begins with the axis L."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        c, layers = config, config.num_hidden_layers
        q_width, kv_width = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim

        # Blocks begin small beside the embeddings: were they as large or larger, which token
        # stands where would drown in the residual stream, and copying is learnt late.
        small = (2 * layers) ** -0.5

        def kernel(
            fan_in: int, fan_out: int, axes: tuple[str, str], scale: float = 1.0
        ) -> nnx.Param:
            init = nnx.initializers.normal(scale * fan_in**-0.5)
            value = init(rngs.params(), (layers, fan_in, fan_out), dtype)
            return nnx.Param(value, axes=("layers", *axes))

        def vector(width: int, axis: str, value: float) -> nnx.Param:
            return nnx.Param(jnp.full((layers, width), value, dtype), axes=("layers", axis))

        self.input_norm = vector(c.hidden_size, "norm", 1.0)
        self.q_kernel = kernel(c.hidden_size, q_width, ("embed", "heads"))
        self.k_kernel = kernel(c.hidden_size, kv_width, ("embed", "kv_heads"))
        self.v_kernel = kernel(c.hidden_size, kv_width, ("embed", "kv_heads"))
        self.o_kernel = kernel(q_width, c.hidden_size, ("heads", "embed"), small)
        if c.attention_bias:
            self.q_bias = vector(q_width, "heads", 0.0)
            self.k_bias = vector(kv_width, "kv_heads", 0.0)
            self.v_bias = vector(kv_width, "kv_heads", 0.0)
        if c.qk_norm:
            self.q_norm = vector(c.head_dim, "norm", 1.0)
            self.k_norm = vector(c.head_dim, "norm", 1.0)
        self.mlp_norm = vector(c.hidden_size, "norm", 1.0)
        self.gate_kernel = kernel(c.hidden_size, c.intermediate_size, ("embed", "ffn"))
        self.up_kernel = kernel(c.hidden_size, c.intermediate_size, ("embed", "ffn"))
        self.down_kernel = kernel(c.intermediate_size, c.hidden_size, ("ffn", "embed"), small)


class Decoder(nnx.Module):
    """Token ids to final hidden states; `unembed` turns those into logits."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.config = config
        vocab_shape = (config.vocab_size, config.hidden_size)
        init = nnx.initializers.normal(config.hidden_size**-0.5)
        self.embedding = nnx.Param(init(rngs.params(), vocab_shape, dtype), axes=("vocab", "embed"))
        self.layers = Layers(config, rngs=rngs, dtype=dtype)
        self.final_norm = nnx.Param(jnp.ones((config.hidden_size,), dtype), axes=("norm",))
        if not config.tie_word_embeddings:
            value = init(rngs.params(), vocab_shape, dtype)
            self.lm_head = nnx.Param(value, axes=("vocab", "embed"))

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        attend: Attend,
        cache: Any = None,
        *,
        scan: bool = False,
        remat: Remat = "none",
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Runs all layers; returns the hidden states and the cache as the last layer left it.

        With `scan` one layer is compiled and run L times: small programs for deep models. `remat`
        trades the memory of activations for computing them again in the backward pass.
        """
        params = nnx.to_pure_dict(nnx.state(self))
        return hidden_states(
            self.config, params, tokens_BT, positions_BT, attend, cache, scan=scan, remat=remat
        )

    def unembed(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Logits, in f32."""
        return unembed(self.config, nnx.to_pure_dict(nnx.state(self)), hidden)


def hidden_states(
    config: DecoderConfig,
    params: Params,
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    attend: Attend,
    cache: Any = None,
    *,
    scan: bool = False,
    remat: Remat = "none",
) -> tuple[Float[Array, "B T D"], Any]:
    """`Decoder` as a function. `params["layers"]` is stacked, or a sequence of one tree a layer."""
    cos, sin = rope_table(positions_BT, rope_frequencies(config))
    x = params["embedding"][tokens_BT]

    def run(carry: tuple[Array, Any], index: Any, block: Params) -> tuple[Array, Any]:
        x, cache = carry
        return layer(config, block, x, cos, sin, lambda *qkv: attend(index, cache, *qkv))

    if remat != "none":
        dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        # Inside a scan nothing can be merged with the forward pass anyway.
        run = jax.checkpoint(
            run,
            policy=dots if remat == "dots" else None,
            prevent_cse=not scan,
            static_argnums=() if scan else (1,),
        )
    layers, count = params["layers"], config.num_hidden_layers
    if scan:
        xs = (jnp.arange(count), layers)
        (x, cache), _ = jax.lax.scan(lambda carry, xs: (run(carry, *xs), None), (x, cache), xs)
    else:
        for i in range(count):
            stacked = isinstance(layers, dict)
            block = jax.tree.map(lambda p, i=i: p[i], layers) if stacked else layers[i]
            x, cache = run((x, cache), i, block)
    return rms_norm(x, params["final_norm"], config.rms_norm_eps), cache


def unembed(
    config: DecoderConfig, params: Params, hidden: Float[Array, "*B D"]
) -> Float[Array, "*B V"]:
    """Logits, in f32."""
    table = params["embedding" if config.tie_word_embeddings else "lm_head"]
    return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)


def layer(
    config: DecoderConfig,
    params: Params,
    x_BTD: Float[Array, "B T D"],
    cos: Float[Array, "B T 1 half"],
    sin: Float[Array, "B T 1 half"],
    attend: Callable[[Array, Array, Array], tuple[Array, Any]],
) -> tuple[Float[Array, "B T D"], Any]:
    """One pre-norm block: attention, then a gated feed-forward network; and `attend`'s cache."""
    rows, length, _ = x_BTD.shape
    normed = rms_norm(x_BTD, params["input_norm"], config.rms_norm_eps)
    q, k, v = (project(params, n, normed) for n in "qkv")
    if config.attention_bias:
        q, k, v = q + params["q_bias"], k + params["k_bias"], v + params["v_bias"]
    q = q.reshape(rows, length, config.num_attention_heads, config.head_dim)
    k = k.reshape(rows, length, config.num_key_value_heads, config.head_dim)
    v = v.reshape(rows, length, config.num_key_value_heads, config.head_dim)
    if config.qk_norm:
        q = rms_norm(q, params["q_norm"], config.rms_norm_eps)
        k = rms_norm(k, params["k_norm"], config.rms_norm_eps)
    mixed, cache = attend(rotate(q, cos, sin), rotate(k, cos, sin), v)
    x_BTD = x_BTD + project(params, "o", mixed.reshape(rows, length, -1))
    normed = rms_norm(x_BTD, params["mlp_norm"], config.rms_norm_eps)
    gated = jax.nn.silu(project(params, "gate", normed)) * project(params, "up", normed)
    return x_BTD + project(params, "down", gated), cache


def project(params: Params, name: str, x: Float[Array, "B T in"]) -> Float[Array, "B T out"]:
    """A layer's linear kernel, and its low-rank adapter where there is one (`models.lora`)."""
    kernel = params[f"{name}_kernel"]
    if f"{name}_lora_a" not in params:
        return linear(x, kernel)
    # Plain, because the kernel is frozen: no gradient of its size is to be asked for.
    y = x @ kernel
    return y + linear(linear(x, params[f"{name}_lora_a"]), params[f"{name}_lora_b"])


@jax.custom_vjp
def linear(x: Float[Array, "B T in"], kernel: Float[Array, "in out"]) -> Float[Array, "B T out"]:
    """x @ kernel, with the kernel's gradient as a product of two matrices.

    Left to itself XLA for CPUs writes what comes before it (an activation's gradient) straight into
    a transposed copy, number by number, which takes a third of a whole step. Here nothing is
    transposed but the narrower of kernel and gradient.
    """
    return x @ kernel


def _linear(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ kernel, (x, kernel)


def _linear_gradients(kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = kept
    x_ND, dy_NF = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    over_rows = (((0,), (0,)), ((), ()))
    if x.shape[-1] <= dy.shape[-1]:
        d_kernel = jax.lax.dot_general(x_ND, dy_NF, over_rows)
    else:
        d_kernel = jax.lax.dot_general(dy_NF, x_ND, over_rows).T
    return jnp.einsum("...f,df->...d", dy, kernel), d_kernel


linear.defvjp(_linear, _linear_gradients)


def rms_norm(
    x: Float[Array, "*B D"], scale: Float[Array, " D"], eps: float
) -> Float[Array, "*B D"]:
    """Root-mean-square norm (Zhang & Sennrich 2019), statistics in f32."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * scale


def rope_frequencies(config: DecoderConfig) -> Float[np.ndarray, " half"]:
    """Angle per position of each rotated pair: theta^(-2i/h), stretched where the config says so.

    Far from the start of a text the last bit of a frequency is worth a thousandth of a radian,
    so these are rounded step by step as transformers does: the exponent, the power and its
    inverse to f32 each. The stretch (Llama 3.1): wavelengths beyond original/low_freq_factor
    positions grow by `factor`, those below original/high_freq_factor stay, and between them it is
    blended in.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    powers = np.power(np.float64(config.rope_theta), exponents.astype(np.float64))
    frequencies = np.float32(1) / powers.astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position_embeddings / (np.float32(2 * np.pi) / frequencies)
    share = np.clip((turns - np.float32(low)) / np.float32(high - low), 0, 1).astype(np.float32)
    return (1 - share) * frequencies / np.float32(scaling.factor) + share * frequencies


def rope_table(
    positions_BT: Int[Array, "B T"], frequencies: Float[np.ndarray, " half"]
) -> tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]:
    """Cosines and sines of the rotary angles (Su et al. 2021), f32, broadcast over heads."""
    angles = positions_BT.astype(jnp.float32)[:, :, None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B T N h"],
    cos: Float[Array, "B T 1 half"],
    sin: Float[Array, "B T 1 half"],
) -> Float[Array, "B T N h"]:
    """Rotates the two halves of each head (the layout of Hugging Face's checkpoints)."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def init_params(config: DecoderConfig, seed: int, dtype: DTypeLike = jnp.float32) -> Params:
    """Random parameters as a nested dict of arrays."""
    return nnx.to_pure_dict(nnx.state(Decoder(config, rngs=nnx.Rngs(seed), dtype=dtype)))


def abstract_params(config: DecoderConfig, dtype: DTypeLike = jnp.float32) -> tuple[Params, Params]:
    """Returns (ShapeDtypeStructs, logical axes), two trees of the same form, without allocating."""
    return abstract(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype))


def bind(config: DecoderConfig, params: Params, dtype: DTypeLike | None = None) -> Decoder:
    """The module over these parameters; cheap, meant to be called inside jitted functions.

    With `dtype` it computes in that type, whatever the parameters' own; sums that need it (norms,
    softmax, logits) stay f32.
    """

    def build() -> Decoder:
        decoder = Decoder(config, rngs=nnx.Rngs(0))
        for name, p in params["layers"].items():
            if not hasattr(decoder.layers, name):  # adapters, see `models.lora`
                setattr(decoder.layers, name, nnx.Param(jnp.zeros(p.shape, p.dtype)))
        return decoder

    return bound(build, params, dtype)
