"""evaluate.py's options: what goes together, and what is refused in one line."""

import json
import os
import subprocess
import sys

import pytest

import launch
from r1s_jax.evaluation.endpoint import MODES
from r1s_jax.run.evaluate import BASELINES, CONTROLS
from r1s_jax.types import UserError
from tests.evaluation.openai_stub import reply
from tests.faulty_server import serving
from tests.worlds import write_index

SCRIPT = launch.ROOT / "tpu_scripts" / "evaluate.py"
ROW = {
    "question": "w1?", "answer": "ab", "pred_ans": "ab",
    "stop_reason_final": "finished", "gen_text_store": "<answer>ab</answer>",
}  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "answers.jsonl").write_text(json.dumps(ROW) + "\n")
    return tmp_path


@pytest.fixture
def run(here, monkeypatch):
    """Runs the script's main in this process."""
    import evaluate

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, args)])
        return evaluate.main()

    return call


def test_modes_are_those_of_the_library():
    import evaluate

    assert set(evaluate.MODES) == {"search", *BASELINES, *CONTROLS}
    assert set(evaluate.OPEN) == set(MODES)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("", "give either --run_dir RUN or --config NAME"),
        ("--score no.jsonl", "no.jsonl: no such file of results"),
        ("--score answers.jsonl --config tiny", "--score goes without --config"),
        ("--score answers.jsonl --mode search", "--score goes without --mode"),
        ("--score answers.jsonl --out answers.jsonl", "--out answers.jsonl: is a file"),
        ("--score answers.jsonl --judge_model m", "--judge_model m: --judge is missing"),
        ("--score answers.jsonl --judge http://x", "--judge http://x: --judge_model is missing"),
        ("--score answers.jsonl --judge x --judge_model m", "'x', must begin with http"),
        ("--config tiny --judge_tokens many", "--judge_tokens: invalid int value: 'many'"),
        ("--config tiny --model m", "--model: --endpoint is missing"),
        ("--config tiny --against b.jsonl", "--against: --score is missing"),
        ("--score a.jsonl --preset meshes/one", "--score goes without --gin and --preset"),
        ("--score a.jsonl --against b.jsonl --out o", "--against goes without --out"),
        ("--config tiny --endpoint http://x", "--endpoint http://x: --model is missing"),
        ("--config tiny --endpoint x --model m", "'x', must begin with http"),
        ("--endpoint http://x --model m", "--config NAME is missing"),
        ("--endpoint http://x --model m --run_dir r", "--endpoint goes without --run_dir"),
        ("--config tiny --endpoint http://x --model m --mode forced", "--mode forced: an endpoint"),
        ("--config tiny --endpoint http://x --model m --out answers.jsonl", "is a file"),
        ("--config tiny --out answers.jsonl", "--out answers.jsonl: is a file"),
        ("--config none", "--config none: no such file"),
        ("--config tiny --mode best", "--mode: invalid choice: 'best'"),
    ],
)
def test_refused_in_one_line(run, here, args, said):
    with pytest.raises(UserError) as caught:
        run(*args.split())
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert [p.name for p in here.iterdir()] == ["answers.jsonl"]


def test_all_modes_of_an_endpoint_and_where_they_are_written(run, here, capsys):
    """Bug: the default folder was `runs-tiny_lab-m`, and `all` asked an endpoint for controls."""
    write_index(here / "corpus", dim=6)
    (here / "q.jsonl").write_text('{"question": "w1?", "answer": "ab"}\n{\n')
    world = {"eval_questions": "q.jsonl", "corpus": "corpus"}
    gin = [f"--gin=run.WorldConfig.{name} = '{here / value}'" for name, value in world.items()]
    with serving(reply("</think><answer>ab</answer>")) as server:
        named = ["--endpoint", f"{server.url}/v1", "--model", "lab/m", "--skip_bad"]
        run("--config", "tiny", *gin, *named, "--mode", "all")
        run("--config", "tiny", *gin, *named, "--mode", "search", "closed_book", "--out", "two")
    said = capsys.readouterr().out
    assert "answers, figures and table: runs/tiny_lab-m\n" in said
    names = {p.name for p in (here / "runs" / "tiny_lab-m").glob("*.json")}
    assert names == {f"eval_{mode}.json" for mode in MODES}
    assert len(list((here / "two").glob("*.json"))) == 2
    assert said.count("bad lines left out: 1") == 2


def script(*args, **options):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, args)], capture_output=True, text=True, **options
    )


def test_a_folder_instead_of_a_file(here):
    """Bug: a stack trace."""
    done = script("--score", here)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"error: {here}: Is a directory\n"


@pytest.mark.parametrize(
    ("body", "code", "error"),
    [
        ("print('x' * 1_000_000)", 141, ""),  # fails where it is written
        ("print('x')", 141, ""),  # kept until the end
        ("print('x'); raise launch.UserError('no')", 2, "error: no\n"),
        ("print('x'); return 75", 75, ""),
    ],
)
def test_a_reader_that_leaves(body, code, error):
    """Bug: `evaluate.py --score FILE | head` ended with a stack trace or a complaint."""
    source = f"""
import sys, time
sys.path.insert(0, {str(SCRIPT.parent)!r})
import launch
def main():
    time.sleep(0.1)
    {body}
launch.run_main(main)
"""
    command = '"$0" -c "$1" | true; echo ${PIPESTATUS[0]}'
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, source], env=env, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == (f"{code}\n", error)


def test_any_other_broken_pipe_is_a_bug():
    source = f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import launch
def main():
    raise BrokenPipeError(32, "Broken pipe")
launch.run_main(main)
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr
