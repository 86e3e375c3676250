"""From a configuration to the parts of a run; everything cheap is checked before anything slow."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh

from r1s_jax.data.atlas_builder import cache_directory, load_atlas
from r1s_jax.data.questions import read_questions
from r1s_jax.engine.engine import Engine
from r1s_jax.models import hf
from r1s_jax.models.decoder import DecoderConfig
from r1s_jax.protocol.prompts import BasePrompt, ChatPrompt, Prompt, tiny_prompt
from r1s_jax.protocol.tokenizer import Tokenizer
from r1s_jax.retrieval.embed import TfidfSvdEmbedder
from r1s_jax.retrieval.index import DenseIndex, load_or_build
from r1s_jax.rollout.episode import STOP_STRINGS
from r1s_jax.run.config import RunConfig
from r1s_jax.sharding import make_mesh
from r1s_jax.types import Question, UserError

REPOSITORY = Path(__file__).resolve().parents[2]
_ATLAS = "atlas"


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


def build_parts(config: RunConfig, checkpoint: Path | None = None) -> Parts:
    """Checks, then loads. `checkpoint` replaces the policy's folder (a run's export).

    Raises UserError naming the file, what it should hold and where it comes from.
    """
    checkpoint = checkpoint or resolve(config.policy.checkpoint)
    model = hf.read_config(checkpoint)
    hf.require_weights(checkpoint)
    _require_world(config)
    mesh = make_mesh(config.mesh)
    tokenizer = Tokenizer.load(checkpoint, vocab_size=model.vocab_size)
    prompt = _prompt(config)
    train_questions, eval_questions, index = _world(config)
    engine = Engine(
        model,
        config.engine,
        mesh=mesh,
        token_bytes=tokenizer.token_bytes,
        stop_strings=STOP_STRINGS,
        eos_ids=tokenizer.eos_ids,
        dtype=jnp.dtype(config.dtype),
    )
    return Parts(
        mesh=mesh,
        model=model,
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        prompt=prompt,
        train_questions=train_questions,
        eval_questions=eval_questions,
        index=index,
        engine=engine,
    )


def resolve(path: str) -> Path:
    """A path as given where it exists, else relative to the repository."""
    given = Path(path).expanduser()
    return given if given.is_absolute() or given.exists() else REPOSITORY / given


def _require_world(config: RunConfig) -> None:
    world = config.world
    for field in ("train_questions", "eval_questions"):
        name = getattr(world, field)
        if not name.startswith(f"{_ATLAS}:") and not resolve(name).is_file():
            raise UserError(
                f"world.{field} = {name!r}: no such file; put the questions there as JSONL, one "
                '{"idx", "question", "answer"} a line'
            )
    if world.corpus != _ATLAS and not (resolve(world.corpus) / "index" / "manifest.json").is_file():
        raise UserError(
            f"world.corpus = {world.corpus!r}: no index there (index/manifest.json, embedder/); "
            "build one from the passages and put it there"
        )


def _prompt(config: RunConfig) -> Prompt:
    if config.policy.prompt_file:
        return BasePrompt.from_file(resolve(config.policy.prompt_file))
    makers = {"base": BasePrompt, "chat": ChatPrompt, "tiny": tiny_prompt}
    return makers[config.policy.prompt]()


def _world(config: RunConfig) -> tuple[list[Question], list[Question], DenseIndex]:
    world = config.world
    names = (world.corpus, world.train_questions, world.eval_questions)
    atlas = load_atlas() if any(n.split(":")[0] == _ATLAS for n in names) else None

    def questions(name: str) -> list[Question]:
        if atlas is None or not name.startswith(f"{_ATLAS}:"):
            return read_questions(resolve(name))
        split = name.removeprefix(f"{_ATLAS}:")
        if split not in atlas.questions:
            raise UserError(f"{name!r}: the atlas has the splits {sorted(atlas.questions)}")
        return list(atlas.questions[split])

    if atlas is not None and world.corpus == _ATLAS:
        index = load_or_build(
            cache_directory() / "index", atlas.corpus, corpus_hash=atlas.corpus_hash
        )
    else:
        folder = resolve(world.corpus)
        index = DenseIndex.load(folder / "index", TfidfSvdEmbedder.load(folder / "embedder"))
    evaluated = questions(world.eval_questions)[: world.eval_limit]
    return questions(world.train_questions), evaluated, index
