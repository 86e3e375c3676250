"""The mesh, and the one rule table from logical axes to mesh axes.

Parameters name logical axes once, where they are declared; everything that needs a layout
(initialisation, learner, engine, checkpoint, export) derives it from here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from r1s_jax.types import UserError, require_least

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axis (or axes). `None` keeps the axis whole on every device.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "rows": ("data", "fsdp"),
    "texts": ("data", "fsdp", "tensor"),
    "layers": None,
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "ffn": "tensor",
    "rank": None,
    "norm": None,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each mesh axis: replicas, parameter shards, tensor shards.

    Raises UserError where an axis is below 1.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        require_least("mesh", self, dict.fromkeys(MESH_AXES, 1))

    @property
    def size(self) -> int:
        return self.data * self.fsdp * self.tensor


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a (data, fsdp, tensor) mesh over the first `config.size` devices.

    Raises UserError where there are fewer devices than the mesh wants.
    """
    devices = jax.devices() if devices is None else devices
    if len(devices) < config.size:
        raise UserError(
            f"mesh: data*fsdp*tensor = {config.data}*{config.fsdp}*{config.tensor} = {config.size} "
            f"devices are asked for, {len(devices)} are here"
        )
    grid = np.array(devices[: config.size]).reshape(config.data, config.fsdp, config.tensor)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def partition_spec(axes: Sequence[str | None]) -> PartitionSpec:
    """Maps logical axes to a PartitionSpec. Raises ValueError if a mesh axis is used twice."""
    parts = [None if axis is None else RULES[axis] for axis in axes]
    used = [m for part in parts if part for m in ((part,) if isinstance(part, str) else part)]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {tuple(axes)} use a mesh axis twice: {used}")
    return PartitionSpec(*parts)


def named_sharding(mesh: Mesh, axes: Sequence[str | None]) -> NamedSharding:
    """The layout of an array with these logical axes on this mesh."""
    return NamedSharding(mesh, partition_spec(axes))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def shards_of(mesh: Mesh, axes: Sequence[str | None]) -> int:
    """Over how many devices an array with these logical axes is split."""
    parts = partition_spec(axes)
    names = [m for p in parts if p is not None for m in ((p,) if isinstance(p, str) else p)]
    return int(np.prod([mesh.shape[m] for m in names]))


def lane_mesh(mesh: Mesh, tensor: int | None = None) -> Mesh:
    """The same devices in the same order as lanes: groups of `tensor` devices (the mesh's number,
    if None) that share one copy of the weights; nothing is split over fsdp.

    Raises UserError if the devices cannot be grouped so, or a lane's belong to several hosts.
    """
    tensor = tensor or int(mesh.shape["tensor"])
    devices = mesh.devices.reshape(-1)
    if devices.size % tensor:
        raise UserError(
            f"engine.tensor = {tensor} does not divide the mesh's {devices.size} devices"
        )
    lanes = devices.reshape(-1, 1, tensor)
    for lane in lanes.reshape(-1, tensor):
        if len({d.process_index for d in lane}) > 1:
            raise UserError(
                f"engine.tensor = {tensor}: a lane's devices would belong to several hosts"
            )
    return Mesh(lanes, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def check_divisible(
    mesh: Mesh, name: str, shape: Sequence[int], axes: Sequence[str | None]
) -> None:
    """Raises UserError if an axis of `shape` does not divide over its mesh axes."""
    for size, axis in zip(shape, axes, strict=True):
        shards = shards_of(mesh, (axis,))
        if size % shards:
            (part,) = partition_spec((axis,))
            names = (part,) if isinstance(part, str) else part
            raise UserError(
                f"mesh: {name} has {size} along '{axis}', not divisible by "
                f"{shards} devices ({names})"
            )
