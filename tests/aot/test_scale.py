"""Step times and slices: sums by hand, the released transcripts, the files in configs/meshes."""

import dataclasses
import heapq
import json
import math
import re
from pathlib import Path

import pytest

import launch
from r1s_jax.aot import scale, slices
from r1s_jax.aot.roofline import CHIPS, Cost, Program
from r1s_jax.aot.scale import RELEASED
from r1s_jax.engine.plan import Plan
from r1s_jax.sharding import MeshConfig
from r1s_jax.types import UserError
from tests.libtpu import libtpu  # noqa: F401

STAGE2 = launch.load_config("stage2").value
MESHES = sorted(path.stem for path in (launch.CONFIGS / "meshes").glob("v*_*.gin"))
DATA = Path(__file__).parents[3] / "shared" / "data" / "r1_searcher"


def preset(name):
    return launch.load_config("stage2", [f'include "meshes/{name}.gin"']).value


# ---------------------------------------------------------------- a step's time


def costs_of(**seconds):
    """Programs that take so many seconds of a chip that does one FLOP a second."""
    made = {
        name: Cost(program=Program(name=name, traced=None), flops=s) for name, s in seconds.items()
    }
    layer = dataclasses.replace(made["layer"], program=Program(name="layer", traced=None, runs=28))
    return {
        "rollout": [made["extend"], made["insert"], made["decode"]],
        "push": [layer, made["table"]],
        "score": [made["score"]],
        "gradient": [made["gradient"]],
        "optimizer step": [made["step"]],
    }


COSTS = costs_of(extend=1, insert=5, decode=1, layer=1, table=2, score=1, gradient=1, step=1)


def slice_of(config):
    shape, _ = slices.find_shape(config, None)
    return slices.Slice(
        topology="toy:1", devices=(), chip=CHIPS["TPU v5"], config=config, shape=shape, model="toy"
    )


def parts(config):
    return scale.step_seconds(slice_of(config), COSTS, lambda cost: cost.flops)


def test_parts_of_a_step():
    """64 questions x 16 episodes in 4 updates, 256 rows of which 64 blocks of 128 are written."""
    config = preset("v5p_64")
    config = dataclasses.replace(
        config,
        engine=dataclasses.replace(config.engine, rows=256),
        learner=dataclasses.replace(config.learner, rows=16),
        mesh=MeshConfig(fsdp=16, tensor=4),
    )
    found = parts(config)
    # 1,024 episodes of 1,726 tokens, a quarter at a time, in rows of 8,192 that are 95 % full.
    batches = -(-1024 * 1726.25 / 4 / (0.95 * 8192) // 16)
    assert found["gradient"] == 4 * batches == 16
    assert found["score"] == 3 * batches  # the first update's come with its gradient
    assert (found["optimizer"], found["push"]) == (4, 28 + 2)
    assert found["decode"] == pytest.approx(309 * 4 + 579 - 309)
    blocks = 64 * (204 / 128 + 0.5) + 1024 * 2.11 * (575 / 128 + 0.5)
    assert found["extend"] == pytest.approx(blocks / 64)


def test_a_reference_is_scored_too():
    config = preset("v5p_64")
    for kind, scored in (("k3", 3 + 4), ("k1", 4 + 4)):  # k1 is part of the reward: all at once
        algorithm = dataclasses.replace(config.learner.algorithm, kl=kind, kl_weight=1e-3)
        learner = dataclasses.replace(config.learner, algorithm=algorithm)
        assert parts(dataclasses.replace(config, learner=learner))["score"] == scored


# ---------------------------------------------------------------- what episodes look like


def released():
    path = DATA / "released_hotpotqa_qwen.jsonl"
    if not path.is_file():
        pytest.skip("needs the released transcripts in ../shared/data")
    return [json.loads(line)["gen_text_store"] for line in path.read_text("utf-8").splitlines()]


DOCUMENTS = r"<\|begin_of_documents\|>.*?<\|end_of_documents\|>\s*"


def test_the_workload_is_that_of_the_released_transcripts():
    """Searches are counted; tokens need Qwen's tokenizer, whose tokens are some four characters."""
    texts = released()
    found = [re.findall(DOCUMENTS, text, flags=re.DOTALL) for text in texts]
    assert sum(map(len, found)) / len(texts) == RELEASED.searches
    characters = sum(map(len, map("".join, found))) / sum(map(len, found))
    assert 3.5 < characters / RELEASED.documents < 5
    sampled = [len(re.sub(DOCUMENTS, "", text, flags=re.DOTALL)) for text in texts]
    assert 3.5 < sum(sampled) / len(texts) / RELEASED.sampled < 5
    assert 3.5 < max(sampled) / RELEASED.longest < 5.5


@pytest.mark.parametrize("rows", [64, 128, 256, 512, 1024])
def test_decode_steps_are_about_those_of_playing_the_lengths_through(rows):
    """Rows that take the next episode at once; lengths in characters, scaled to the mean."""
    lengths = [len(re.sub(DOCUMENTS, "", text, flags=re.DOTALL)) for text in released()]
    one = RELEASED.sampled * len(lengths) / sum(lengths)
    ends = [0.0] * rows
    for i in range(1024):
        heapq.heapreplace(ends, ends[0] + one * lengths[i % len(lengths)])
    assert RELEASED.decode_steps(1024, rows) == pytest.approx(max(ends), rel=0.15)


# ---------------------------------------------------------------- slices


@pytest.mark.parametrize("name", MESHES)
def test_files_of_slices(name):
    """Chips as the name says; a row of a micro-batch per shard; lanes within a host of four."""
    config = preset(name)
    assert config.mesh.size == int(name.split("_")[1])
    assert config.learner.rows == config.mesh.data * config.mesh.fsdp
    assert config.engine.tensor == scale.HOST_CHIPS
    assert config.engine.rows <= 1024 == config.questions_per_step * config.samples_per_question
    text = (launch.CONFIGS / "meshes" / f"{name}.gin").read_text()
    (shape,) = re.findall(r"\((\d+(?:x\d+)+)\)", text.splitlines()[0])
    assert shape in scale.SLICES[name.split("_")[0]]
    assert config.mesh.size == chips(shape)


def chips(shape):
    return math.prod(int(n) for n in shape.split("x"))


def test_a_run_on_more_chips():
    config = scale.fitted(STAGE2, 32, 2, 4, 16)
    assert config.mesh == MeshConfig(fsdp=16, tensor=2)
    assert (config.learner.rows, config.engine.rows, config.engine.extend_rows) == (16, 512, 32)
    assert scale.fitted(STAGE2, 128, 2, 4, 16).engine.rows == 1024  # a step has no more episodes


def test_a_cache_that_holds_its_rows():
    """100 rows of 1,726 tokens are 172,625: 2,698 pages of 64, and one for trash."""
    plan = Plan(
        lanes=1, rows=100, slots=400, extend_rows=4, pages=2699, pages_per_episode=128,
        cache_bytes=0, weight_bytes=0, limit_bytes=0,
    )  # fmt: skip
    assert scale.holds_rows(plan, STAGE2)
    assert not scale.holds_rows(dataclasses.replace(plan, pages=2698), STAGE2)


def test_the_smallest_slice(monkeypatch):
    """Tried from small to large, without tensor shards first, with as many rows as have room."""
    tried = []

    def here(config, topology, **_):
        tried.append((topology, config.mesh.tensor, config.engine.rows))
        return slice_of(config)

    def has_room(here):
        return here.config.mesh.size == 8 and here.config.engine.rows < 256

    monkeypatch.setattr(scale, "on_slice", here)
    monkeypatch.setattr(scale, "has_room", has_room)
    found = scale.smallest(STAGE2, "v5p").config
    assert (found.mesh, found.engine.rows) == (MeshConfig(fsdp=8), 128)
    assert tried[-3:] == [("v5p:2x2x2", 1, 512), ("v5p:2x2x2", 1, 256), ("v5p:2x2x2", 1, 128)]
    assert tried[:2] == [("v5p:2x2x1", 1, 256), ("v5p:2x2x1", 1, 128)]
    monkeypatch.setattr(scale, "has_room", lambda here: False)
    tried.clear()
    with pytest.raises(UserError, match=r"Qwen2\.5-7B: no slice of v6e up to 16x16 has room"):
        scale.smallest(STAGE2, "v6e")
    # 57 rows fill a minibatch: more than twice as many would be half empty.
    assert min(tensor for topology, tensor, _ in tried if topology == "v6e:16x16") == 4
    with pytest.raises(UserError, match=r"--topology v9: a slice \(v5e:4x4\) or one of v5e, v5p"):
        scale.smallest(STAGE2, "v9")


@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize("name", MESHES)
def test_files_of_slices_have_room(name):
    chip, count = name.split("_")
    (size,) = (size for size in scale.SLICES[chip] if chips(size) == int(count))
    here = slices.on_slice(preset(name), f"{chip}:{size}", own_mesh=True)
    assert len(here.devices) == int(count) and scale.has_room(here)
