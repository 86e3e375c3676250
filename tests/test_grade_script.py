"""tpu_scripts/grade_difficulty.py: a small policy on a real engine, and the tiny config's."""

import importlib
import json
import shutil
import subprocess
import sys

import pytest

import launch
from r1s_jax.data.atlas_builder import load_atlas
from r1s_jax.data.difficulty import Thresholds
from r1s_jax.data.questions import read_questions, write_questions
from r1s_jax.rollout.loop import Rollout
from r1s_jax.types import UserError
from tests.worlds import bindings, write_world

FEW = ("--easy_below", "2", "--hard_above", "3", "--rollouts", "3")


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    world = write_world(tmp_path_factory.mktemp("world"))
    rows = [{"idx": i, "question": f"w{i}?", "answer": "ab"} for i in range(5)]
    (world / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (world / "eval.jsonl").unlink()  # not needed here
    return world


@pytest.fixture
def world(template, tmp_path, monkeypatch):
    shutil.copytree(template, tmp_path / "world")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "prepare_environment", lambda: None)
    # The small policy answers nothing right; what it wrote decides instead, to the last token.
    measure = lambda t: {"acc_r": float(t.token_ids_T.sum() % 3 == 0)}  # noqa: E731
    monkeypatch.setattr("r1s_jax.run.grade.episode_metrics", measure)
    return tmp_path / "world"


def arguments(world):
    pairs = (("--gin", binding) for binding in bindings(world))
    return ["--config", "tiny", *(part for pair in pairs for part in pair), *FEW]


def call(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["grade_difficulty", *map(str, args)])
    return importlib.import_module("grade_difficulty").main()


def refused(monkeypatch, *args):
    with pytest.raises(UserError) as caught:
        call(monkeypatch, *args)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.slow
def test_grades_and_goes_on_after_a_kill(world, monkeypatch, tmp_path, capsys):
    """Killed after the first wave; the files are those of an uninterrupted run."""
    args = arguments(world)
    call(monkeypatch, *args)
    said = capsys.readouterr().out
    out = tmp_path / "runs" / "graded_tiny.jsonl"
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["idx"] for row in rows] == list("01234")
    assert read_questions(out) == read_questions(world / "train.jsonl")
    thresholds = Thresholds(easy_below=2, hard_above=3)
    for row in rows:
        needed = row["rollouts"]
        assert row["difficulty"] == thresholds.difficulty(needed)
        assert row["passes"] == 0 if needed is None else row["passes"] >= 1
        assert row["played"] == (3 if needed in (None, 3) else needed)
    assert len({row["rollouts"] for row in rows}) > 1  # else it shows little
    assert f"5 questions, {sum(row['played'] for row in rows)} rollouts" in said
    assert "easy, medium, hard questions: runs/graded_tiny.jsonl\n" in said

    run, other = Rollout.run, tmp_path / "other.jsonl"

    def dies_later(self, *args, **kwargs):
        monkeypatch.setattr(Rollout, "run", dies)
        return run(self, *args, **kwargs)

    def dies(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Rollout, "run", dies_later)
    with pytest.raises(KeyboardInterrupt):
        call(monkeypatch, *args, "--out", other)
    assert not other.exists()
    monkeypatch.setattr(Rollout, "run", run)
    call(monkeypatch, *args, "--out", other)
    for name in ("jsonl", "rollouts.jsonl"):
        graded = (tmp_path / "runs" / f"graded_tiny.{name}").read_bytes()
        assert (tmp_path / f"other.{name}").read_bytes() == graded

    log = (tmp_path / "other.rollouts.jsonl").read_bytes()

    # Another selection and other thresholds take no rollouts.
    monkeypatch.setattr(Rollout, "run", dies)
    more = ["--easy_below", "1", "--keep", "hard,medium", "--out", other]
    call(monkeypatch, *args, *more)
    kept = [json.loads(line) for line in other.read_text().splitlines()]
    assert [row["idx"] for row in kept] == list("01234")
    assert {row["difficulty"] for row in kept} <= {"medium", "hard"}  # easy would be below 1
    call(monkeypatch, *args, *more, "--keep", "easy")
    assert other.read_text() == ""
    fewer = ("--rollouts", "2", "--hard_above", "2")
    call(monkeypatch, *args, *fewer, "--out", other)
    rows = [json.loads(line) for line in other.read_text().splitlines()]
    assert max(row["played"] for row in rows) == 2
    assert (tmp_path / "other.rollouts.jsonl").read_bytes() == log

    # More rollouts play what is missing; the grades are those of a new file.
    monkeypatch.setattr(Rollout, "run", run)
    shutil.copy(tmp_path / "other.rollouts.jsonl", tmp_path / "third.rollouts.jsonl")
    for name in ("third", "fourth"):
        call(monkeypatch, *args, "--hard_above", "6", "--rollouts", "6", "--out", f"{name}.jsonl")
    third = (tmp_path / "third.jsonl").read_bytes()
    assert third == (tmp_path / "fourth.jsonl").read_bytes() and b'"played": 4' in third
    assert (tmp_path / "third.rollouts.jsonl").read_bytes().startswith(log)
    monkeypatch.setattr(Rollout, "run", dies)

    # Of other settings, or another policy of the same shape, it is refused.
    cold = ["--gin", "sampling.SamplingConfig.temperature = 0.5"]
    message = refused(monkeypatch, *args, *cold, "--out", other)
    said = "sampling.temperature is 1.0 in this file and 0.5 now; choose another --out"
    assert message == f"{tmp_path / 'other.rollouts.jsonl'}: {said}"
    weights = world / "policy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    assert ": the policy's weights is '" in refused(monkeypatch, *args, "--out", other)
    assert (tmp_path / "other.rollouts.jsonl").read_bytes() == log


def test_refuses_and_touches_nothing(world, monkeypatch, tmp_path):
    args = arguments(world)
    train = world / "train.jsonl"
    text = train.read_text()
    assert "there is no train.rollouts.jsonl" in refused(monkeypatch, *args, "--out", train)
    assert f"--out {world}: is a folder" in refused(monkeypatch, *args, "--out", world)
    assert "either --run_dir RUN or --config NAME" in refused(monkeypatch)
    assert "keep = 'harder'" in refused(monkeypatch, *args, "--keep", "easy,harder")
    assert "hard_above = 3" in refused(monkeypatch, *args, "--rollouts", "2")
    assert "--measure" in refused(monkeypatch, *args, "--measure", "f1")
    assert train.read_text() == text
    assert not (tmp_path / "runs").exists()
    train.unlink()
    assert refused(monkeypatch, *args).startswith(f"world.train_questions = '{train}': no such")


@pytest.mark.slow
def test_the_bundled_policy(tmp_path):
    """The tiny config's base on five questions: it guesses some within 20 rollouts."""
    questions = load_atlas().questions["train"]
    some = questions[:: len(questions) // 5][:5]
    write_questions(tmp_path / "some.jsonl", some)
    script = launch.ROOT / "tpu_scripts" / "grade_difficulty.py"
    binding = 'run.WorldConfig.train_questions = "some.jsonl"'
    command = [sys.executable, str(script), "--config", "tiny", "--gin", binding]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "runs" / "graded_tiny.jsonl"
    assert read_questions(out) == some
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert any(row["rollouts"] is not None for row in rows)
    for row in rows:
        assert row["difficulty"] == Thresholds().difficulty(row["rollouts"])
        assert row["played"] in (1, 2, 4, 8, 16, 20)
