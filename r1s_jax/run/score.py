"""The evaluations of `tpu_scripts/evaluate.py`: a policy, an endpoint, a file of answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath

from r1s_jax.data.floors import floors
from r1s_jax.evaluation.endpoint import MODES, EndpointConfig, play
from r1s_jax.evaluation.judge import JudgeConfig
from r1s_jax.evaluation.published import dataset_in
from r1s_jax.evaluation.records import read_records
from r1s_jax.evaluation.table import score_file
from r1s_jax.models import hf
from r1s_jax.remote.chat import Chat, ChatConfig
from r1s_jax.run.config import RunConfig
from r1s_jax.run.evaluate import evaluate
from r1s_jax.run.progress import Progress
from r1s_jax.run.report import evaluation_report
from r1s_jax.run.results import Judge, Results
from r1s_jax.run.setup import build_parts
from r1s_jax.run.world import World, check_world, open_world
from r1s_jax.types import UserError


def judge(
    url: str | None, model: str | None, price: Sequence[float], token_limit: int
) -> Judge | None:
    """The judge that the options name, None for none. UserError where half of it is missing."""
    if not url and not model:
        return None
    if not url:
        raise UserError(f"--judge_model {model}: --judge is missing")
    if not model:
        raise UserError(f"--judge {url}: --judge_model is missing")
    config = JudgeConfig(prompt_price=price[0], completion_price=price[1], token_limit=token_limit)
    return Judge(chat=ChatConfig(base_url=url, model=model), config=config)


def endpoint(url: str, model: str | None, api: str) -> ChatConfig:
    """The endpoint that the options name. UserError without a model."""
    if not model:
        raise UserError(f"--endpoint {url}: --model is missing")
    return ChatConfig(base_url=url, model=model, api=api)


def score_answers(
    path: str,
    *,
    against: str | None = None,
    out: str | None,
    judge: Judge | None,
    skip_bad: bool,
) -> None:
    """Scores a file of answers and prints the table; writes only with `out` or a judge.

    `against` is another file of answers to the same questions, compared question by question;
    then nothing is written.
    """
    skipped: list[str] | None = [] if skip_bad else None
    dataset = dataset_in(Path(path).name)
    if against is not None or (out is None and judge is None):
        print(score_file(path, dataset=dataset, against=against, skipped=skipped)[1])
        return
    source = epath.Path(path).resolve()
    mode = source.stem.removeprefix("eval_")
    with Progress() as progress:
        # Files of answers have equal names in all runs.
        folder = out or f"runs/score_{source.parent.name}_{source.stem}"
        results = Results(folder, dataset=dataset, progress=progress, judge=judge)
        if (results.out / f"eval_{mode}.jsonl").resolve() == source:
            raise UserError(f"--out {folder}: would write over --score {path}")
        records = read_records(path, skipped=skipped)
        results.about["file"] = path
        if skipped:
            results.about["bad lines left out"] = len(skipped)
        results.add(mode, records)
    results.finish()


def score_endpoint(
    config: RunConfig,
    chat: ChatConfig,
    modes: Sequence[str],
    *,
    name: str,
    out: str,
    judge: Judge | None,
) -> None:
    """Has an endpoint answer the held-out questions of a config, and prints the table.

    What was answered is kept in `out`, so that the same command goes on after a kill.
    """
    for mode in modes:
        if mode not in MODES:
            raise UserError(f"--mode {mode}: an endpoint plays {', '.join(MODES)}")
    with Progress() as progress:
        results = Results(out, dataset=_dataset(config), progress=progress, judge=judge)
        check_world(config, training=False, excess=lambda text: 0)
        world = open_world(config.world, training=False)
        results.about |= _about(config, world, name)
        results.about["policy"] = f"{chat.model} at {chat.base_url}"
        limits = EndpointConfig(
            documents=config.evaluation.documents, max_searches=config.evaluation.max_searches
        )
        model = Chat(chat)
        with results.cache("played") as cache:
            for mode in modes:
                _announce(progress, world, mode)
                played = play(
                    model,
                    world.eval_questions,
                    world.retriever,
                    mode=mode,
                    config=limits,
                    cache=cache,
                    facts=world.facts,
                    progress=lambda done, total, mode=mode: progress.update(mode, done, total, {}),
                )
                results.add(mode, played.records, facts=played.facts)
    results.finish()


def score_policy(
    config: RunConfig,
    checkpoint: Path | None,
    modes: Sequence[str],
    *,
    name: str,
    out: str,
    judge: Judge | None,
) -> None:
    """Plays the held-out questions with a policy, and prints the tables."""
    if "wrong_passages" in modes and not config.world.is_local:
        raise UserError(
            f"--mode wrong_passages: needs the passages themselves, and world.corpus = "
            f"{config.world.corpus!r} can only be searched"
        )
    with Progress() as progress:
        results = Results(out, dataset=_dataset(config), progress=progress, judge=judge)
        parts = build_parts(config, checkpoint, training=False)
        progress.note(f"engine: {parts.engine.plan}")
        world = parts.world
        results.about |= _about(config, world, name)
        results.about["checkpoint"] = str(parts.checkpoint)
        params = hf.load_params(parts.checkpoint, parts.model, parts.mesh)
        parts.engine.set_weights(params, 0)
        known, figures = floors(world.eval_questions), {}
        for mode in modes:
            _announce(progress, world, mode)
            played = evaluate(parts, config, mode)
            figures[mode] = played.figures
            lost = int(played.figures["retrieval_failed"])
            facts = {"questions left out": {played.failure: lost}} if lost else {}
            results.add(mode, played.records, figures=played.figures, floors=known, facts=facts)
    evaluation_report(figures, known)
    results.finish()


def _announce(progress: Progress, world: World, mode: str) -> None:
    """What is played now, and that it is not all of a file."""
    left_out = f"; {world.skipped_note}" if world.skipped else ""
    progress.note(f"{len(world.eval_questions)} questions, {mode}{left_out}")


def _about(config: RunConfig, world: World, name: str) -> dict[str, Any]:
    about: dict[str, Any] = {
        "config": name,
        "questions": f"{config.world.eval_questions} ({len(world.eval_questions)})",
        "retriever": world.facts,
        "passages per search": config.evaluation.documents,
        "searches at most": config.evaluation.max_searches,
        "seed": config.seed,
    }
    if world.skipped:
        about["bad lines left out"] = len(world.skipped)
    return about


def _dataset(config: RunConfig) -> str:
    # Of the questions alone: what a run or a config is called does not say what it was asked.
    return dataset_in(config.world.eval_questions)
