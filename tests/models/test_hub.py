"""Models from the hub and back to it, against a stand-in for its HTTP interface.

The library reads its environment when it is imported, so each environment is a process of its own;
each makes several calls and prints what came of them.
"""

import json
import pathlib
import re
import resource
import subprocess
import sys

import pytest

from r1s_jax.models import hub
from r1s_jax.types import UserError
from tests.hub_stub import TOKEN, HubStub, environment

CLIENT = """
import json, resource, sys
from r1s_jax.models import hub
from r1s_jax.types import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
for name, arguments in json.load(sys.stdin):
    try:
        print(json.dumps({"ok": str(getattr(hub, name)(**arguments))}), flush=True)
    except UserError as error:
        print(json.dumps({"error": str(error)}), flush=True)
"""
TEXTS = {
    "config.json": b"{}",
    "generation_config.json": b"{ }",
    "tokenizer.json": b"[1]",
    "tokenizer_config.json": b"[2]",
    "chat_template.jinja": b"{{ messages }}",
    "merges.txt": b"a b",
    "vocab.txt": b"a",
    "LICENSE": b"terms",
    "USE_POLICY.md": b"more terms",
    "modules.json": b"[]",
    "1_Pooling/config.json": b"{}  ",
}
WEIGHTS = {
    "model-00001-of-00002.safetensors": b"first half" * 1000,
    "model-00002-of-00002.safetensors": b"second half" * 1000,
    "model.safetensors.index.json": b'{"weight_map": {}}',
}
OTHERS = {
    "README.md": b"# model",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"all",
    "original/params.json": b"{}",
    "original/consolidated.00.pth": b"pickle",
    "onnx/config.json": b"{}",
    "onnx/model.safetensors": b"onnx",
    "variant/model.safetensors": b"another",
    "variant/model.safetensors.index.json": b"{}",
    "tokenizer.model": b"sentencepiece",
}


def calls(env, *wanted, longest_file=resource.RLIM_INFINITY):
    """Makes the calls in one process with this environment; their results, in order."""
    env = {**env, "PYTHONPATH": str(pathlib.Path(hub.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, str(longest_file)],
        input=json.dumps(wanted),
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def fetch(repo_id, **more):
    return "fetch", {"repo_id": repo_id, **more}


def push(folder, repo_id, message="step 3"):
    return "push", {"folder": str(folder), "repo_id": repo_id, "message": message}


def contents(folder):
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def written(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def lines(results):
    """The errors, each of one line that begins with the id."""
    errors = [result.get("error", "none") for result in results]
    assert not [error for error in errors if "\n" in error]
    return errors


@pytest.fixture(scope="module")
def stub():
    with HubStub() as stub:
        stub.add("lab/model", {**TEXTS, **WEIGHTS, **OTHERS})
        stub.add("lab/private", {**TEXTS, **WEIGHTS}, private=True)
        stub.add("lab/gated", {**TEXTS, **WEIGHTS}, gated=True)
        stub.add("lab/pickles", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
        stub.add("lab/words", {"README.md": b"only words", "tokenizer.json": b"[]"})
        yield stub


@pytest.fixture(scope="module")
def fetched(stub, tmp_path_factory):
    """(the hub's home, results) of what a process with a token asks for."""
    home = tmp_path_factory.mktemp("home")
    wanted = [
        fetch("lab/model", weights=False),
        fetch("lab/model"),
        fetch("lab/private", weights=False),
        fetch("lab/gated"),
        fetch("lab/nothing"),
        fetch("lab/model", revision="v7"),
        fetch("lab/pickles"),
        fetch("lab/words"),
        fetch("lab/model", revision=stub.repositories["lab/model"].commits[0].sha),
    ]
    return home, calls(environment(home, stub.url, HF_TOKEN=TOKEN), *wanted)


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("Qwen/Qwen2.5-7B", True),
        ("meta-llama/Llama-3.1-8B-Instruct", True),
        ("a/b", True),
        ("_a/b_", True),
        ("models/Qwen2.5-7B", True),  # a path as well: a folder that exists wins
        ("gpt2", False),
        ("a/b/c", False),
        ("/a/b", False),
        ("/b", False),
        ("a/", False),
        ("./model", False),
        ("../model", False),
        ("~/model", False),
        ("~me/model", False),
        ("a b/c", False),
        ("a/b\n", False),
        ("a/b.", False),
        ("-a/b", False),
        ("a--b/c", False),
        ("a/b..c", False),
        ("a/b.git", False),
        ("ä/b", False),
        ("a/" + "b" * 97, False),
        ("", False),
    ],
)
def test_what_can_be_an_id(name, is_one):
    assert hub.is_repo_id(name) == is_one
    if is_one:  # the library's own check takes it
        from huggingface_hub.utils import validate_repo_id

        validate_repo_id(name)


def test_fetches_what_is_needed_and_no_more(stub, fetched):
    home, (texts, whole, private, *_, pinned) = fetched
    snapshots = home / "hub" / "models--lab--model" / "snapshots"
    (folder,) = snapshots.iterdir()
    assert texts["ok"] == whole["ok"] == pinned["ok"] == str(folder)
    assert folder.name == stub.repositories["lab/model"].commits[0].sha
    assert contents(folder) == TEXTS | WEIGHTS
    for name in OTHERS:
        assert not stub.asked("GET", f"/lab/model/resolve/{folder.name}/{name}")
    private = home / "hub" / "models--lab--private" / "snapshots"
    (folder,) = private.iterdir()
    assert contents(folder) == TEXTS  # weights were not asked for


def test_the_token_goes_to_the_hub_and_nowhere_else(stub, fetched):
    downloads = [r for r in stub.requests if "/resolve/" in r.path]
    assert {r.authorization for r in downloads} == {f"Bearer {TOKEN}"}
    stored = stub.asked("GET", "/store/")
    assert len(stored) == 2 and {r.authorization for r in stored} == {None}


def test_what_the_hub_has_not_is_told_in_one_line(stub, fetched):
    *_, gated, nothing, revision, pickles, words, _ = lines(fetched[1])
    assert re.match(
        f"lab/gated: gated; accept its licence at {stub.url}/lab/gated .*HF_TOKEN", gated
    )
    assert re.match("lab/nothing: no such repository at .* private .*HF_TOKEN", nothing)
    assert re.match("lab/model: has no revision 'v7'; give a branch, a tag or a commit", revision)
    assert pickles == "lab/pickles: has no *.safetensors at its top; choose another model"
    assert words == "lab/words: has no config.json at its top; choose another model"


def test_offline_the_cache_serves_and_what_it_lacks_is_named(stub, fetched):
    home, (_, whole, *_) = fetched
    asked = len(stub.requests)
    same, private, missing, pushed = calls(
        environment(home, stub.url, HF_TOKEN=TOKEN, HF_HUB_OFFLINE="1"),
        fetch("lab/model"),
        fetch("lab/private"),  # its weights have not been fetched
        fetch("lab/other"),
        push(whole["ok"], "me/model"),
    )
    assert same == whole
    for name, result in (("lab/private", private), ("lab/other", missing)):
        (line,) = lines([result])
        assert line.startswith(
            f"{name}: not, or not wholly, in the local cache, and HF_HUB_OFFLINE"
        )
        assert line.endswith(f"hf download {name}")
    assert lines([pushed]) == ["me/model: HF_HUB_OFFLINE is set; unset it to push"]
    assert len(stub.requests) == asked


def test_without_a_token_and_with_a_wrong_one(stub, tmp_path):
    folder = written(tmp_path / "export", {"config.json": b"{}", "model.safetensors": b"w"})
    wanted = (fetch("lab/private"), fetch("lab/gated"), push(folder, "me/unborn"))
    private, gated, unborn = lines(calls(environment(tmp_path / "home", stub.url), *wanted))
    assert private.startswith("lab/private: no such repository at") and "private" in private
    assert gated.startswith("lab/gated: gated; accept its licence")
    assert unborn.startswith("me/unborn: no token to push with; set HF_TOKEN")
    wrong = environment(tmp_path / "home", stub.url, HF_TOKEN="hf_wrong")
    read, _, write = lines(calls(wrong, *wanted))
    assert re.match(r"lab/private: the hub refuses the token \(401\); set HF_TOKEN", read)
    assert re.match(r"me/unborn: the hub refuses the token \(401\); set HF_TOKEN .*write", write)
    assert "me/unborn" not in stub.repositories


def test_a_dead_endpoint(fetched, tmp_path):
    with HubStub() as gone:
        pass
    home, (_, whole, *_) = fetched
    env = environment(home, gone.url, HF_TOKEN=TOKEN, HF_HUB_CACHE=str(tmp_path / "cache"))
    folder = written(tmp_path / "export", {"config.json": b"{}", "model.safetensors": b"w"})
    read, write = lines(calls(env, fetch("lab/model"), push(folder, "me/model")))
    for line in (read, write):
        assert re.match(rf"\w+/model: {gone.url} cannot be reached \(", line)
    assert "hf download" in read
    assert calls(environment(home, gone.url), fetch("lab/model")) == [whole]  # cached


@pytest.mark.slow
def test_a_cache_that_cannot_be_written(stub, tmp_path):
    (tmp_path / "file").write_text("in the way")
    (line,) = lines(calls(environment(tmp_path / "file", stub.url), fetch("lab/model")))
    assert re.match(r"lab/model: .*file.* cannot be written: .*; .*HF_HOME", line)
    env = environment(tmp_path / "home", stub.url)  # and no room for the weights
    texts, weights = calls(
        env, fetch("lab/model", weights=False), fetch("lab/model"), longest_file=5000
    )
    assert "ok" in texts
    (line,) = lines([weights])
    cache = re.escape(str(tmp_path / "home" / "hub"))
    assert re.match(f"lab/model: {cache} cannot be written: File too large; make room, or", line)


def test_push_and_push_again(stub, tmp_path):
    sharded = written(tmp_path / "sharded", {**TEXTS, **WEIGHTS, "README.md": b"---\na: 1\n---\n"})
    single = written(
        tmp_path / "single", {**TEXTS, "config.json": b"{2}", "model.safetensors": b"w" * 5000}
    )
    home = tmp_path / "home"
    first, again, foreign, back = calls(
        environment(home, stub.url, HF_TOKEN=TOKEN),
        push(sharded, "me/model", "step 3"),
        push(single, "me/model", "step 6"),
        push(single, "lab/model"),
        fetch("me/model"),
    )
    assert first == again == {"ok": f"{stub.url}/me/model"}
    repository = stub.repositories["me/model"]
    assert repository.private
    made, commit, last = repository.commits
    assert (commit.message, last.message) == ("step 3", "step 6")
    assert commit.files == {**made.files, **contents(sharded)}
    # Had the shards of the first push stayed, readers would take them for the second's.
    kept = {"README.md": (sharded / "README.md").read_bytes()}
    assert last.files == {**made.files, **kept, **contents(single)}
    assert {r.authorization for r in stub.asked("PUT", "/store/")} == {None}
    (line,) = lines([foreign])
    assert re.match(r"lab/model: the hub refuses the token \(403\); set HF_TOKEN .*write", line)
    assert len(stub.repositories["lab/model"].commits) == 1
    (folder,) = (home / "hub" / "models--me--model" / "snapshots").iterdir()
    assert back["ok"] == str(folder) and contents(folder) == contents(single)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"model.safetensors": b"w"}, "holds no config.json"),
        ({"config.json": b"{}"}, "holds no *.safetensors"),
        (
            {"model.safetensors.index.json": b'{"weight_map": {"a": "b.safetensors"}}'},
            "lacks b.saf",
        ),
        ({"model.safetensors.index.json": b"{"}, "not an index of weights: JSONDecodeError"),
        ({"model.safetensors.index.json": b"[]"}, "not an index of weights: TypeError"),
    ],
)
def test_only_a_whole_checkpoint_is_pushed(tmp_path, files, words):
    written(tmp_path, {**({"config.json": b"{}"} if "index" in str(files) else {}), **files})
    with pytest.raises(UserError) as caught:
        hub.push(tmp_path, "me/model", message="m")
    assert str(caught.value).startswith(str(tmp_path)) and words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["gpt2", "a/b/c", "../model", ""])
def test_no_id_is_refused_without_asking_anyone(name):
    for refuse in (hub.fetch, hub.check_push):
        with pytest.raises(UserError, match="no id of the hub: it must be OWNER/NAME"):
            refuse(name)


def test_a_folder_wins_over_an_id(tmp_path, monkeypatch):
    """Offline and with an empty cache only what is on disk is found."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^lab/model: not, or not wholly, in the local cache"):
        hub.locate("lab/model")
    (tmp_path / "lab" / "model").mkdir(parents=True)
    assert hub.locate("lab/model") == pathlib.Path("lab/model")
    assert hub.locate(tmp_path / "nowhere") == tmp_path / "nowhere"
