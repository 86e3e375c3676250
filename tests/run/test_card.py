"""The model card: what a reader of the hub needs, and the same text each time."""

import dataclasses
import json

import pytest
from etils import epath

from r1s_jax.engine.state import EngineConfig
from r1s_jax.rl.config import LearnerConfig
from r1s_jax.rollout.loop import RolloutConfig
from r1s_jax.run.card import model_card
from r1s_jax.run.config import PolicyConfig, RunConfig, StageConfig, WorldConfig
from r1s_jax.run.rundir import RunDir

CONFIG = RunConfig(
    policy=PolicyConfig(checkpoint="Some/Model", prompt="chat"),
    world=WorldConfig(train_questions="atlas:train", eval_questions="atlas:eval"),
    stages=(StageConfig(name="stage2", reward="paper_stage2", steps=12),),
    engine=EngineConfig(),
    rollout=RolloutConfig(),
    learner=LearnerConfig(),
    seed=17,
)


@pytest.fixture()
def run(tmp_path):
    folder = tmp_path / "my_run"
    folder.mkdir()
    (folder / "config.gin").write_text("a.b = 1\n")
    return RunDir(path=epath.Path(folder), resumed=True)


def test_what_it_says(run):
    """Header as YAML, prompt, protocol, provenance and configuration; figures once there are."""
    card = model_card(CONFIG, run, 9)
    header = card.split("---\n")[1]
    assert 'base_model: "Some/Model"\n' in header and 'library_name: "transformers"\n' in header
    for text in ("# my_run", "You answer questions", "a.b = 1", "| seed | 17 |", "my_run, step 9"):
        assert text in card
    assert "stage2: reward paper_stage2, 12 steps" in card and "<|end_of_query|>" in card
    assert "## Results" not in card and card == model_card(CONFIG, run, 9)
    results = {"base": {"em": 0.25, "f1": 0.5, "odd": 1}, "stage2": {"em": 0.75}}
    run.summary.write_text(json.dumps({"results": results}))
    card = model_card(CONFIG, run, 12)
    assert "| base | 0.250 | 0.500 |  |  |" in card and "| stage2 | 0.750 |  |  |  |" in card


def test_a_policy_from_a_folder(run):
    """No id of the hub, so no base_model; and its own prompt."""
    policy = PolicyConfig(checkpoint="/somewhere/model", prompt="tiny")
    card = model_card(dataclasses.replace(CONFIG, policy=policy), run, 1)
    assert "base_model" not in card and "```\nUser:{question}\nAssistant: <think>\n```" in card
