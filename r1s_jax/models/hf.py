"""Hugging Face folders in and out: the decoder's key table, used in both directions."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from r1s_jax.models import weights
from r1s_jax.models.decoder import DecoderConfig, Params, abstract_params
from r1s_jax.models.families import config_json, read_config, read_json
from r1s_jax.models.weights import Key
from r1s_jax.types import UserError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
# Licences ask to be passed on.
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "NOTICE", "NOTICE.txt", "USE_POLICY.md")
CONFIG, GENERATION, CARD = "config.json", "generation_config.json", "README.md"

_TOP = {
    "embedding": Key("model.embed_tokens.weight"),
    "final_norm": Key("model.norm.weight"),
    "lm_head": Key("lm_head.weight"),
}
_LAYER = {
    "input_norm": Key("model.layers.{i}.input_layernorm.weight"),
    "mlp_norm": Key("model.layers.{i}.post_attention_layernorm.weight"),
    **{
        f"{n}_kernel": Key(f"model.layers.{{i}}.self_attn.{n}_proj.weight", transposed=True)
        for n in "qkvo"
    },
    **{f"{n}_bias": Key(f"model.layers.{{i}}.self_attn.{n}_proj.bias") for n in "qkv"},
    **{f"{n}_norm": Key(f"model.layers.{{i}}.self_attn.{n}_norm.weight") for n in "qk"},
    **{
        f"{n}_kernel": Key(f"model.layers.{{i}}.mlp.{n}_proj.weight", transposed=True)
        for n in ("gate", "up", "down")
    },
}


def keys(config: DecoderConfig) -> dict[str, Any]:
    """The key of every parameter, as a tree of the parameters' form."""
    abstract, _ = abstract_params(config)
    table: dict[str, Any] = {name: _TOP[name] for name in abstract if name != "layers"}
    return {**table, "layers": {name: _LAYER[name] for name in abstract["layers"]}}


def check_weights(folder: str | Path, config: DecoderConfig) -> None:
    """Compares the headers of the weight files with the config; see `weights.check`."""
    weights.check(folder, keys(config), abstract_params(config)[0], ignored=_ignored(config))


def load_params(
    folder: str | Path, config: DecoderConfig, mesh: Mesh, dtype: DTypeLike = jnp.float32
) -> Params:
    """Streams the weights into the layout of the mesh; see `weights.load`."""
    abstract, axes = abstract_params(config, dtype)
    return weights.load(folder, keys(config), abstract, axes, mesh, ignored=_ignored(config))


def _ignored(config: DecoderConfig) -> tuple[str, ...]:
    """What files may carry for nothing: a copy of the tied table, angles of old releases."""
    angles = ("model.layers.*.self_attn.rotary_emb.inv_freq",)
    return (*angles, "lm_head.weight") if config.tie_word_embeddings else angles


def export(
    folder: str | Path,
    config: DecoderConfig,
    params: Params,
    *,
    source: str | Path,
    eos_ids: tuple[int, ...],
    pad_id: int,
    dtype: DTypeLike = jnp.bfloat16,
    card: str = "",
    shard_bytes: int = weights.SHARD_BYTES,
) -> Path:
    """Writes a folder that transformers and vLLM load; it appears whole or not at all.

    What the weights do not determine (tokenizer, chat template, licence, generation settings,
    every other field of config.json) is taken over from `source`, the folder the policy began as;
    a source that is only a tokenizer gets a config of its own. `card` becomes README.md. On
    several hosts all of them call this and process 0 writes.

    Raises:
        UserError: `source` has no tokenizer, or the folder cannot be written, for want of room for
            example; what stood there before still stands.
    """
    folder, source = Path(folder), Path(source)
    if not any((source / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise UserError(f"{source}: holds no tokenizer.json, which the export takes over")
    with written_whole(folder) as part:
        weights.save(part, keys(config), params, dtype=dtype, shard_bytes=shard_bytes)
        if jax.process_index() == 0:
            _write_rest(part, config, source, eos_ids, pad_id, dtype, card)
    return folder.resolve()


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Gives a folder to write into, which takes `folder`'s place once the block has ended well.

    On several hosts all of them enter; process 0 alone creates, moves and removes.

    Raises:
        UserError: the system refused a write; what stood there before still stands.
    """
    folder = folder.resolve()
    # The process's own: two exports to one folder must not write into each other's files.
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    try:
        if jax.process_index() == 0:
            _clear_up(folder)
            part.mkdir(parents=True)
        yield part
        if jax.process_index() == 0:
            _replace(folder, part)
    except OSError as e:
        raise UserError(f"{folder}: cannot be written: {e.strerror or e}") from e
    finally:
        if jax.process_index() == 0:
            shutil.rmtree(part, ignore_errors=True)


def _write_rest(
    part: Path,
    config: DecoderConfig,
    source: Path,
    eos_ids: tuple[int, ...],
    pad_id: int,
    dtype: DTypeLike,
    card: str,
) -> None:
    for name in (*TOKENIZER_FILES, *LICENCE_FILES, GENERATION):
        if (source / name).is_file():
            shutil.copyfile(source / name, part / name)
    raw = config_json(config, eos_ids, pad_id)
    if not (part / GENERATION).exists():
        generation = {field: raw[field] for field in ("eos_token_id", "pad_token_id")}
        write_json(part / GENERATION, generation)
    if (source / CONFIG).is_file() and read_config(source) == config:
        raw = read_json(source / CONFIG)
    raw.pop("dtype", None)
    if card:
        (part / CARD).write_text(card, "utf-8")
    # Last of all: without it nothing loads a folder that was left half written.
    write_json(part / CONFIG, {**raw, "torch_dtype": jnp.dtype(dtype).name})


def _clear_up(folder: Path) -> None:
    """Removes what killed exports have left, and brings back what one of them had set aside."""
    for left in folder.parent.glob(f"{folder.name}.*.part"):
        writer = left.name.removeprefix(f"{folder.name}.").removesuffix(".part")
        if writer.isdigit() and not Path(f"/proc/{writer}").exists():
            shutil.rmtree(left, ignore_errors=True)
    old = folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():
        old.rename(folder)


def _replace(folder: Path, part: Path) -> None:
    """Puts the finished folder in the place of the one before, which comes back if that fails."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    try:
        part.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes an object as the Hub's own files look: indented, a line break at its end."""
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
