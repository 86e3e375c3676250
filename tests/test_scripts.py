"""The scripts from the command line's side: what they write, and how they refuse bad input."""

import importlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import pytest

import launch
from r1s_jax.evaluation.transcript import segments_of
from r1s_jax.models import hf
from r1s_jax.types import UserError
from tests import hub_stub, tiny
from tests.worlds import bindings, make_run, write_index, write_world


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(template, tmp_path, monkeypatch):
    """A folder of its own for each test, and the scripts' bindings for it."""
    shutil.copytree(template, tmp_path / "world")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "prepare_environment", lambda: None)
    return tmp_path / "world"


def call(monkeypatch, script, *args):
    """Runs a script's main in this process."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
    return importlib.import_module(script).main()


def train_args(world):
    pairs = (("--gin", binding) for binding in bindings(world))
    return ["--config", "tiny", *(part for pair in pairs for part in pair)]


def contents(folder):
    paths = sorted(pathlib.Path(folder).rglob("*"))
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


def refused(monkeypatch, script, *args):
    with pytest.raises(UserError) as caught:
        call(monkeypatch, script, *args)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------- bad input


def spoil_line(line):
    def spoil(world, name):
        path = world / f"{name}.jsonl"
        lines = path.read_text().splitlines()
        path.write_text("\n".join([lines[0], line, *lines[1:]]) + "\n")
        return f"{path}:2: "

    return spoil


def spoil_architecture(world, _):
    path = world / "policy" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "gpt2"}))
    return f"{path}: model_type is 'gpt2'"


def spoil_shape(world, _):
    path = world / "policy" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 64}))
    return f"{world / 'policy'}: model.layers.0.mlp.down_proj.weight is [32, 48], config.json says"


def spoil_weights(world, _):
    path = world / "policy" / "model.safetensors"
    os.truncate(path, path.stat().st_size - 10)
    return f"{path}: not a complete safetensors file"


def spoil_index(world, _):
    path = world / "policy" / "model.safetensors.index.json"
    (world / "policy" / "model.safetensors").rename(world / "policy" / "model-2.safetensors")
    path.write_text('{"weight_map": {"model.norm.weight": "model-1.safetensors"}}')
    return f"{path}: names model-1.safetensors, which is not there"


def spoil_tokenizer(world, _):
    (world / "policy" / "tokenizer.json").unlink()
    return f"{world / 'policy'}: holds no tokenizer.json"


def spoil_embedder(world, _):
    shutil.rmtree(world / "corpus" / "embedder")
    write_index(world / "other", dim=4)
    (world / "other" / "embedder").rename(world / "corpus" / "embedder")
    return f'{world / "corpus" / "manifest.json"}: field "embedder.fingerprint" is '


def no_index(world, _):
    shutil.rmtree(world / "corpus")
    return f"world.corpus = '{world / 'corpus'}': no index there"


def too_few(world, name):
    path = world / "train.jsonl"
    path.write_text(path.read_text().splitlines()[0] + "\n")
    return f"{path}: holds 1 questions, questions_per_step = 2"


def no_file(world, name):
    path = world / f"{name}.jsonl"
    path.unlink()
    return f"world.{name}_questions = '{path}': no such file"


def spoil_length(world, name):
    path = world / f"{name}.jsonl"
    row = {"id": "long", "question": "w" * 200, "answer": "a"}
    path.write_text(path.read_text() + json.dumps(row) + "\n")
    return f"{path}: question 'long': its prompt is "


@pytest.mark.parametrize("name", ["train", "eval"])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_line('{"id": 7, "question": "w?"'), ["not a line of JSON"]),
        (spoil_line('{"id": 7, "question": " ", "answer": "a"}'), ['field "question"', "' '"]),
        (spoil_line('{"id": 7, "question": "w?"}'), ['field "answer" is missing']),
        (spoil_length, ["tokens longer than engine.context = 176"]),
        (no_file, ["JSONL"]),
    ],
)
def test_train_refuses_broken_questions(world, monkeypatch, spoil, words, name):
    start = spoil(world, name)
    message = refused(monkeypatch, "train", *train_args(world))
    assert message.startswith(start)
    for word in words:
        assert word in message
    assert not (world.parent / "runs").exists()


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_architecture,
        spoil_shape,
        spoil_weights,
        spoil_index,
        spoil_tokenizer,
        spoil_embedder,
        no_index,
        too_few,
    ],
)
def test_train_refuses_what_does_not_fit(world, monkeypatch, spoil):
    start = spoil(world, "train")
    assert refused(monkeypatch, "train", *train_args(world)).startswith(start)
    assert not (world.parent / "runs").exists()


def test_train_refuses_the_run_directory_of_another_config(world, monkeypatch, tmp_path):
    run = make_run(world, tmp_path / "run")
    before = contents(run.path)
    args = [*train_args(world), "--gin", "learner.LearnerConfig.rows = 8", "--run_dir", run.path]
    message = refused(monkeypatch, "train", *args)
    where = f"{run.config}: learner.LearnerConfig.rows"
    assert message.startswith(f"{where} is 4 in this run directory and 8 now")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.tex").write_text("x")
    args = [*train_args(world), "--run_dir", tmp_path / "thesis"]
    assert "not empty and no run directory" in refused(monkeypatch, "train", *args)
    assert contents(run.path) == before
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["a.tex"]


def test_export_refuses_and_touches_nothing(world, monkeypatch, tmp_path):
    run = make_run(world, tmp_path / "run")
    before = contents(tmp_path)
    to = ["--run_dir", run.path, "--out"]
    said = [
        (["--run_dir", tmp_path], "no run directory, it holds no config.gin"),
        ([], "give --run_dir RUN"),
        ([*to, world], "holds corpus, which no export does"),
        ([*to, world / "policy"], "is the policy the run starts from"),
        ([*to, world / "tokenizer"], "not empty and no export, it lacks config.json"),
        ([*to, world / "prompt.txt"], "is a file"),
        ([*to, tmp_path / "new", "--push", "my model"], "'my model' is no id of the hub"),
        ([*to, tmp_path / "new", "--push", "me/model"], "HF_HUB_OFFLINE is set"),
    ]
    for args, words in said:
        assert words in refused(monkeypatch, "export_hf", *args)
    spoil_shape(world, "")
    message = refused(monkeypatch, "export_hf", "--run_dir", run.path)
    path = f"{run.checkpoints / '3'}: state.params.layers.down_kernel is float32[2,48,32] in"
    assert message.startswith(path)
    shutil.rmtree(run.checkpoints / "3")
    assert "holds no checkpoint" in refused(monkeypatch, "export_hf", "--run_dir", run.path)
    after = contents(tmp_path)
    removed = run.checkpoints / "3"
    assert {p for p in before.keys() - after.keys() if not p.is_relative_to(removed)} == set()
    changed = {p for p in after if after[p] != before.get(p, b"")}
    assert changed == {world / "policy" / "config.json"}


@pytest.mark.slow
def test_a_disk_that_fills_up_in_the_middle_of_an_export(world, tmp_path):
    """The script itself: one line, exit code 2, and neither a new folder nor half of one.

    A limit on the size of files makes the system stop the write part of the way.
    """
    run = make_run(world, tmp_path / "run")
    shutil.rmtree(run.hf)
    before = contents(tmp_path)
    script = [sys.executable, launch.ROOT / "tpu_scripts/export_hf.py", "--run_dir", run.path]
    limited = ["bash", "-c", 'ulimit -f 48 && exec "$@"', "bash", *script]
    done = subprocess.run(limited, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1] == f"error: {run.hf}: cannot be written: File too large"
    assert "Traceback" not in done.stderr
    assert contents(tmp_path) == before


def test_evaluate_and_ask_refuse(world, monkeypatch, tmp_path):
    run = make_run(world, tmp_path / "run")
    unexported = ["--run_dir", run.path]
    both = [*unexported, "--config", "tiny"]
    other = [*train_args(world), "--checkpoint", tmp_path]
    for script, more in (("evaluate", []), ("ask", ["w1?"])):
        assert "no export there yet" in refused(monkeypatch, script, *more, *unexported)
        assert "either --run_dir RUN or" in refused(monkeypatch, script, *more, *both)
        assert "no Hugging Face checkpoint" in refused(monkeypatch, script, *more, *other)
    assert "either --run_dir RUN or" in refused(monkeypatch, "evaluate")
    assert "--mode" in refused(monkeypatch, "evaluate", *unexported, "--mode", "best")
    assert refused(monkeypatch, "ask", "  ", *unexported) == "the question is empty"
    assert "--temperature -1" in refused(monkeypatch, "ask", "w1?", "--temperature", "-1.0")
    assert "runs/tiny: no run directory" in refused(monkeypatch, "ask", "w1?")
    assert not list(run.path.glob("eval*"))


def test_pretraining_does_not_write_over_other_things(world, monkeypatch):
    before = contents(world)
    message = refused(monkeypatch, "pretrain_tiny", "--out", world)
    assert "holds corpus, which no export does" in message
    assert "--steps 0" in refused(monkeypatch, "pretrain_tiny", "--steps", "0")
    assert contents(world) == before


# ---------------------------------------------------------------- what they do


def test_export_evaluate_and_ask(world, monkeypatch, tmp_path, capsys):
    run = make_run(world, tmp_path / "run")
    call(monkeypatch, "export_hf", "--run_dir", run.path)
    assert "step 3" in capsys.readouterr().out
    params = hf.load_params(str(run.hf), tiny.MODEL, tiny.new_engine().mesh)
    expected = jax.tree.map(lambda p: p + 1, tiny.params())
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, expected))
    call(monkeypatch, "export_hf", "--run_dir", run.path)  # an export may be replaced

    # The policy itself plays; the saved one, moved by 1, says nothing of interest.
    args = ["--run_dir", run.path, "--checkpoint", world / "policy", "--mode", "all"]
    (world / "train.jsonl").unlink()  # not needed here
    call(monkeypatch, "evaluate", *args)
    assert "wrong passages" in capsys.readouterr().out
    modes = ("search", "forced", "banned", "wrong_passages", "first_only")
    modes += ("closed_book", "standard_rag")
    for mode in modes:
        figures = json.loads((run.path / f"eval_{mode}.json").read_text())
        assert figures["mode"] == mode and {"em", "retrieval_rate"} <= figures["results"].keys()
        rows = [json.loads(x) for x in (run.path / f"eval_{mode}.jsonl").read_text().splitlines()]
        assert [row["id"] for row in rows] == ["eval0", "eval1", "eval2"]
        searched = sum(bool(row["searches"]) for row in rows) / 3
        if mode == "standard_rag":  # its searches stood in the prompt
            searched -= 1
        assert figures["results"]["retrieval_rate"] == pytest.approx(searched)
    for mode in ("banned", "closed_book", "standard_rag"):
        figures = json.loads((run.path / f"eval_{mode}.json").read_text())
        assert figures["results"]["searches_mean"] == 0

    rows = [json.loads(x) for x in (run.path / "eval_search.jsonl").read_text().splitlines()]
    row = max(rows, key=lambda row: len(row["searches"]))
    number = int(row["id"].removeprefix("eval"))
    call(monkeypatch, "ask", f"w{number}?", *args[:4])
    said = capsys.readouterr().out
    asked = ["<|begin_of_query|>" in s.text for s in segments_of(row["gen_text_store"])]
    assert said.count("\nquery ") == sum(asked)
    assert said.count("\ndocuments ") == len(row["searches"])


@pytest.mark.slow
def test_export_and_push(world, tmp_path):
    """The start of the run comes from the hub, its export goes there."""
    hub_id = 'run.PolicyConfig.checkpoint = "lab/policy"'
    run = make_run(world, tmp_path / "run", hub_id)
    script = pathlib.Path(launch.__file__).with_name("export_hf.py")
    with hub_stub.HubStub() as hub:
        files = {path.name: path.read_bytes() for path in (world / "policy").iterdir()}
        hub.add("lab/policy", files)
        more = {"HF_TOKEN": hub_stub.TOKEN, "R1S_JAX_CACHE": ""}
        env = hub_stub.environment(tmp_path / "home", hub.url, **more)

        def push(repo_id):
            command = [sys.executable, str(script), "--run_dir", str(run.path), "--push", repo_id]
            return subprocess.run(command, env=env, capture_output=True, text=True)

        wrong = push("my model")
        assert wrong.returncode == 2 and wrong.stderr.startswith("error: 'my model' is no id")
        assert wrong.stderr.count("\n") == 1
        assert not any(run.hf.iterdir()) and not hub.requests
        done = push("me/model")
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith(f"is in {run.hf}\npushed to {hub.url}/me/model\n")
        assert not hub.asked("GET", "/store/")  # the start's shape and tokenizer are enough
    pushed = hub.repositories["me/model"]
    made, commit = pushed.commits
    assert pushed.private and commit.message == "run: step 3"
    exported = {path.name: path.read_bytes() for path in run.hf.iterdir()}
    assert commit.files == {**made.files, **exported}


@pytest.mark.slow
def test_a_whole_run_and_its_policy(world, monkeypatch, tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert call(monkeypatch, "train", *train_args(world), "--run_dir", run_dir) == 0
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 2
    before = contents(run_dir / "hf")
    call(monkeypatch, "export_hf", "--run_dir", run_dir)
    assert contents(run_dir / "hf") == before  # the end of a run exports the same
    call(monkeypatch, "evaluate", "--run_dir", run_dir)
    assert (run_dir / "eval_search.json").exists()
    assert call(monkeypatch, "train", *train_args(world), "--run_dir", run_dir) == 0
