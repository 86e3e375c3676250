"""The same batch gives the same updates on one device, on eight, and on two hosts of four each."""

import itertools
import pathlib
import pickle

import jax
import numpy as np
import pytest

from r1s_jax.sharding import MeshConfig
from tests.rl import update_program
from tests.rl.test_update import assert_near, stepped
from tests.two_hosts import two_hosts

pytestmark = pytest.mark.slow  # two processes that compile everything


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """name of the mesh -> (states, metrics), a dict for each host."""
    folder = tmp_path_factory.mktemp("hosts")
    with two_hosts(folder, [pathlib.Path(update_program.__file__), folder]) as hosts:
        assert hosts.codes() == [0, 0], [hosts.said(i) for i in (0, 1)]
    return [pickle.loads((folder / f"{i}.pickle").read_bytes()) for i in (0, 1)]


@pytest.fixture(scope="module")
def one_device():
    return update_program.update(MeshConfig())


def assert_same_update(got, expected):
    """To f32 round-off: sums over devices are added in another order.

    Adam divides a gradient near zero by its own size, and with it the round-off: the moments are
    held against those of one device, the parameters against what Adam makes of the moments.
    """
    (states, metrics), (wanted, others) = got, expected
    assert len(states) == len(wanted) == 3
    for count, (before, after) in enumerate(itertools.pairwise(states), 1):
        moments, others_moments = after.opt_state[1][0], wanted[count].opt_state[1][0]
        assert_near(moments.mu, jax.tree.leaves(others_moments.mu), 2e-5)
        assert_near(moments.nu, jax.tree.leaves(others_moments.nu), 4e-5)
        assert_near(after.params, stepped(before, after, count), 1e-5)
    assert metrics.keys() == others.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(value, others[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_updates_move_what_is_compared(one_device):
    for before, after in itertools.pairwise(one_device[0]):
        moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before.params, after.params)
        assert min(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.parametrize("name", update_program.MESHES)
def test_eight_devices_are_one(one_device, name):
    assert_same_update(update_program.update(update_program.MESHES[name]), one_device)


@pytest.mark.parametrize("name", update_program.MESHES)
def test_two_hosts_are_one_device(played, one_device, name):
    first, second = (report[name] for report in played)
    assert_same_update(first, one_device)
    for left, right in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()
