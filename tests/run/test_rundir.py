"""Run directories: made, resumed, and refused without touching anything."""

import json

import pytest

from r1s_jax.run.rundir import open_run_dir, write_json_atomic
from r1s_jax.types import UserError

TEXT = "from r1s_jax.run import config\n\n# Run:\nconfig.Run.lr = 0.1\nconfig.Run.seed = 1\n"


def contents(path):
    return {p.name: p.read_bytes() if p.is_file() else None for p in path.rglob("*")}


def test_layout_and_resume(tmp_path):
    run = open_run_dir(tmp_path / "runs" / "a", TEXT)
    assert not run.resumed and run.config.read_text() == TEXT
    folders = {"tensorboard", "trajectories", "checkpoints", "hf"}
    assert {p.name for p in run.path.iterdir()} == {"config.gin", *folders}
    assert (run.metrics.name, run.summary.name) == ("metrics.jsonl", "summary.json")
    run.metrics.write_text("{}\n")
    again = open_run_dir(run.path, "# other comments do not matter\n" + TEXT)
    assert again.resumed and again.metrics.read_text() == "{}\n"
    assert again.config.read_text() == TEXT


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            TEXT.replace("lr = 0.1", "lr = 0.2"),
            "config.Run.lr is 0.1 in this run directory and 0",
        ),
        (TEXT + "config.Run.n = 'a = b'\n", "config.Run.n is not set in this run directory and 'a"),
        (
            TEXT.replace("config.Run.seed = 1\n", ""),
            "config.Run.seed is 1 in this run directory",
        ),
    ],
)
def test_another_config_is_one_line_and_nothing_is_touched(tmp_path, text, words):
    open_run_dir(tmp_path, TEXT).metrics.write_text('{"step": 0}\n')
    before = contents(tmp_path)
    with pytest.raises(UserError) as caught:
        open_run_dir(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/config.gin: ") and "\n" not in message
    assert words in message
    assert contents(tmp_path) == before


def test_a_config_that_came_to_nothing_is_replaced(tmp_path):
    """A first start that failed must not refuse the corrected configuration."""
    open_run_dir(tmp_path, TEXT)
    corrected = TEXT.replace("lr = 0.1", "lr = 0.2")
    assert open_run_dir(tmp_path, corrected).config.read_text() == corrected


def test_other_folders_and_files_are_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"no run directory: has thesis\.tex, lacks config\.gin"):
        open_run_dir(tmp_path, TEXT)
    assert contents(tmp_path) == {"thesis.tex": b"x"}
    with pytest.raises(UserError, match="is a file"):
        open_run_dir(tmp_path / "thesis.tex", TEXT)
    (tmp_path / "empty").mkdir()
    assert not open_run_dir(tmp_path / "empty", TEXT).resumed


def test_json_is_replaced_at_once(tmp_path):
    path = tmp_path / "summary.json"
    write_json_atomic(path, {"em": 0.5, "name": "Rīga"})
    with pytest.raises(ValueError):
        write_json_atomic(path, {"em": float("nan")})
    assert json.loads(path.read_text()) == {"em": 0.5, "name": "Rīga"}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_a_path_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "run", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match="cannot be made: ") as error:
            open_run_dir(path, TEXT)
        assert "\n" not in str(error.value)
