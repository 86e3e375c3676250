"""The rule table, its collisions, and the checks at the boundary of the mesh."""

import jax
import pytest
from jax.sharding import PartitionSpec

from r1s_jax import sharding
from r1s_jax.sharding import (
    MeshConfig,
    check_divisible,
    make_mesh,
    partition_spec,
)
from r1s_jax.types import UserError
from tests import tiny


@pytest.mark.parametrize(
    "axes, spec",
    [
        (("vocab", "embed"), ("tensor", "fsdp")),
        (("layers", "embed", "heads"), (None, "fsdp", "tensor")),
        (("layers", "ffn", "embed"), (None, "tensor", "fsdp")),
        (("rows", "kv_heads", None, None), (("data", "fsdp"), "tensor", None, None)),
        (("norm",), (None,)),
        ((), ()),
    ],
)
def test_rules(axes, spec):
    """Logical axes go to mesh axes by one table."""
    assert partition_spec(axes) == PartitionSpec(*spec)


@pytest.mark.parametrize("axes", [("heads", "ffn"), ("rows", "embed"), ("vocab", "vocab")])
def test_collisions_raise(axes):
    """A mesh axis used twice is a programming error, named with both axes."""
    with pytest.raises(ValueError, match=f"{axes[0]}.*{axes[1]}.*twice"):
        partition_spec(axes)


def test_unknown_axis_raises():
    """A misspelt logical axis never means 'whole'."""
    with pytest.raises(KeyError, match="embedd"):
        partition_spec(("embedd",))


def test_mesh_axes_and_shape():
    """The mesh is (data, fsdp, tensor) over the first devices."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=3))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 3}
    assert [d.id for d in mesh.devices.flat] == list(range(6))


def test_too_few_devices():
    """One line with the product and the count."""
    with pytest.raises(UserError, match=r"^mesh: .*= 4\*2\*2 = 16 devices .* 8 are here$"):
        make_mesh(MeshConfig(data=4, fsdp=2, tensor=2))


def test_axis_below_one():
    """Bug: data = 0 made an empty mesh, which failed far away."""
    with pytest.raises(UserError, match=r"^mesh.fsdp = 0, must be at least 1$"):
        MeshConfig(fsdp=0)


def test_check_divisible():
    """What does not divide is named with its axis and both numbers; the rest passes."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    check_divisible(mesh, "w", (6, 4, 5), ("embed", "vocab", None))
    check_divisible(mesh, "slots", (8,), ("rows",))
    with pytest.raises(UserError, match=r"w has 7 along 'vocab', not divisible by 2"):
        check_divisible(mesh, "w", (7, 4), ("vocab", "embed"))
    with pytest.raises(UserError, match=r"slots has 6 along 'rows', not divisible by 4"):
        check_divisible(mesh, "slots", (6,), ("rows",))


def test_engine_refuses_a_mesh_that_does_not_divide():
    """Slots and KV heads that do not divide are the user's mistake: one line, no traceback."""
    with pytest.raises(UserError, match=r"engine.rows has 3 along 'rows'"):
        tiny.new_engine(mesh=MeshConfig(data=2), rows=3)
    with pytest.raises(UserError, match=r"num_key_value_heads has 2 along 'kv_heads'"):
        tiny.new_engine(mesh=MeshConfig(tensor=4))


def test_every_parameter_has_a_layout():
    """Each parameter's logical axes fit its rank, are known, and collide nowhere."""
    from r1s_jax.models.decoder import abstract_params

    shapes, axes = abstract_params(tiny.MODEL)
    checked = jax.tree.map(
        lambda s, a: len(sharding.partition_spec(a)) == len(s.shape), shapes, axes
    )
    assert all(jax.tree.leaves(checked)) and len(jax.tree.leaves(checked)) == 15
