"""A run whose policy is an id of the hub: what is asked of the hub, and when."""

import json
import pathlib
import subprocess
import sys

import pytest

import launch
from r1s_jax.run.paths import REPOSITORY
from tests.hub_stub import TOKEN, HubStub, environment

CHECK = """
import json, os, pathlib, sys
import launch
from r1s_jax.run.setup import check_inputs
from r1s_jax.types import UserError
for bindings, checkpoint in json.load(sys.stdin):
    config = launch.load_config("tiny", bindings).value
    try:
        found = str(check_inputs(config, checkpoint and pathlib.Path(checkpoint)).checkpoint)
    except UserError as error:
        found = str(error)
    weights = list(pathlib.Path(os.environ["HF_HOME"]).rglob("*.safetensors"))
    print(json.dumps([found, len(weights)]), flush=True)
"""
POLICY = 'run.PolicyConfig.checkpoint = "lab/policy"'
WRONG = 'run.WorldConfig.eval_questions = "atlas:none"'


@pytest.mark.slow
def test_weights_are_fetched_when_all_else_is_right_and_a_folder_wins(tmp_path):
    base = REPOSITORY / "configs" / "models" / "tiny_base"
    scripts = pathlib.Path(launch.__file__).parent
    (tmp_path / "lab" / "folder").mkdir(parents=True)
    with HubStub() as hub:
        files = {path.name: path.read_bytes() for path in base.iterdir()}
        hub.add("lab/policy", files)
        more = {"HF_TOKEN": TOKEN, "PYTHONPATH": str(scripts)}
        done = subprocess.run(
            [sys.executable, "-c", CHECK],
            input=json.dumps(
                [
                    ([POLICY, WRONG], None),
                    ([POLICY], None),
                    ([], "lab/policy"),
                    ([], "lab/nothing"),
                    ([POLICY.replace('policy"', 'folder"')], None),
                ]
            ),
            cwd=tmp_path,
            env=environment(tmp_path / "home", hub.url, **more),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        asked = {r.path.split("/revision")[0] for r in hub.asked("GET", "/api/models/lab/")}
    results = [json.loads(line) for line in done.stdout.splitlines()]
    (refused, before), (found, after), (given, _), (nothing, _), (folder, _) = results
    assert refused.startswith("world.eval_questions = 'atlas:none'") and before == 0
    assert pathlib.Path(found).name == hub.repositories["lab/policy"].commits[0].sha and after == 1
    assert given == found
    assert nothing.startswith(
        "--checkpoint lab/nothing: no such folder, and on the hub lab/nothing: no"
    )
    assert folder.startswith("policy.checkpoint = 'lab/folder': no config.json there; ")
    assert not [path for path in asked if "lab/folder" in path]
