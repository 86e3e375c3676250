"""How much fits: pages and slots from the memory of a device, before anything is allocated."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from r1s_jax.engine import cache, tpu
from r1s_jax.engine.state import EngineConfig
from r1s_jax.models.decoder import DecoderConfig, abstract_params
from r1s_jax.sharding import shards_of
from r1s_jax.types import UserError

# Waiting for documents takes as long as some turns: beyond four episodes a row nobody waits less.
SLOTS_PER_ROW = 4
# Of a device's memory; the rest is the runtime's and the programs' own.
USABLE = 0.9
_GB = 1e9


class DoesNotFit(UserError):
    """Not one episode has room beside the weights."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a lane (the devices that share one copy of the weights) holds; bytes per device.

    `pages` of a layer, the trash included.
    """

    lanes: int
    rows: int
    slots: int
    extend_rows: int
    pages: int
    pages_per_episode: int
    cache_bytes: int
    weight_bytes: int
    limit_bytes: int

    def __str__(self) -> str:
        full = (self.pages - 1) // self.pages_per_episode
        return (
            f"{self.lanes * self.rows} episodes decode at a time, {self.lanes * self.slots} have a "
            f"place: {self.cache_bytes / _GB:.2f} GB of cache and {self.weight_bytes / _GB:.2f} GB "
            f"of weights on a device of {self.limit_bytes / _GB:.1f} GB, room for "
            f"{self.lanes * full} episodes of full length"
            + ("; as they grow long, rows stay empty" if full < self.rows else "")
        )


def plan_memory(
    model: DecoderConfig,
    config: EngineConfig,
    mesh: Mesh,
    dtype: DTypeLike,
    *,
    limit_bytes: int,
    reserved_bytes: int = 0,
) -> Plan:
    """Fills what is left of a device with pages, up to what `SLOTS_PER_ROW` can use.

    `mesh` is the engine's, `reserved_bytes` what others hold on every device. Raises DoesNotFit if
    one episode of `config.context` tokens has no room, UserError if the model cannot reach so far
    or a cache of integers would be as large as one without.
    """
    if config.context > model.max_position_embeddings:
        raise UserError(
            f"engine.context = {config.context}, the model reaches only to "
            f"max_position_embeddings = {model.max_position_embeddings}"
        )
    lanes = mesh.shape["data"] * mesh.shape["fsdp"]
    tensor = mesh.shape["tensor"]
    rows, extend_rows = config.rows // lanes, config.extend_rows // lanes
    weights = weight_bytes(model, mesh, dtype)
    backend = cache_backend(mesh)

    def bytes_of(kind: DTypeLike) -> int:
        shapes = backend.page_shapes(model, 1, config.page, kind, tensor)
        return sum(int(np.prod(s.shape)) * s.dtype.itemsize for s in shapes) // tensor

    page_bytes = bytes_of(config.cache_dtype(dtype))
    if config.int8_cache and page_bytes >= bytes_of(dtype):
        raise UserError(
            f"engine.int8_cache = True saves nothing: with engine.tensor = {tensor} a device has "
            f"{model.num_key_value_heads // tensor} key/value head, whose integers are padded to "
            f"the {page_bytes} bytes of a page without"
        )
    # Logits and what sampling makes of them; the widest activations of an extend call.
    sampled = rows * model.vocab_size // tensor * 4 * 4
    wide = 4 * (model.hidden_size + model.intermediate_size // tensor)
    written = extend_rows * config.extend_tokens * wide * np.dtype(dtype).itemsize
    left = int(limit_bytes * USABLE) - reserved_bytes - weights - max(sampled, written)
    per_episode = config.pages_per_episode
    slots = SLOTS_PER_ROW * rows
    # Each slot's pages, one prompt on its way in, the trash.
    wanted = (slots + 1) * per_episode + 2
    pages = min(wanted, left // page_bytes)
    least = per_episode + 3
    if pages < least:
        raise DoesNotFit(
            f"engine.context = {config.context}: one episode needs {least * page_bytes / _GB:.2f} "
            f"GB of cache on a device, {max(left, 0) / _GB:.2f} GB of {limit_bytes / _GB:.2f} are "
            f"left beside {weights / _GB:.2f} GB of weights and {reserved_bytes / _GB:.2f} GB of "
            "the learner's"
        )
    return Plan(
        lanes=lanes,
        rows=rows,
        slots=slots,
        extend_rows=extend_rows,
        pages=pages,
        pages_per_episode=per_episode,
        cache_bytes=pages * page_bytes,
        weight_bytes=weights,
        limit_bytes=limit_bytes,
    )


def cache_backend(mesh: Mesh) -> ModuleType:
    """Who keeps the cache: kernels on TPUs, plain array operations elsewhere."""
    return tpu if mesh.devices.flat[0].platform == "tpu" else cache


def weight_bytes(model: DecoderConfig, mesh: Mesh, dtype: DTypeLike) -> int:
    """Bytes of the parameters on each device of a mesh."""
    shapes, axes = abstract_params(model, dtype)
    return sum(
        int(np.prod(x.shape)) * np.dtype(dtype).itemsize // shards_of(mesh, names)
        for x, names in zip(
            jax.tree.leaves(shapes),
            jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple)),
            strict=True,
        )
    )


def device_memory(device: jax.Device) -> int:
    """Bytes of a device; of a CPU device, its share of half of the machine's memory."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    container = Path("/sys/fs/cgroup/memory.max")  # "max" where there is no limit
    if container.is_file() and (limit := container.read_text().strip()).isdigit():
        total = min(total, int(limit))
    return total // 2 // max(1, len(jax.local_devices()))
