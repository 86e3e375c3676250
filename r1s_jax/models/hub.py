"""The Hugging Face hub: models fetched by their id, exports pushed to it.

Offline mode, tokens, the cache and the endpoint are left to the library, so its variables hold here
too: HF_HUB_OFFLINE, HF_TOKEN (or `hf auth login`), HF_HOME, HF_ENDPOINT.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from r1s_jax.models.weights import INDEX, SINGLE
from r1s_jax.types import UserError

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_LONGEST = 96  # of either part of an id
_TEXTS = ("*.json", "*.jinja", "merges.txt", "vocab.txt", "LICENSE*", "NOTICE*", "USE_POLICY.md")
_WEIGHTS = "*.safetensors"
# Other copies of the weights and what belongs to them; `*` stands for slashes as well.
_NEVER = ("original/*", "onnx/*", "openvino/*", "consolidated*", "*/*.safetensors*")
# What an earlier push may have left that a reader would take for a part of this one.
_REPLACED = (
    *(SINGLE, "model-?????-of-?????.safetensors", INDEX),
    *("chat_template.*", "added_tokens.json", "special_tokens_map.json"),
    *("vocab.json", "merges.txt"),
    *("config.json", "generation_config.json", "adapter_*"),
)
_TOKEN = "HF_TOKEN (or log in with `hf auth login`)"


def is_repo_id(name: str) -> bool:
    """Whether `name` can be a model's id on the hub: OWNER/NAME. Some paths look the same."""
    return (
        re.fullmatch(f"{_PART}/{_PART}", name) is not None
        and max(map(len, name.split("/"))) <= _LONGEST
        and "--" not in name
        and ".." not in name
        and not name.endswith(".git")
    )


def locate(name: str | Path) -> Path:
    """The folder of a model: `name` itself if it exists, else what the hub has under that id.

    A name that is no id either is returned as it is. Raises what `fetch` raises.
    """
    folder = Path(name)
    return fetch(str(name)) if not folder.exists() and is_repo_id(str(name)) else folder


def fetch(repo_id: str, *, revision: str | None = None, weights: bool = True) -> Path:
    """The folder of the model in the hub's cache; what is not there yet is downloaded.

    That is configuration, tokenizer, templates, licence and, with `weights`, the safetensors at the
    top. The folder is a snapshot, named after its commit, and not to be written to.

    Raises:
        UserError: one line with the id, what is wrong, and what to do.
    """
    _require_id(repo_id)
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **{**options, "disable": True})

    try:
        folder = Path(
            snapshot_download(
                repo_id,
                revision=revision,
                allow_patterns=[*_TEXTS, *([_WEIGHTS] if weights else [])],
                ignore_patterns=[*_NEVER, *([] if weights else ["*.safetensors.index.json"])],
                tqdm_class=None if weights else Silent,  # small files need no bar
            )
        )
    except Exception as e:  # the library's, its HTTP client's and the system's have no common class
        raise UserError(f"{repo_id}: {_why(e, repo_id, revision=revision)}") from e
    for wanted in ("config.json", _WEIGHTS) if weights else ("config.json",):
        if not any(folder.glob(wanted)):
            if constants.HF_HUB_OFFLINE:  # offline, an incomplete snapshot may pass for a whole one
                raise UserError(f"{repo_id}: {_not_cached(repo_id)}")
            raise UserError(f"{repo_id}: has no {wanted} at its top; choose another model")
    return folder


def check_push(repo_id: str) -> None:
    """Refuses what would keep `push` from starting; asks the machine only, not the network.

    Raises:
        UserError: the id, offline mode, or that there is no token.
    """
    _require_id(repo_id)
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{repo_id}: HF_HUB_OFFLINE is set; unset it to push")
    if get_token() is None:
        raise UserError(f"{repo_id}: no token to push with; set {_TOKEN}")


def push(folder: str | Path, repo_id: str, *, message: str) -> str:
    """Uploads a checkpoint as one commit; returns the repository's address.

    A repository that does not exist yet is made, private: its owner publishes it with a click.
    Weights of an earlier push that this one does not overwrite are removed by the same commit.

    Raises:
        UserError: one line: the folder is no whole checkpoint, see `check_push`, or what the hub
            or the network says.
    """
    _require_whole(Path(folder))
    check_push(repo_id)
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(repo_id, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=str(folder),
            commit_message=message,
            delete_patterns=list(_REPLACED),
        )
    except Exception as e:
        raise UserError(f"{repo_id}: {_why(e, repo_id, pushing=True)}") from e
    return str(url)


def _require_id(repo_id: str) -> None:
    if not is_repo_id(repo_id):
        raise UserError(
            f"{repo_id!r} is no id of the hub: it must be OWNER/NAME, each of letters, digits, "
            "'-', '_' and '.'"
        )


def _require_whole(folder: Path) -> None:
    """Raises UserError where the folder lacks its configuration or (a part of) its weights."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: holds no config.json, so it is no checkpoint to push")
    index = folder / INDEX
    if not index.is_file():
        if not any(folder.glob(_WEIGHTS)):
            raise UserError(f"{folder}: holds no *.safetensors, so it is no checkpoint to push")
        return
    try:
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{index}: not an index of weights: {type(e).__name__}: {e}") from e
    if missing := sorted(name for name in named if not (folder / name).is_file()):
        raise UserError(f"{folder}: lacks {missing[0]}, which {index.name} names")


def _not_cached(repo_id: str) -> str:
    return (
        "not, or not wholly, in the local cache, and HF_HUB_OFFLINE is set; where there is a "
        f"network: hf download {repo_id}"
    )


def _why(
    error: BaseException, repo_id: str, *, revision: str | None = None, pushing: bool = False
) -> str:
    """What is wrong and what to do, in words without a line break."""
    reasons = (_reason(e, repo_id, revision, pushing) for e in _chain(error))
    said = next(filter(None, reasons), None)
    return said or f"{type(error).__name__}: {_short(error)}"


def _reason(error: BaseException, repo_id: str, revision: str | None, pushing: bool) -> str | None:
    """The same for one error of a chain; None where it does not tell."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return _not_cached(repo_id)
    if isinstance(error, errors.GatedRepoError):
        return (
            f"gated; accept its licence at {constants.ENDPOINT}/{repo_id} and set {_TOKEN} to a "
            "token of that account"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"has no revision {revision!r}; give a branch, a tag or a commit of it"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if pushing and status in (401, 403):
            return f"the hub refuses the token ({status}); set {_TOKEN} to one that may write there"
        if isinstance(error, errors.RepositoryNotFoundError):
            return (
                f"no such repository at {constants.ENDPOINT}, or a private one; check the id, and "
                f"if it is private, set {_TOKEN}"
            )
        if status in (401, 403):
            return f"the hub refuses the token ({status}); set {_TOKEN} to a valid one, or unset it"
        said = " ".join((error.server_message or "").split())[:200]
        return f"the hub answers {status}{': ' if said else ''}{said}; try again later"
    if isinstance(error, errors.HTTPError):  # the HTTP client's: no answer at all
        cached = "" if pushing else "; what `hf download` has cached is found without a network"
        return f"{constants.ENDPOINT} cannot be reached ({_short(error)}){cached}"
    if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
        what = "read" if pushing else "written"
        where = error.filename or constants.HF_HUB_CACHE
        cure = "" if pushing else "; make room, or choose another folder with HF_HOME"
        return f"{where} cannot be {what}: {error.strerror}{cure}"
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what caused it, outermost first."""
    seen: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in seen:
        yield at
        seen.append(at)
        at = at.__cause__ or at.__context__


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
