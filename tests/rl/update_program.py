"""The updates of one rollout on any mesh; as a program, on one host of two."""

import pathlib
import pickle
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from r1s_jax.models.decoder import abstract_params, init_params
from r1s_jax.sharding import MeshConfig, make_mesh, named_sharding
from tests.rl.test_learner import GROUPS, MODEL, REWARDS, episodes, learner, watch
from tests.two_hosts import be_a_host

ROWS = 8  # of a micro-batch: divides over every mesh here
# name -> mesh of eight devices; on two hosts, fsdp and data run over both
MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(fsdp=8),
    "all": MeshConfig(data=2, fsdp=2, tensor=2),
}


def placed(params, mesh):
    """`params` in the learner's layout; every host brings the parts that it holds."""
    _, axes = abstract_params(MODEL)

    def put(value, names):
        value, sharding = np.asarray(value), named_sharding(mesh, names)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return jax.tree.map(put, params, axes)


def whole(array):
    """All of it, on every host."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def update(mesh):
    """(the state at the start and after each optimizer update, metrics) of one rollout."""
    params = placed(init_params(MODEL, 0), make_mesh(mesh))
    new = learner(params, mesh, rows=ROWS)
    states = watch(new, lambda state: jax.tree.map(whole, state))
    return states, new.update(episodes(), REWARDS, GROUPS)


def main(index, folder):
    results = {name: update(mesh) for name, mesh in MESHES.items()}
    (pathlib.Path(folder) / f"{index}.pickle").write_bytes(pickle.dumps(results))


if __name__ == "__main__":
    sys.exit(be_a_host(main, "folder"))
