"""Parameters as plain trees: shapes and logical axes from a module's declarations, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.typing import DTypeLike

Params = dict[str, Any]
Module = TypeVar("Module", bound=nnx.Module)


def abstract(build: Callable[[], nnx.Module]) -> tuple[Params, Params]:
    """Returns (ShapeDtypeStructs, logical axes) of the module, two trees of the same form.

    Nothing is allocated; every parameter must have been declared with its `axes`.
    """
    state = nnx.state(nnx.eval_shape(build))
    is_param = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    axes = jax.tree.map(lambda p: p.get_metadata("axes"), state, is_leaf=is_param)
    return nnx.to_pure_dict(state), nnx.to_pure_dict(axes)


def bound(build: Callable[[], Module], params: Params, dtype: DTypeLike | None = None) -> Module:
    """The module over these parameters, cast to `dtype` if given; cheap inside jitted functions."""
    graph, _ = nnx.split(nnx.eval_shape(build))
    if dtype is not None:
        params = jax.tree.map(lambda p: p.astype(dtype), params)
    return nnx.merge(graph, params)
