"""Tensors between safetensors files and a mesh, one at a time in both directions.

A parameter that has one tensor per layer on disk is one stacked array on the mesh. It is filled
in place (its buffer is donated to a small program that transposes, casts and writes one layer), so
beside the parameters themselves no more than two tensors of the checkpoint are in memory. A host
reads those slices that its own devices hold, and no others.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding

from r1s_jax.sharding import check_divisible, named_sharding
from r1s_jax.types import UserError

Tree = Any  # nested dicts
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5 * 10**9  # of a file; what the Hub's own tools use
_MOST_TENSORS = 100_000
_DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(jnp.bfloat16), "F16": np.dtype(np.float16)}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class Key(NamedTuple):
    """Where a parameter stands in a checkpoint; `{i}` in the name means one tensor per layer."""

    name: str
    transposed: bool = False

    @property
    def stacked(self) -> bool:
        return "{i}" in self.name


class _Stored(NamedTuple):
    """A tensor of a checkpoint: its file, its name there, its shape and safetensors' type code."""

    file: Path
    name: str
    shape: tuple[int, ...]
    code: str


class _Parameter(NamedTuple):
    """What is known of a parameter before it is read."""

    key: Key
    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[str | None, ...]

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of its tensors on disk, in the order of the layers."""
        if not self.key.stacked:
            yield self.key.name, self.oriented(self.shape)
            return
        for i in range(self.shape[0]):
            yield self.key.name.format(i=i), self.oriented(self.shape[1:])

    def oriented(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """A parameter's sizes or axes in the order of the checkpoint, or the other way round."""
        return tuple(reversed(values)) if self.key.transposed else tuple(values)

    def piece_sharding(self, mesh: Mesh) -> NamedSharding:
        """The layout of one tensor in the checkpoint's orientation."""
        axes = self.axes[1:] if self.key.stacked else self.axes
        return named_sharding(mesh, self.oriented(axes))


# ------------------------------------------------------------------------------------- reading


def check(
    folder: str | Path,
    keys: Tree,
    abstract: Tree,
    *,
    prefixes: Sequence[str] = ("",),
    ignored: Sequence[str] = (),
    files: str = "",
) -> dict[str, _Stored]:
    """Finds every tensor that the key table wants, reading headers only.

    Args:
        folder: holds `model.safetensors`, or shards with their index.
        keys, abstract: a tree of `Key`s and one of ShapeDtypeStructs, of the same form.
        prefixes: what may stand in front of all names; the one that finds most of them is taken.
        ignored: patterns of names that may be there and are not read.
        files: what the names of the folder's files begin with ("adapter_" for PEFT's).

    Raises:
        UserError: no weights, a broken file or index, missing, surplus or misshapen tensors.
    """
    parameters, stored = list(_parameters(keys, abstract)), _headers(Path(folder), files)
    config = f"{files}config.json"
    count = sum(p.shape[0] if p.key.stacked else 1 for p in parameters)
    if count > _MOST_TENSORS:  # a config gone wrong; the names alone would fill the memory
        raise UserError(f"{folder}: {config} asks for {count} tensors, {len(stored)} are there")
    wanted = {name: shape for parameter in parameters for name, shape in parameter.tensors()}
    prefix = max(prefixes, key=lambda p: sum(p + name in stored for name in wanted))
    stored = {name.removeprefix(prefix): value for name, value in stored.items()}
    problems = [f"missing {name}" for name in sorted(wanted.keys() - stored.keys())]
    problems += [
        f"surplus {name}"
        for name in sorted(stored.keys() - wanted.keys())
        if not any(fnmatch(name, pattern) for pattern in ignored)
    ]
    for name, shape in sorted(wanted.items()):
        if name in stored and stored[name].shape != shape:
            problems.append(f"{name} is {list(stored[name].shape)}, {config} says {list(shape)}")
        elif name in stored and stored[name].code not in _DTYPES:
            known = ", ".join(_DTYPES)
            problems.append(f"{name} is of type {stored[name].code}, must be one of {known}")
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise UserError(f"{folder}: {'; '.join(problems[:3])}{more}")
    return {name: stored[name] for name in wanted}


def load(
    folder: str | Path,
    keys: Tree,
    abstract: Tree,
    axes: Tree,
    mesh: Mesh,
    *,
    prefixes: Sequence[str] = ("",),
    ignored: Sequence[str] = (),
    files: str = "",
) -> Tree:
    """Reads a checkpoint into `abstract`'s shapes and types, laid out by `axes` over the mesh.

    Extra host memory: two tensors of the checkpoint at most. Raises what `check` raises, and
    UserError where a parameter does not divide over the mesh.
    """
    stored = check(folder, keys, abstract, prefixes=prefixes, ignored=ignored, files=files)
    parameters = list(_parameters(keys, abstract, axes))
    for p in parameters:
        check_divisible(mesh, p.key.name, p.shape, p.axes)
    loaded = [_load_one(p, stored, mesh) for p in parameters]
    return jax.tree.unflatten(jax.tree.structure(abstract), loaded)


def _load_one(parameter: _Parameter, stored: dict[str, _Stored], mesh: Mesh) -> Array:
    layout, piece_layout = named_sharding(mesh, parameter.axes), parameter.piece_sharding(mesh)
    pieces = (_read(stored[name], piece_layout) for name, _ in parameter.tensors())
    if not parameter.key.stacked:
        whole = _turn(layout, parameter.key.transposed, np.dtype(parameter.dtype))
        return jax.block_until_ready(whole(next(pieces)))
    array = _zeros(layout, parameter.shape, np.dtype(parameter.dtype))()
    write = _write_layer(layout, parameter.key.transposed)
    for i, piece in enumerate(pieces):
        array = jax.block_until_ready(write(array, piece, i))
    return array


def _read(tensor: _Stored, layout: NamedSharding) -> Array:
    """Puts a tensor on the mesh slice by slice; devices that hold the same slice share a read."""
    from safetensors import safe_open

    holders: dict[str, list[tuple[jax.Device, Any]]] = {}
    for device, index in layout.addressable_devices_indices_map(tensor.shape).items():
        holders.setdefault(repr(index), []).append((device, index))
    parts: list[Array] = []
    # Opened anew for each tensor: what a mapping has touched counts as ours until it is closed.
    with safe_open(tensor.file, framework="np") as file:
        view = file.get_slice(tensor.name)
        for group in holders.values():
            value = view[group[0][1]]
            # Waited for, so that no second slice is read while this one is still on the host.
            parts += jax.block_until_ready([jax.device_put(value, device) for device, _ in group])
    return jax.make_array_from_single_device_arrays(tensor.shape, layout, parts)


@functools.lru_cache(maxsize=64)
def _zeros(layout: NamedSharding, shape: tuple[int, ...], dtype: np.dtype) -> Any:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=layout)


@functools.lru_cache(maxsize=64)
def _turn(layout: NamedSharding, transposed: bool, dtype: np.dtype) -> Any:
    return jax.jit(lambda x: (x.T if transposed else x).astype(dtype), out_shardings=layout)


@functools.lru_cache(maxsize=64)
def _write_layer(layout: NamedSharding, transposed: bool) -> Any:
    def write(stack: Array, piece: Array, i: Array) -> Array:
        piece = (piece.T if transposed else piece).astype(stack.dtype)
        return jax.lax.dynamic_update_index_in_dim(stack, piece, i, 0)

    return jax.jit(write, donate_argnums=0, out_shardings=layout)


def _parameters(keys: Tree, abstract: Tree, axes: Tree = None) -> Iterator[_Parameter]:
    """All parameters, in the order of `jax.tree.leaves(abstract)`."""
    leaves, form = jax.tree.flatten(abstract)
    key_leaves = form.flatten_up_to(keys)
    axes_leaves = [()] * len(leaves) if axes is None else form.flatten_up_to(axes)
    for key, leaf, names in zip(key_leaves, leaves, axes_leaves, strict=True):
        yield _Parameter(key, tuple(leaf.shape), leaf.dtype, names)


def _headers(folder: Path, prefix: str) -> dict[str, _Stored]:
    """Every tensor of the folder by name. An index decides which files count, if there is one."""
    from safetensors import SafetensorError, safe_open

    single, index = folder / f"{prefix}{SINGLE}", folder / f"{prefix}{INDEX}"
    if index.is_file() and single.is_file():  # others would read the latter
        both = f"{single.name} and {index.name}"
        raise UserError(f"{folder}: holds both {both}; remove the one that is stale")
    placed = _read_index(index) if index.is_file() else None
    if placed is not None:
        files = sorted({folder / file for file in placed.values()})
        if absent := [file.name for file in files if not file.is_file()]:
            raise UserError(f"{index}: names {absent[0]}, which is not there")
    elif single.is_file():
        files = [single]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no *.safetensors; download the model's weights into it")
    found: dict[str, _Stored] = {}
    for file in files:
        try:
            with safe_open(file, framework="np") as opened:
                for name in opened.keys():  # noqa: SIM118
                    if name in found:
                        both = f"{found[name].file.name} and {file.name}"
                        raise UserError(f"{folder}: {name} stands twice, in {both}")
                    view = opened.get_slice(name)
                    found[name] = _Stored(file, name, tuple(view.get_shape()), view.get_dtype())
        except (SafetensorError, OSError) as e:
            raise UserError(f"{file}: not a complete safetensors file: {e}") from e
    for name, file in (placed or {}).items():
        if name not in found or found[name].file.name != file:
            where = found[name].file.name if name in found else "no file"
            raise UserError(f"{index}: says {name} is in {file}, it is in {where}")
    return found


def _read_index(path: Path) -> dict[str, str]:
    try:
        placed = json.loads(path.read_text("utf-8"))["weight_map"]
        if not all(isinstance(v, str) and Path(v).name == v for v in placed.values()):
            raise ValueError("a file in weight_map is no plain file name")
        return dict(placed)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        reason = "no weight_map" if isinstance(e, KeyError | TypeError | AttributeError) else e
        raise UserError(f"{path}: not an index of safetensors shards: {reason}") from e


# ------------------------------------------------------------------------------------- writing


class _Piece(NamedTuple):
    """One tensor of a checkpoint to be written: a whole parameter, or its layer `i`."""

    name: str
    shape: tuple[int, ...]
    parameter: _Parameter
    array: Array
    i: int

    def fetch(self, dtype: np.dtype) -> np.ndarray:
        """The tensor on this host, as it stands in the file; all hosts ask for it together."""
        key = self.parameter.key
        turned = _read_piece(key.stacked, key.transposed, dtype)(self.array, self.i)
        if turned.is_fully_addressable:
            return np.asarray(turned)
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(turned, tiled=True))


def save(
    folder: Path,
    keys: Tree,
    params: Tree,
    *,
    dtype: Any,
    shard_bytes: int = SHARD_BYTES,
    files: str = "",
) -> None:
    """Writes the parameters as safetensors in `dtype`: one file, or shards and their index.

    On several hosts all of them call this; process 0 writes, the others bring what they hold.
    Extra host memory: two tensors of the checkpoint at most. `files` as in `check`. Raises OSError
    as the disk does.
    """
    dtype = np.dtype(dtype)
    shards = _shards(list(_pieces(keys, params)), dtype.itemsize, shard_bytes)
    count = len(shards)
    names = [f"{files}model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    names = [f"{files}{SINGLE}"] if count == 1 else names
    for name, shard in zip(names, shards, strict=True):
        tensors = (piece.fetch(dtype) for piece in shard)
        if jax.process_index() == 0:
            _write(folder / name, shard, dtype, tensors)
        else:
            for _ in tensors:
                pass
    if count > 1 and jax.process_index() == 0:
        pairs = zip(names, shards, strict=True)
        placed = {piece.name: name for name, shard in pairs for piece in shard}
        total = sum(math.prod(piece.shape) for shard in shards for piece in shard) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
        (folder / f"{files}{INDEX}").write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _pieces(keys: Tree, params: Tree) -> Iterator[_Piece]:
    for parameter, array in zip(_parameters(keys, params), jax.tree.leaves(params), strict=True):
        for i, (name, shape) in enumerate(parameter.tensors()):
            yield _Piece(name, shape, parameter, array, i)


def _shards(pieces: Sequence[_Piece], itemsize: int, limit: int) -> list[list[_Piece]]:
    """Fills one file after the other; a tensor above the limit has a file of its own."""
    shards: list[list[_Piece]] = [[]]
    filled = 0
    for piece in sorted(pieces, key=lambda piece: _natural(piece.name)):
        size = math.prod(piece.shape) * itemsize
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(piece)
        filled += size
    return shards


def _natural(name: str) -> list[Any]:
    """Sorts layer 10 behind layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _write(
    path: Path, pieces: Sequence[_Piece], dtype: np.dtype, tensors: Iterator[np.ndarray]
) -> None:
    """One safetensors file, written as the tensors come.

    The library's own writer wants all tensors of a file in memory. The format: the header's length
    (8 bytes, little-endian), the header (JSON, padded with spaces to 8 bytes), the data.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for piece in pieces:
        begin, end = end, end + math.prod(piece.shape) * dtype.itemsize
        offsets = {"dtype": _CODES[dtype], "shape": piece.shape, "data_offsets": [begin, end]}
        header[piece.name] = offsets
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for piece, tensor in zip(pieces, tensors, strict=True):
            assert tensor.shape == piece.shape and tensor.dtype == dtype
            file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


@functools.lru_cache(maxsize=16)
def _read_piece(stacked: bool, transposed: bool, dtype: np.dtype) -> Any:
    def read(array: Array, i: Array) -> Array:
        piece = jax.lax.dynamic_index_in_dim(array, i, 0, keepdims=False) if stacked else array
        return (piece.T if transposed else piece).astype(dtype)

    return jax.jit(read)
