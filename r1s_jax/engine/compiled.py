"""The engine's programs with their layouts, jitted for a mesh of real or described devices."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike

from r1s_jax.engine import cache, programs, quantize
from r1s_jax.engine.plan import Plan, cache_backend
from r1s_jax.engine.state import Chunk, EngineConfig, Rows
from r1s_jax.models.decoder import DecoderConfig, Params, abstract_params
from r1s_jax.sharding import named_sharding, partition_spec, replicated


class Programs:
    """`place`, `extend`, `copy` and `decode` for one model, plan and mesh (see `programs`).

    Every argument of theirs that has rows is split over the lanes, in order.
    """

    def __init__(
        self,
        model: DecoderConfig,
        config: EngineConfig,
        plan: Plan,
        mesh: Mesh,
        dtype: DTypeLike,
        *,
        expected_length: int | None = None,
    ):
        """`expected_length`: mean tokens of a live row, for what the kernels say they cost."""
        self.model, self.config, self.plan, self.mesh, self.dtype = model, config, plan, mesh, dtype
        self.backend = cache_backend(mesh)
        self.rows = named_sharding(mesh, ("rows",))
        whole = replicated(mesh)
        pages = tuple(named_sharding(mesh, axes) for axes in self.backend.AXES)
        specs = tuple(partition_spec(axes) for axes in self.backend.AXES)
        append_attend = self.backend.bind(mesh.devices.flat[0].platform, expected_length)
        layout = programs.Layout(
            model=model,
            append_attend=over_lanes(append_attend, mesh, specs),
            pages_per_layer=plan.pages,
            scan=config.scan_layers,
        )
        params = self.param_layout()
        # What the learner has: some of it is moved in one piece, some layer by layer.
        pieces = {name: layout for name, layout in params.items() if name != "cache_scales"}
        if not config.scan_layers:
            (one, *_) = pieces.pop("layers")
            self.place_layer = jax.jit(partial(_round_layer, dtype), out_shardings=one)
        self.place_pieces = jax.tree.map(
            lambda s: jax.jit(partial(_round, dtype), out_shardings=s), pieces
        )
        self.measure = jax.jit(
            partial(quantize.measure, model), out_shardings=params.get("cache_scales")
        )
        self.extend = jax.jit(
            partial(_extend, layout),
            donate_argnums=1,
            in_shardings=(params, pages, *[self.rows] * 4),
            out_shardings=pages,
        )
        self.copy = jax.jit(
            jax.shard_map(
                partial(cache.copy_pages, per_layer=plan.pages),
                mesh=mesh,
                in_specs=(specs, partition_spec(("rows",)), partition_spec(("rows",))),
                out_specs=specs,
                check_vma=False,
            ),
            donate_argnums=0,
            in_shardings=(pages, self.rows, self.rows),
            out_shardings=pages,
        )
        by_row: Any = self.rows
        rows = Rows(**dict.fromkeys(Rows.__dataclass_fields__, by_row))
        chunk = Chunk(**dict.fromkeys(Chunk.__dataclass_fields__, by_row) | {"steps": whole})
        self.decode = jax.jit(
            partial(programs.decode_chunk, layout),
            static_argnums=(0, 1),
            donate_argnums=4,
            in_shardings=(params, whole, pages, rows, whole),
            out_shardings=(pages, chunk),
        )

    def place(self, params: Params) -> Params:
        """The learner's parameters, on its mesh, in the engine's dtype and layout.

        A piece at a time: what comes from other devices lands in temporary memory first, so that
        moving everything at once would hold the engine's copy twice.
        """
        rest = {name: params[name] for name in self.place_pieces}
        placed = jax.tree.map(lambda place, p: place(p), self.place_pieces, rest)
        if self.config.scan_layers:
            return placed
        count = self.model.num_hidden_layers
        layers = (self.place_layer(params["layers"], np.int32(i)) for i in range(count))
        return placed | {"layers": tuple(layers)}

    def param_layout(self) -> Params:
        """Shardings of what the programs are given as parameters.

        The engine's copy of the weights, its layers stacked or one tree a layer; and the scales of
        a cache of integers.
        """
        layout = self._by_layer(abstract_params(self.model)[1], partial(named_sharding, self.mesh))
        if self.config.int8_cache:
            scales = named_sharding(self.mesh, (None, "kv_heads", None))
            layout |= {"cache_scales": (scales, scales)}
        return layout

    def abstract_params(self) -> Params:
        """Shapes and layout of what the programs are given as parameters."""
        model = self.model
        shapes, _ = abstract_params(model, self.dtype)
        params = shapes if self.config.scan_layers else jax.eval_shape(_unstacked, shapes)
        if self.config.int8_cache:
            shape = (model.num_hidden_layers, model.num_key_value_heads, model.head_dim)
            params |= {"cache_scales": (jax.ShapeDtypeStruct(shape, jnp.float32),) * 2}
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            params,
            self.param_layout(),
        )

    def abstract_pages(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The pool of all lanes."""
        config, tensor = self.config, self.mesh.shape["tensor"]
        one = self.backend.page_shapes(
            self.model, self.plan.pages, config.page, config.cache_dtype(self.dtype), tensor
        )
        return tuple(
            jax.ShapeDtypeStruct(
                (self.plan.lanes * s.shape[0], *s.shape[1:]),
                s.dtype,
                sharding=named_sharding(self.mesh, axes),
            )
            for s, axes in zip(one, self.backend.AXES, strict=True)
        )

    def empty_pages(self) -> cache.Pages:
        """A pool of zeros, made where it lies."""
        shapes = self.abstract_pages()
        make = jax.jit(
            lambda: tuple(jnp.zeros(s.shape, s.dtype) for s in shapes),
            out_shardings=tuple(s.sharding for s in shapes),
        )
        return make()

    def _by_layer(self, axes: Params, make: Any) -> Params:
        is_names = lambda x: isinstance(x, tuple)  # noqa: E731
        if self.config.scan_layers:
            return jax.tree.map(make, axes, is_leaf=is_names)
        one = jax.tree.map(lambda names: make(names[1:]), axes["layers"], is_leaf=is_names)
        rest = {k: make(names) for k, names in axes.items() if k != "layers"}
        return rest | {"layers": (one,) * self.model.num_hidden_layers}


def _unstacked(params: Params) -> Params:
    """One tree a layer: on a CPU a slice of stacked layers would be a copy, at every step."""
    layers = params["layers"]
    (count,) = {p.shape[0] for p in jax.tree.leaves(layers)}
    each = tuple(jax.tree.map(lambda p, i=i: p[i], layers) for i in range(count))
    return params | {"layers": each}


def _round(dtype: DTypeLike, param: Array) -> Array:
    # Before anything travels between devices: the smaller type does.
    return param.astype(dtype)


def _round_layer(dtype: DTypeLike, layers: Params, i: Array) -> Params:
    return {
        name: _round(dtype, jax.lax.dynamic_index_in_dim(p, i, keepdims=False))
        for name, p in layers.items()
    }


def _extend(layout: programs.Layout, *arguments: Any) -> cache.Pages:
    # XLA for TPUs fails where a kernel's result in a chosen memory is the program's own.
    return jax.lax.optimization_barrier(programs.extend(layout, *arguments))


def over_lanes(
    append_attend: cache.AppendAttend, mesh: Mesh, pages: tuple[PartitionSpec, ...]
) -> cache.AppendAttend:
    """Each device works on its own lane's pages and its own heads."""
    heads = partition_spec(("rows", None, "kv_heads", None))
    row, table = partition_spec(("rows",)), partition_spec(("rows", None))
    return jax.shard_map(
        append_attend,
        mesh=mesh,
        in_specs=(pages, heads, heads, heads, table, row, row),
        out_specs=(heads, pages),
        check_vma=False,
    )
