"""The launcher: configurations built from gin files, one-line errors, exit codes."""

import os
import pathlib
import subprocess
import sys

import pytest

import launch
from r1s_jax.types import UserError
from tests import standin_config as standin

HEAD = "from __gin__ import dynamic_registration\nfrom tests import standin_config as c\n"
PRESET = HEAD + "c.Stage.learning_rate = %LR\nLR = 0.5\n"
MAIN = (
    HEAD
    + """
include 'presets/quick.gin'

c.Run:
    seed = 7
    stages = (@one/c.Stage(), @two/c.Stage())
one/c.Stage.data = @c.Data()
two/c.Stage.data = @two/c.Data()
two/c.Stage.reward = 'f1'
c.Data.path = 'a.jsonl'
two/c.Data.path = 'b.jsonl'
"""
)


@pytest.fixture
def load(tmp_path):
    def loader(*bindings, extra="", name="main", text=MAIN):
        (tmp_path / "presets").mkdir(exist_ok=True)
        (tmp_path / "presets" / "quick.gin").write_text(PRESET)
        (tmp_path / "main.gin").write_text(text + extra)
        (tmp_path / "other.gin").write_text(MAIN)
        return launch.load_config(name, bindings, configs=tmp_path, top=standin.Run)

    return loader


def test_builds_plain_dataclasses_with_includes_scopes_and_macros(load):
    run = load().value
    assert type(run) is standin.Run
    assert run == standin.Run(
        seed=7,
        stages=(
            standin.Stage(data=standin.Data(path="a.jsonl"), learning_rate=0.5),
            standin.Stage(data=standin.Data(path="b.jsonl"), reward="f1", learning_rate=0.5),
        ),
    )


def test_bindings_of_the_command_line_win(load):
    run = load("c.Run.seed = 9", "LR = 0.25", "two/c.Data.limit = 3").value
    assert run.seed == 9
    assert [stage.learning_rate for stage in run.stages] == [0.25, 0.25]
    assert [stage.data.limit for stage in run.stages] == [None, 3]


def test_text_holds_defaults_and_loads_to_the_same(load):
    first = load("c.Run.seed = 9")
    assert "Run.seed = 9\n" in first.text
    assert "Run.save = True\n" in first.text  # a default
    again = launch.load_text(first.text, "run/config.gin", top=standin.Run)
    assert (again.value, again.text) == (first.value, first.text)


def test_text_does_not_depend_on_order_or_overrides(load):
    moved = HEAD + "".join(
        line
        for line in (
            "two/c.Data.path = 'b.jsonl'\nc.Data.path = 'a.jsonl'\nLR = 3.0\nLR = 0.5\n",
            "two/c.Stage.reward = 'f1'\ntwo/c.Stage.data = @two/c.Data()\n",
            "one/c.Stage.data = @c.Data()\nc.Run.stages = (@one/c.Stage(), @two/c.Stage())\n",
            "c.Run.seed = 7\nc.Stage.learning_rate = %LR\n",
        )
    )
    assert load(text=moved).text == load().text


LINE = MAIN.count("\n") + 1


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("c.Run.sed = 1", ["sed"]),
        ("c.Rum.seed = 1", ["Rum"]),
        ("d.Run.seed = 1", ["'d'", "import"]),
        ("import r1s_jax.nothing", ["r1s_jax.nothing"]),
        ("include 'presets/none.gin'", ["presets/none.gin"]),
        ("c.Run.seed =", ["Unable to parse"]),
        ("c.Run.seed = 1 2", ["newline"]),
        ("c.Run.seed = '1'", ["Run.seed", "int", "'1'", "str"]),
        ("c.Run.seed = True", ["Run.seed", "int", "True", "bool"]),
        ("c.Run.save = 1", ["Run.save", "bool", "int"]),
        ("c.Run.mesh = (1, 2)", ["Run.mesh", "(1, 2)"]),
        ("c.Run.stages = [@one/c.Stage()]", ["tuple", "list"]),
        ("c.Run.stages = (@c.Data(),)", ["Run.stages", "@c.Data()"]),
        ("c.Stage.reward = 'f2'", ["Stage.reward", "'f1'", "'f2'"]),
        ("c.Stage.learning_rate = %LLR", ["%LLR"]),
        ("tow/c.Stage.reward = 'f1'", ["@tow/"]),
    ],
)
def test_mistakes_are_one_line_with_file_and_line(load, extra, words):
    with pytest.raises(UserError) as caught:
        load(extra=extra + "\n")
    message = str(caught.value)
    assert "\n" not in message
    assert f"main.gin:{LINE}: " in message
    for word in words:
        assert word in message


def test_mistake_in_an_included_file_names_that_file(load, tmp_path):
    load()
    (tmp_path / "presets" / "bad.gin").write_text(HEAD + "\nc.Data.pth = 'x'\n")
    with pytest.raises(UserError, match=r"presets/bad\.gin:4: .*pth"):
        load(extra="include 'presets/bad.gin'\n")


def test_missing_value_and_refused_value_name_class_and_file(load):
    with pytest.raises(UserError, match=r"main\.gin: Run needs a value for 'seed'$"):
        load(text=MAIN.replace("    seed = 7\n", ""))
    with pytest.raises(UserError, match=r"main\.gin: Data needs a value for 'path' \(in scope one"):
        load(text=MAIN.replace("c.Data.path = 'a.jsonl'\n", "", 1))
    with pytest.raises(UserError, match=r"main\.gin: Run: seed must not be negative, got -1$"):
        load("c.Run.seed = -1")


@pytest.mark.parametrize(
    ("binding", "words"),
    [
        ("c.Run.sed = 1", ["sed"]),
        ("c.Run.seed 1", ["--gin"]),
        ("c.Run.seed = 1.5", ["int", "1.5", "float"]),
        ("nothing.learning_rate = 1", ["nothing"]),
        ("c.Data.path = data/mine", ["data is no value; texts need quotes"]),
    ],
)
def test_mistake_on_the_command_line_quotes_the_binding(load, binding, words):
    with pytest.raises(UserError) as caught:
        load(binding)
    message = str(caught.value)
    assert message.startswith(f"--gin {binding!r}: ") and "\n" not in message
    for word in words:
        assert word in message


def test_binding_without_effect_is_refused(load):
    text = HEAD + "c.Run.seed = 1\nc.Run.stages = ()\n"
    with pytest.raises(UserError, match=r"nothing in .*main\.gin uses Data\.path"):
        load("c.Data.path = 'x'", text=text)
    with pytest.raises(UserError, match=r"nothing in .*main\.gin uses LRR"):
        load("LRR = 1")


def test_includes_come_from_the_configs_folder_quietly(load, tmp_path, monkeypatch, caplog):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "presets").mkdir(parents=True)
    (elsewhere / "presets" / "quick.gin").write_text(HEAD + "LR = 8.0\n")
    monkeypatch.chdir(elsewhere)
    assert load().value.stages[0].learning_rate == 0.5
    assert not caplog.records


def test_unknown_config_lists_the_names(load):
    with pytest.raises(UserError, match=r"--config mian: .*there are: main, other"):
        load(name="mian")
    with pytest.raises(UserError, match=r"--config NAME is missing"):
        load(name=None)


def test_command_line():
    args = launch.parse_args("x", ["--config", "a", "--gin", "b.c = 1", "--gin", "d.e = 2"])
    assert (args.config, args.run_dir, args.gin) == ("a", None, ["b.c = 1", "d.e = 2"])
    with pytest.raises(UserError, match="--confg"):
        launch.parse_args("x", ["--confg", "a"])


SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
import launch
from r1s_jax.types import UserError

def main():
    assert "jax" not in sys.modules
    import jax
    print(jax.config.jax_compilation_cache_dir)
    {body}

launch.run_main(main)
"""


@pytest.mark.parametrize(
    ("body", "code", "error"),
    [
        ("pass", 0, ""),
        ("return 75", 75, ""),
        ("raise UserError('no\\n  such file')", 2, "error: no such file\n"),
        ("open('/dev/null/file', 'w')", 2, "error: /dev/null/file: Not a directory\n"),
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
        ("raise ZeroDivisionError", 1, None),
    ],
)
def test_exit_codes_from_any_working_directory(tmp_path, body, code, error):
    folder = str(pathlib.Path(launch.__file__).parent)
    script = SCRIPT.format(folder=folder, body=body)
    env = {**os.environ, "R1S_JAX_CACHE": str(tmp_path)}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    assert done.stdout.strip() == str(tmp_path / "xla")
    if error is not None:
        assert done.stderr == error
    else:
        assert "Traceback" in done.stderr
