"""Exports of runs that trained adapters: merged into the policy, or by themselves."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

import launch
from r1s_jax.models import hf, lora
from r1s_jax.run.export import export_run
from r1s_jax.sharding import MeshConfig, make_mesh
from r1s_jax.types import UserError
from tests import tiny
from tests.worlds import make_run, write_world

PRESET = ('include "adapters/lora.gin"', "lora.LoraConfig.rank = 2", "lora.LoraConfig.alpha = 6.0")
LORA = lora.LoraConfig(rank=2, alpha=6.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def adapters():
    made = lora.init_adapters(tiny.MODEL, LORA, seed=3)
    return jax.tree.map(lambda p: p + 0.01, made)


@pytest.fixture(scope="module")
def run(world, adapters, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    made = make_run(world, path, *PRESET, params=adapters)
    return made, launch.load_run_config(str(path)).value


def test_adapters_are_merged(run, adapters, tmp_path):
    made, config = run
    assert config.learner.lora == LORA
    step, folder = export_run(config, made.path, tmp_path / "hf")
    loaded = hf.load_params(folder, tiny.MODEL, make_mesh(MeshConfig()))
    expected = lora.merged(tiny.params(), adapters, LORA)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), loaded, expected)
    assert step == 3 and not np.array_equal(
        loaded["layers"]["q_kernel"], tiny.params()["layers"]["q_kernel"]
    )


def test_adapters_by_themselves(run, adapters, tmp_path):
    """What PEFT reads, replaced by a second export, and never beside a whole model."""
    made, config = run
    for _ in range(2):
        _, folder = export_run(config, made.path, tmp_path / "adapters", adapters=True)
    found, loaded = lora.load_adapters(folder, tiny.MODEL, make_mesh(MeshConfig()))
    assert found == LORA and 'library_name: "peft"' in (folder / hf.CARD).read_text()
    jax.tree.map(np.testing.assert_array_equal, loaded, adapters)
    export_run(config, made.path, tmp_path / "hf")
    with pytest.raises(UserError, match=r"hf: holds .*, which no export does"):
        export_run(config, made.path, tmp_path / "hf", adapters=True)
    whole = dataclasses.replace(config, learner=dataclasses.replace(config.learner, lora=None))
    with pytest.raises(UserError, match=r"trained the whole policy .* no adapters"):
        export_run(whole, made.path, tmp_path / "other", adapters=True)
    assert not (tmp_path / "other").exists()
