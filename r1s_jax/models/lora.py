"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): a few small kernels train, the rest stands.

A linear kernel W becomes W + (alpha / rank) a b, with a of shape [in, rank] and b of shape
[rank, out]. Adapters are a tree of their own, stacked over layers like the decoder's kernels and
laid out by the same rule table. `with_adapters` puts them beside the kernels, where
`decoder.project` finds them; `merged` adds them up for whoever wants an ordinary policy.

On disk they are what the PEFT library reads and writes.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh
from jax.typing import DTypeLike

from r1s_jax.models import hf, weights
from r1s_jax.models.decoder import DecoderConfig, abstract_params
from r1s_jax.models.families import read_json, refuse, require_sizes
from r1s_jax.models.params import Params, abstract
from r1s_jax.models.weights import Key
from r1s_jax.types import UserError

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
# PEFT's files carry the usual names behind this.
FILES = "adapter_"
CONFIG, WEIGHTS = f"{FILES}{hf.CONFIG}", f"{FILES}{weights.SINGLE}"
# Fields of PEFT's config that leave the formula above as it is, whatever they say.
_HARMLESS = {
    *("peft_type", "task_type", "peft_version", "auto_mapping", "inference_mode"),
    *("base_model_name_or_path", "revision", "r", "lora_alpha", "target_modules", "bias"),
    *("lora_dropout", "init_lora_weights", "megatron_core", "qalora_group_size"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which kernels are adapted, and how. Raises UserError, naming the field."""

    rank: int
    alpha: float  # a kernel is moved by alpha / rank times the product
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"lora.rank = {self.rank}, must be at least 1")
        if not 0 < self.alpha < math.inf:
            raise UserError(f"lora.alpha = {self.alpha}, must be a number above 0")
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise UserError(f"lora.targets = {self.targets}: needs at least one, and none twice")
        if unknown := [name for name in self.targets if name not in TARGETS]:
            raise UserError(f"lora.targets: {unknown[0]!r} is none of {', '.join(TARGETS)}")

    @property
    def scale(self) -> float:
        """What the product of the two kernels is multiplied by."""
        return self.alpha / self.rank


class _Layers(nnx.Module):
    """Both kernels of every target, stacked: every array begins with the axis L."""

    def __init__(
        self, model: DecoderConfig, config: LoraConfig, *, rngs: nnx.Rngs, dtype: DTypeLike
    ):
        shapes, axes = abstract_params(model)
        # Uniform up to fan_in**-0.5, as in the authors' code: published learning rates hold.
        init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform", batch_axis=(0,))
        for name in config.targets:
            layers, fan_in, fan_out = shapes["layers"][f"{name}_kernel"].shape
            _, in_axis, out_axis = axes["layers"][f"{name}_kernel"]
            a = init(rngs.params(), (layers, fan_in, config.rank), dtype)
            # Zero, so that the policy is at first what it was.
            b = jnp.zeros((layers, config.rank, fan_out), dtype)
            setattr(self, f"{name}_lora_a", nnx.Param(a, axes=("layers", in_axis, "rank")))
            setattr(self, f"{name}_lora_b", nnx.Param(b, axes=("layers", "rank", out_axis)))


class _Adapters(nnx.Module):
    def __init__(
        self, model: DecoderConfig, config: LoraConfig, *, rngs: nnx.Rngs, dtype: DTypeLike
    ):
        self.layers = _Layers(model, config, rngs=rngs, dtype=dtype)


def init_adapters(
    model: DecoderConfig, config: LoraConfig, seed: int, dtype: DTypeLike = jnp.float32
) -> Params:
    """Adapters that change nothing yet: `{"layers": {"q_lora_a": [L in rank], ...}}`."""
    adapters = _Adapters(model, config, rngs=nnx.Rngs(seed), dtype=dtype)
    return nnx.to_pure_dict(nnx.state(adapters))


def abstract_adapters(
    model: DecoderConfig, config: LoraConfig, dtype: DTypeLike = jnp.float32
) -> tuple[Params, Params]:
    """Returns (ShapeDtypeStructs, logical axes), two trees of the same form, without allocating."""
    return abstract(lambda: _Adapters(model, config, rngs=nnx.Rngs(0), dtype=dtype))


def with_adapters(params: Params, adapters: Params, config: LoraConfig) -> Params:
    """Parameters that the decoder's functions take, adapters in force; layers stacked.

    Nothing is computed but the scale, which b takes on. Differentiated by the adapters alone, the
    kernels have no gradient: call this inside the loss, with `params` from outside.
    """
    return {**params, "layers": {**params["layers"], **_scaled(adapters, config)}}


def merged(params: Params, adapters: Params, config: LoraConfig) -> Params:
    """The same policy without adapters: each kernel plus its product, summed in f32.

    Kernels keep their type, and under jit their layout. One layer at a time, so that beside the
    result there is no second stack of kernels.
    """

    def add(xs: tuple[Array, Array, Array]) -> Array:
        kernel, a, b = xs
        wide = (x.astype(jnp.float32) for x in (a, b))
        # An accelerator would round the factors to bf16.
        product = jnp.matmul(*wide, precision=jax.lax.Precision.HIGHEST)
        return (kernel.astype(jnp.float32) + product).astype(kernel.dtype)

    layers, scaled = dict(params["layers"]), _scaled(adapters, config)
    for name in config.targets:
        factors = scaled[f"{name}_lora_a"], scaled[f"{name}_lora_b"]
        layers[f"{name}_kernel"] = jax.lax.map(add, (layers[f"{name}_kernel"], *factors))
    return {**params, "layers": layers}


def _scaled(adapters: Params, config: LoraConfig) -> Params:
    return {
        name: p * config.scale if name.endswith("_lora_b") else p
        for name, p in adapters["layers"].items()
    }


# ---------------------------------------------------------------------------------- PEFT's files


def export_adapters(
    folder: Path,
    model: DecoderConfig,
    config: LoraConfig,
    adapters: Params,
    *,
    base: str,
    dtype: DTypeLike = jnp.float32,
    card: str = "",
) -> Path:
    """Writes a folder that `peft.PeftModel.from_pretrained` loads; it appears whole or not at all.

    `base` names the policy that the adapters were trained on: a folder, or an id of the hub.
    `card` becomes README.md. Not to be written into a folder of a whole model, to which
    transformers would apply it unasked. On several hosts all of them call this and process 0
    writes.

    Raises:
        UserError: the folder cannot be written; what stood there before still stands.
    """
    with hf.written_whole(folder) as part:
        # PEFT reads one file only.
        table = _keys(model, config)
        weights.save(part, table, adapters, dtype=dtype, shard_bytes=sys.maxsize, files=FILES)
        if jax.process_index() == 0:
            if card:
                (part / hf.CARD).write_text(card, "utf-8")
            hf.write_json(part / CONFIG, _peft_config(model, config, base))
    return folder.resolve()


def load_adapters(
    folder: str | Path, model: DecoderConfig, mesh: Mesh, dtype: DTypeLike = jnp.float32
) -> tuple[LoraConfig, Params]:
    """Reads adapters in PEFT's layout, with the config they say they have, onto the mesh.

    Raises:
        UserError: no adapters, another method than this one (DoRA, trained biases, ranks that
            differ, ...), kernels that the decoder lacks, and what `weights.load` raises.
    """
    config = read_lora_config(folder, model)
    shapes, axes = abstract_adapters(model, config, dtype)
    return config, weights.load(folder, _keys(model, config), shapes, axes, mesh, files=FILES)


def read_lora_config(folder: str | Path, model: DecoderConfig) -> LoraConfig:
    """Reads `adapter_config.json`. Raises UserError, naming the field, for what is unsupported."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise UserError(f"{path}: not found; adapters in PEFT's layout are {CONFIG} and {WEIGHTS}")
    raw = read_json(path)
    refuse(path, raw, {"peft_type": "LORA", "bias": "none"})
    # Others (PiSSA, OLoRA, ...) have moved the kernels that the adapters are added to.
    if raw.get("init_lora_weights") not in (None, True, False, "gaussian"):
        raise UserError(f"{path}: init_lora_weights = {raw['init_lora_weights']!r} is unsupported")
    for field, value in raw.items():
        if field not in _HARMLESS and value:
            raise UserError(f"{path}: {field} = {value!r} is not supported")
    require_sizes(path, raw, ("r",))
    rank, alpha, named = (raw.get(field) for field in ("r", "lora_alpha", "target_modules"))
    if rank is None:
        raise UserError(f"{path}: field 'r' is missing")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise UserError(f"{path}: lora_alpha = {alpha!r}, must be a number above 0")
    modules = _modules(model)
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise UserError(f"{path}: target_modules = {named!r}, must be a list of names")
    if unknown := sorted(set(named) - set(modules.values())):
        known = ", ".join(modules.values())
        raise UserError(f"{path}: target_modules holds {unknown[0]!r}, which is none of {known}")
    try:
        targets = tuple(target for target, module in modules.items() if module in named)
        return LoraConfig(rank=rank, alpha=alpha, targets=targets)
    except UserError as e:
        raise UserError(f"{path}: {e}") from e


def _peft_config(model: DecoderConfig, config: LoraConfig, base: str) -> dict[str, Any]:
    modules = _modules(model)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "target_modules": [modules[name] for name in config.targets],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _keys(model: DecoderConfig, config: LoraConfig) -> Params:
    """The key of every adapter: the kernel's own, with PEFT's wrapping around it."""
    table = hf.keys(model)["layers"]
    keys = {}
    for name in config.targets:
        module = table[f"{name}_kernel"].name.removesuffix("weight")
        for part in "ab":
            key = Key(f"base_model.model.{module}lora_{part.upper()}.weight", transposed=True)
            keys[f"{name}_lora_{part}"] = key
    return {"layers": keys}


def _modules(model: DecoderConfig) -> dict[str, str]:
    """The last part of each target's name in transformers, such as "q_proj"."""
    table = hf.keys(model)["layers"]
    return {name: table[f"{name}_kernel"].name.split(".")[-2] for name in TARGETS}
