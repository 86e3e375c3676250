"""From a configuration to the parts of a run; everything cheap is checked before anything slow."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from r1s_jax.data.atlas import SPLITS
from r1s_jax.data.atlas_builder import cache_directory, load_atlas
from r1s_jax.data.questions import read_questions
from r1s_jax.engine.engine import Engine
from r1s_jax.engine.plan import device_memory, plan_memory, weight_bytes
from r1s_jax.models import hf, hub
from r1s_jax.models.decoder import DecoderConfig
from r1s_jax.protocol.observation import render_documents
from r1s_jax.protocol.prompts import BasePrompt, ChatPrompt, Prompt, tiny_prompt
from r1s_jax.protocol.tokenizer import Tokenizer
from r1s_jax.retrieval.embed import TfidfSvdEmbedder
from r1s_jax.retrieval.index import DenseIndex, check_embedder, load_or_build
from r1s_jax.rl.memory import learner_bytes
from r1s_jax.rollout.episode import STOP_STRINGS
from r1s_jax.run.config import PolicyConfig, RunConfig
from r1s_jax.run.host_memory import keep_freed_memory
from r1s_jax.sharding import check_divisible, lane_mesh, make_mesh
from r1s_jax.types import Question, UserError

REPOSITORY = Path(__file__).resolve().parents[2]
_ATLAS = "atlas"
_TYPICAL_CHARACTERS = 4000
_PIECES, _PIECE_BYTES = 64, 1 << 16  # of each file of weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """What every script needs; the learner is train's own."""

    mesh: Mesh
    model: DecoderConfig
    checkpoint: Path
    tokenizer: Tokenizer
    prompt: Prompt
    train_questions: list[Question]
    eval_questions: list[Question]
    index: DenseIndex
    engine: Engine


def build_parts(
    config: RunConfig, checkpoint: Path | None = None, *, training: bool = True
) -> Parts:
    """Checks, then loads. `checkpoint` replaces the policy's (a run's export, or a hub id).

    Without `training` the training questions are neither asked for nor read. Raises UserError
    naming the file, what it should hold and where it comes from.
    """
    checked = check_inputs(config, checkpoint, training=training)
    mesh = make_mesh(config.mesh)
    if mesh.devices.flat[0].platform == "cpu":
        keep_freed_memory()
    tokenizer = checked.tokenizer
    train_questions, eval_questions, index = _world(config, training)
    engine = Engine(
        checked.model,
        config.engine,
        mesh=mesh,
        token_bytes=tokenizer.token_bytes,
        stop_strings=STOP_STRINGS,
        eos_ids=tokenizer.eos_ids,
        dtype=jnp.dtype(config.dtype),
        reserved_bytes=bytes_beside(config, checked.model, mesh, training=training),
        scale_ids=_typical_ids(checked, index) if config.engine.int8_cache else (),
    )
    return Parts(
        mesh=mesh,
        model=checked.model,
        checkpoint=checked.checkpoint,
        tokenizer=tokenizer,
        prompt=checked.prompt,
        train_questions=train_questions,
        eval_questions=eval_questions,
        index=index,
        engine=engine,
    )


def fingerprints(parts: Parts) -> dict[str, str]:
    """What has to be the same on all hosts that play one run, in a few characters each."""
    return {
        "the policy's weights": policy_fingerprint(parts.checkpoint),
        "the policy's shape": _digest(parts.model),
        "the tokenizer": _digest(parts.tokenizer.token_bytes),
        "the prompt": _digest(parts.prompt.prompt_ids(parts.tokenizer, "")),
        "world.train_questions": _digest(parts.train_questions),
        "world.eval_questions": _digest(parts.eval_questions),
        "world.corpus": parts.index.corpus_hash[:12],
    }


def policy_fingerprint(checkpoint: Path) -> str:
    """Tells two policies apart by pieces from all over their weights' files."""
    pieces = []
    for path in sorted(checkpoint.glob("*.safetensors")):
        last = max(0, path.stat().st_size - _PIECE_BYTES)
        with path.open("rb") as file:
            for i in range(_PIECES):
                file.seek(last * i // (_PIECES - 1))
                pieces.append((path.name, file.read(_PIECE_BYTES)))
    return _digest(pieces)


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def bytes_beside(
    config: RunConfig, model: DecoderConfig, mesh: Mesh, *, training: bool = True
) -> int:
    """What has to stay free on every device beside the engine.

    The learner's peak; without a learner the f32 parameters from which the engine takes its own.
    """
    if training:
        return learner_bytes(model, config.learner, mesh).peak
    return weight_bytes(model, mesh, jnp.float32)


def _typical_ids(checked: Checked, index: DenseIndex) -> list[int]:
    """A prompt and some passages: what the cache will hold, for the scales of its integers."""
    passages = render_documents(index.documents[:3], checked.tokenizer.control_strings)
    prompt = checked.prompt.prompt_ids(checked.tokenizer, "")
    return [*prompt, *checked.tokenizer.encode(passages[:_TYPICAL_CHARACTERS])]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checked:
    """What `check_inputs` has read on its way."""

    model: DecoderConfig
    checkpoint: Path
    tokenizer: Tokenizer
    prompt: Prompt


def check_inputs(
    config: RunConfig, checkpoint: Path | None = None, *, training: bool = True
) -> Checked:
    """Everything that can be wrong with the inputs and is quick to see; writes no run.

    Reads headers, manifests and question files, no weights and no vectors. Scripts call it
    before they make a folder. A policy of the hub is fetched into the hub's cache, its weights
    when all the rest is found right. Raises UserError, one line with file and field.
    """
    folder, model = _require_checkpoint(config, checkpoint)
    tokenizer = Tokenizer.load(folder, vocab_size=model.vocab_size)
    prompt = make_prompt(config)
    length = len(prompt.prompt_ids(tokenizer, ""))
    room = config.engine.longest_prompt
    if length > room:
        raise UserError(
            f"engine.context = {config.engine.context} leaves room for {room} tokens, the prompt "
            f"alone has {length}"
        )
    _require_world(config, training, lambda text: _excess(prompt, tokenizer, text, length, room))
    if config.engine.context > model.max_position_embeddings:
        raise UserError(
            f"engine.context = {config.engine.context}, {folder / 'config.json'} says "
            f"max_position_embeddings = {model.max_position_embeddings}"
        )
    mesh = make_mesh(config.mesh)
    if jax.process_count() > 1 and mesh.size < jax.device_count():
        raise UserError(
            f"mesh: data*fsdp*tensor = {mesh.size}, and {jax.process_count()} hosts have "
            f"{jax.device_count()} devices: a run on several hosts takes them all"
        )
    lanes = lane_mesh(mesh, config.engine.tensor)
    for each in (mesh, lanes):
        check_divisible(each, "num_key_value_heads", (model.num_key_value_heads,), ("kv_heads",))
    plan_memory(
        model,
        config.engine,
        lanes,
        jnp.dtype(config.dtype),
        limit_bytes=device_memory(mesh.local_devices[0]),
        reserved_bytes=bytes_beside(config, model, mesh, training=training),
    )
    folder = find_policy(config.policy, checkpoint, weights_of=folder.name)
    hf.check_weights(folder, model)
    return Checked(model=model, checkpoint=folder, tokenizer=tokenizer, prompt=prompt)


def resolve(path: str) -> Path:
    """A path as given where it exists, else relative to the repository."""
    given = Path(path).expanduser()
    return given if given.is_absolute() or given.exists() else REPOSITORY / given


def find_policy(
    policy: PolicyConfig, checkpoint: Path | None = None, *, weights_of: str | None = None
) -> Path:
    """The policy's folder: one that exists wins, else the hub is asked for a model of that id.

    From the hub come configuration and tokenizer; weights too where `weights_of` gives the commit.
    Returns a folder that does not exist if the name is no id either. Raises UserError.
    """
    folder, name = checkpoint or resolve(policy.checkpoint), str(checkpoint or policy.checkpoint)
    if folder.exists() or not hub.is_repo_id(name):
        return folder
    try:
        return hub.fetch(name, revision=weights_of, weights=weights_of is not None)
    except UserError as error:
        field = f"policy.checkpoint = {name!r}" if checkpoint is None else f"--checkpoint {name}"
        source = f"; or {policy.source}" if checkpoint is None and policy.source else ""
        raise UserError(f"{field}: no such folder, and on the hub {error}{source}") from error


def _require_checkpoint(config: RunConfig, checkpoint: Path | None) -> tuple[Path, DecoderConfig]:
    policy = config.policy
    folder = find_policy(policy, checkpoint)
    if not (folder / "config.json").is_file():
        if checkpoint is not None:
            raise UserError(f"{folder}: holds no config.json, so it is no Hugging Face checkpoint")
        raise UserError(
            f"policy.checkpoint = {policy.checkpoint!r}: no config.json there; "
            + (
                policy.source
                or "put the model there (config.json, tokenizer.json, *.safetensors), or give an "
                "id of the hub (OWNER/NAME)"
            )
        )
    return folder, hf.read_config(folder)


def _excess(prompt: Prompt, tokenizer: Tokenizer, text: str, length: int, room: int) -> int:
    """How many tokens a question's prompt is too long, 0 if it fits."""
    # A byte-level tokenizer makes no more tokens than bytes: few have to be tokenised.
    if length + len(text.encode()) <= room:
        return 0
    return max(len(prompt.prompt_ids(tokenizer, text)) - room, 0)


def _require_world(config: RunConfig, training: bool, excess: Callable[[str], int]) -> None:
    world = config.world
    for field in ("train_questions", "eval_questions")[0 if training else 1 :]:
        name = getattr(world, field)
        if name.startswith(f"{_ATLAS}:"):
            split = name.removeprefix(f"{_ATLAS}:")
            if split not in SPLITS:
                raise UserError(
                    f"world.{field} = {name!r}: the atlas has the splits {tuple(SPLITS)}"
                )
            if field == "train_questions":
                _require_enough(name, SPLITS[split], config.questions_per_step)
            continue
        if not resolve(name).is_file():
            source = world.questions_source or "put the questions there"
            raise UserError(
                f"world.{field} = {name!r}: no such file; {source} as JSONL, one "
                '{"idx", "question", "answer"} a line'
            )
        questions = read_questions(resolve(name))
        limit = world.eval_limit if field == "eval_questions" else None
        for question in questions[:limit]:
            if tokens := excess(question.text):
                raise UserError(
                    f"{name}: question {question.id!r}: its prompt is {tokens} tokens longer than "
                    f"engine.context = {config.engine.context} has room for"
                )
        if field == "train_questions":
            _require_enough(name, len(questions), config.questions_per_step)
    if world.corpus == _ATLAS:
        return
    folder = resolve(world.corpus)
    if not (folder / "index" / "manifest.json").is_file():
        source = world.corpus_source or "build one from the passages and put it there"
        raise UserError(
            f"world.corpus = {world.corpus!r}: no index there (index/, embedder/); {source}"
        )
    check_embedder(folder / "index", folder / "embedder")


def _require_enough(name: str, count: int, wanted: int) -> None:
    """Every question of a step is another one."""
    if count < wanted:
        raise UserError(f"{name}: holds {count} questions, questions_per_step = {wanted}")


def make_prompt(config: RunConfig) -> Prompt:
    """The prompt that the policy's settings ask for."""
    if config.policy.prompt_file:
        return BasePrompt.from_file(resolve(config.policy.prompt_file))
    makers = {"base": BasePrompt, "chat": ChatPrompt, "tiny": tiny_prompt}
    return makers[config.policy.prompt]()


def _world(config: RunConfig, training: bool) -> tuple[list[Question], list[Question], DenseIndex]:
    world = config.world
    names = (world.corpus, world.eval_questions, world.train_questions if training else "")
    atlas = load_atlas() if any(n.split(":")[0] == _ATLAS for n in names) else None

    def questions(name: str) -> list[Question]:
        if atlas is None or not name.startswith(f"{_ATLAS}:"):
            return read_questions(resolve(name))
        return list(atlas.questions[name.removeprefix(f"{_ATLAS}:")])

    if atlas is not None and world.corpus == _ATLAS:
        index = load_or_build(
            cache_directory() / "index", atlas.corpus, corpus_hash=atlas.corpus_hash
        )
    else:
        folder = resolve(world.corpus)
        index = DenseIndex.load(folder / "index", TfidfSvdEmbedder.load(folder / "embedder"))
    evaluated = questions(world.eval_questions)[: world.eval_limit]
    return questions(world.train_questions) if training else [], evaluated, index
