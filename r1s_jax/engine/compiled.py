"""The engine's programs with their layouts, jitted for a mesh of real or described devices."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike

from r1s_jax.engine import cache, programs, tpu
from r1s_jax.engine.plan import Plan
from r1s_jax.engine.state import Chunk, EngineConfig, Rows
from r1s_jax.models.decoder import DecoderConfig, Params, abstract_params
from r1s_jax.sharding import named_sharding, partition_spec, replicated


class Programs:
    """`place`, `extend`, `copy` and `decode` for one model, plan and mesh (see `programs`).

    Every argument of theirs that has rows is split over the lanes, in order.
    """

    def __init__(
        self, model: DecoderConfig, config: EngineConfig, plan: Plan, mesh: Mesh, dtype: DTypeLike
    ):
        self.model, self.config, self.plan, self.mesh, self.dtype = model, config, plan, mesh, dtype
        # The same operation with kernels, or with plain array operations.
        self.kv = tpu if mesh.devices.flat[0].platform == "tpu" else cache
        self.rows = named_sharding(mesh, ("rows",))
        whole = replicated(mesh)
        pages = tuple(named_sharding(mesh, axes) for axes in self.kv.AXES)
        specs = tuple(partition_spec(axes) for axes in self.kv.AXES)
        layout = programs.Layout(
            model=model,
            append_attend=over_lanes(self.kv.append_attend, mesh, specs),
            pages_per_layer=plan.pages,
            scan=config.scan_layers,
        )
        self.place = jax.jit(
            partial(_place, config.scan_layers, model.num_hidden_layers, dtype),
            out_shardings=self.param_layout(),
        )
        self.extend = jax.jit(
            partial(programs.extend, layout),
            donate_argnums=1,
            in_shardings=(self.param_layout(), pages, *[self.rows] * 4),
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
            in_shardings=(self.param_layout(), whole, pages, rows, whole),
            out_shardings=(pages, chunk),
        )

    def param_layout(self) -> Params:
        """Shardings of the engine's copy of the weights: stacked layers, or one tree a layer."""
        _, axes = abstract_params(self.model)
        return self._by_layer(axes, lambda names: named_sharding(self.mesh, names))

    def abstract_params(self) -> Params:
        """Shapes and layout of the engine's copy of the weights."""
        shapes, _ = abstract_params(self.model, self.dtype)
        split = _split(self.config.scan_layers, self.model.num_hidden_layers)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            jax.eval_shape(split, shapes),
            self.param_layout(),
        )

    def abstract_pages(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The pool of all lanes."""
        tensor = self.mesh.shape["tensor"]
        one = self.kv.page_shapes(self.model, self.plan.pages, self.config.page, self.dtype, tensor)
        return tuple(
            jax.ShapeDtypeStruct(
                (self.plan.lanes * s.shape[0], *s.shape[1:]),
                s.dtype,
                sharding=named_sharding(self.mesh, axes),
            )
            for s, axes in zip(one, self.kv.AXES, strict=True)
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


def _split(stacked: bool, layers: int) -> Any:
    """Stacked layers as they are, or one tree a layer: a slice of a stack is a copy on a CPU."""
    if stacked:
        return lambda params: params
    return lambda params: (
        params
        | {
            "layers": tuple(
                jax.tree.map(lambda p, i=i: p[i], params["layers"]) for i in range(layers)
            )
        }
    )


def _place(stacked: bool, layers: int, dtype: DTypeLike, params: Params) -> Params:
    # Rounded first: what travels between devices is the smaller type.
    return _split(stacked, layers)(jax.tree.map(lambda p: p.astype(dtype), params))


def over_lanes(
    append_attend: programs.AppendAttend, mesh: Mesh, pages: tuple[PartitionSpec, ...]
) -> programs.AppendAttend:
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
