"""Whole small runs: reproducible, resumable, splittable, and never compiling after the start."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal

import numpy as np
import pytest
from safetensors.numpy import load_file

from r1s_jax.data.curriculum import CurriculumConfig
from r1s_jax.engine.state import EngineConfig
from r1s_jax.models import hf
from r1s_jax.models.decoder import DecoderConfig, init_params
from r1s_jax.models.lora import LoraConfig
from r1s_jax.rl.algorithm import AlgorithmConfig
from r1s_jax.rl.config import LearnerConfig
from r1s_jax.rl.rewards import REWARDS, Reward
from r1s_jax.rl.shaping import ShapingConfig
from r1s_jax.rollout.loop import Rollout, RolloutConfig
from r1s_jax.run.checkpoint import Checkpointer
from r1s_jax.run.config import EvaluationConfig, PolicyConfig, RunConfig, StageConfig, WorldConfig
from r1s_jax.run.metrics import identical, read_rows
from r1s_jax.run.paths import REPOSITORY
from r1s_jax.run.rundir import open_run_dir
from r1s_jax.run.train import train
from r1s_jax.types import TokenSource, UserError

TINY_BASE = REPOSITORY / "configs" / "models" / "tiny_base"
STAGES = (
    StageConfig(name="stage1", reward="paper_stage1", steps=2),
    StageConfig(name="stage2", reward="paper_stage2", steps=2),
)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A random decoder, small enough to compile quickly, with the tiny base's tokenizer."""
    vocab = hf.read_config(TINY_BASE).vocab_size
    model = DecoderConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
        attention_bias=True,
        max_position_embeddings=256,
    )
    return hf.export(
        tmp_path_factory.mktemp("policy") / "hf",
        model,
        init_params(model, 0),
        source=TINY_BASE,
        eos_ids=(0,),
        pad_id=0,
        dtype="float32",
    )


@pytest.fixture(scope="module")
def config(policy):
    return RunConfig(
        export_dtype="float32",
        policy=PolicyConfig(checkpoint=str(policy), prompt="tiny"),
        world=WorldConfig(train_questions="atlas:train", eval_questions="atlas:eval", eval_limit=8),
        stages=STAGES,
        engine=EngineConfig(rows=8, chunk=4, context=128, extend_rows=4),
        rollout=RolloutConfig(documents=1, max_searches=1, max_new_tokens=12),
        learner=LearnerConfig(
            learning_rate=1e-3,
            updates_per_rollout=2,
            rows=4,
            row_tokens=128,
            remat="none",
            # Random text earns no reward; the KL term gives the updates something to do.
            algorithm=AlgorithmConfig(kl_weight=0.1),
        ),
        evaluation=EvaluationConfig(documents=1, max_searches=1, controls=True),
        questions_per_step=4,
        samples_per_question=2,
        checkpoint_every=1,
    )


def play(config, path):
    """Trains in `path`, given as a user gives it: relative to the working directory."""
    with contextlib.chdir(path.parent):
        code = train(config, open_run_dir(path.name, "test"))
    return code, path


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    code, path = play(config, tmp_path_factory.mktemp("runs") / "whole")
    assert code == 0
    return path


def weights(path):
    return load_file(path / "hf" / "model.safetensors")


def assert_same_weights(a, b):
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def test_same_seed_same_metrics_and_weights(config, whole, tmp_path):
    """Two runs with one seed differ in nothing but the clock."""
    _, again = play(config, tmp_path / "again")
    assert identical(whole / "metrics.jsonl", again / "metrics.jsonl") == []
    assert_same_weights(whole, again)


def test_nothing_compiles_after_the_start(whole):
    rows = read_rows(whole / "metrics.jsonl")
    assert {row["compiles"] for row in rows} == {0.0}
    controls = {"base/forced", "final/banned", "final/wrong_passages", "final/first_only"}
    assert controls < {row["stage"] for row in rows if row["phase"] == "eval"}
    assert json.loads((whole / "summary.json").read_text())["compiles"] == 0


def test_sampler_and_learner_agree(whole):
    """Invariant 3, on whole runs."""
    gaps = [r["logprob_gap"] for r in read_rows(whole / "metrics.jsonl") if r["phase"] == "train"]
    assert len(gaps) == 4
    assert max(gaps) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "phase", "before"),
    [
        ("crash", "train", 1),
        ("crash", "eval", 4),  # the first control at the end
        ("SIGTERM", "eval", 2),  # the evaluation after stage 1
        ("SIGTERM", "train", 3),
    ],
)
def test_interrupted_run_continues_as_if_nothing_happened(
    config, whole, tmp_path, monkeypatch, how, phase, before
):
    """Invariant 12: stopped in the rollout after so many of its kind, then started again."""
    path = tmp_path / "run"
    interrupted(config, path, monkeypatch, how, phase, before)
    assert identical(whole / "metrics.jsonl", path / "metrics.jsonl") == []
    assert_same_weights(whole, path)


def interrupted(config, path, monkeypatch, how, phase, before):
    """Plays a run in two goes."""
    run, calls = Rollout.run, []

    def dying(self, *args, **kwargs):
        if kwargs["call"].phase.startswith(phase):
            calls.append(kwargs["call"])
            if len(calls) == before + 1:
                if how == "crash":
                    raise KeyboardInterrupt
                os.kill(os.getpid(), signal.SIGTERM)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(Rollout, "run", dying)
    if how == "crash":
        with pytest.raises(KeyboardInterrupt):
            play(config, path)
    else:
        assert play(config, path)[0] == 75
        assert not (path / "summary.json").exists()
    monkeypatch.setattr(Rollout, "run", run)
    play(config, path)


@pytest.mark.slow
def test_updates_that_stay_broken_stop_the_run_with_the_batch_saved(config, tmp_path, monkeypatch):
    """Two of two updates are skipped in step 1 and in step 2, and the third one in a row ends it.

    Started again it goes on behind step 1, and comes to the same end only if it knows that two
    were skipped before.
    """
    run, played = Rollout.run, []

    def poisoned(self, *args, **kwargs):
        result = run(self, *args, **kwargs)
        if kwargs["call"].phase.startswith("train"):
            # Then the importance weights are NaN, and so are the gradients.
            for t in (t for group in result.groups for t in group.trajectories):
                t.drawn_logprobs_T[t.sources_T == TokenSource.SAMPLED] = np.nan
            played.append(result.groups)
        return result

    monkeypatch.setattr(Rollout, "run", poisoned)
    algorithm = AlgorithmConfig(estimator="grpo", importance_cap=2.0)
    config = dataclasses.replace(
        config,
        learner=dataclasses.replace(config.learner, algorithm=algorithm),
        evaluation=dataclasses.replace(config.evaluation, controls=False),
        max_skipped_updates=3,
    )
    path, rows = tmp_path / "run", []
    for attempt in range(2):
        with pytest.raises(UserError) as caught:
            play(config, path)
        assert str(caught.value) == (
            "step 2: 4 updates in a row had a gradient that is not finite (max_skipped_updates = "
            "3); the batch is in run/offending_batch.npz"
        )
        with Checkpointer(path / "checkpoints") as checkpointer:
            assert checkpointer.latest_step() == 1
            assert checkpointer.read_host()["position"]["skipped_in_a_row"] == 2
        rows.append(read_rows(path / "metrics.jsonl"))
        steps = [(r["step"], r["skipped_updates"]) for r in rows[attempt] if r["phase"] == "train"]
        assert steps == [(1, 2.0), (2, 2.0)]
        assert rows[attempt][-1]["alarms"] >= 1.0 and rows[attempt][-1]["grad_norm"] is None
    assert [call[0].question for call in played[1:2]] == [call[0].question for call in played[2:]]

    trajectories = [t for group in played[-1] for t in group.trajectories]
    with np.load(path / "offending_batch.npz") as batch:
        assert batch["step"] == 2
        np.testing.assert_array_equal(batch["group_ids_N"], [0, 0, 1, 1, 2, 2, 3, 3])
        assert batch["rewards_N"].mean() == rows[-1][-1]["reward_mean"]
        ends = np.cumsum(batch["lengths_N"])[:-1]
        for field in ("token_ids_T", "sources_T", "logprobs_T", "drawn_logprobs_T"):
            pieces = np.split(batch[field], ends)
            for piece, trajectory in zip(pieces, trajectories, strict=True):
                np.testing.assert_array_equal(piece, getattr(trajectory, field))
        assert np.isnan(batch["drawn_logprobs_T"]).any() and batch["logprobs_T"].any()


@pytest.mark.slow
def test_every_option_at_once(config, tmp_path, monkeypatch):
    """Nothing compiles on the way, and a run in two goes is the run in one."""
    # Random text earns nothing by itself, so that no group would differ.
    odd = lambda t: Reward(parts={"odd": float(t.token_ids_T[-1] % 2)})  # noqa: E731
    for stage in STAGES:
        monkeypatch.setitem(REWARDS, stage.reward, odd)
    everything = dataclasses.replace(
        config,
        learner=dataclasses.replace(
            config.learner,
            algorithm=AlgorithmConfig(
                estimator="grpo",
                ratio="sequence",
                aggregation="token_mean",
                drop_zero_variance=True,
                importance_cap=2.0,
                sequence_band=(0.5, 2.0),
                kl="k3",
                kl_weight=0.1,
                entropy_weight=0.01,
                llds_weight=0.2,
            ),
            lora=LoraConfig(rank=2, alpha=4.0),
            first_moment_dtype="bfloat16",
        ),
        shaping=ShapingConfig(overlong_max=12, overlong_cache=11, no_answer=0.5, no_search=0.5),
        curriculum=CurriculumConfig(sampler="variance"),
        evaluation=dataclasses.replace(config.evaluation, every=1, controls=False),
        max_refills=1,
        checkpoint_every=2,
    )
    paths = tmp_path / "whole", tmp_path / "run"
    assert play(everything, paths[0])[0] == 0
    interrupted(everything, paths[1], monkeypatch, "SIGTERM", "train", 2)
    rows = read_rows(paths[0] / "metrics.jsonl")
    trained = [row for row in rows if row["phase"] == "train"]
    assert {row["compiles"] for row in rows} == {0.0}
    assert any(row["refills"] for row in trained) and any(row["updates"] for row in trained)
    assert identical(*(path / "metrics.jsonl" for path in paths)) == []
    assert_same_weights(*paths)
    # Adapters belong to the policy that they were trained on.
    other = dataclasses.replace(everything.policy, checkpoint=str(paths[0] / "hf"))
    with pytest.raises(UserError, match=r"adapters belong to another policy"):
        play(dataclasses.replace(everything, policy=other), paths[1])


@pytest.mark.slow
def test_one_run_equals_one_run_per_stage(config, whole, tmp_path):
    """`tiny` equals `tiny_stage1` followed by `tiny_stage2`, bit for bit."""
    _, first = play(dataclasses.replace(config, stages=STAGES[:1]), tmp_path / "first")
    policy = dataclasses.replace(config.policy, checkpoint=str(first / "hf"))
    second = dataclasses.replace(config, stages=STAGES[1:], policy=policy)
    _, path = play(second, tmp_path / "second")
    assert_same_weights(whole, path)


def test_finished_run_started_again_changes_nothing(config, whole):
    files = [whole / "metrics.jsonl", whole / "summary.json"]
    before = [file.read_text() for file in files]
    assert play(config, whole)[0] == 0
    assert [file.read_text() for file in files] == before


def test_a_finished_run_without_its_checkpoints_is_left_alone(config, whole, tmp_path):
    """Bug: it began anew over its own results."""
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    for step in (copy / "checkpoints").iterdir():
        shutil.rmtree(step)
    rows = (copy / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match=r"copy: has ended .* checkpoints/ holds none"):
        play(config, copy)
    assert (copy / "metrics.jsonl").read_text() == rows and (copy / "summary.json").exists()
