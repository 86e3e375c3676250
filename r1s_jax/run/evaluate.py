"""Greedy evaluation on held-out questions, and the controls that say why a policy is right."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from r1s_jax.engine.sampling import SamplingConfig
from r1s_jax.protocol.tags import BEGIN_QUERY
from r1s_jax.retrieval.controls import WrongPassages
from r1s_jax.retrieval.interface import Retriever
from r1s_jax.rl.rewards import episode_metrics
from r1s_jax.rollout.loop import Call, Rollout
from r1s_jax.run.config import RunConfig
from r1s_jax.run.setup import Parts
from r1s_jax.types import Trajectory

GREEDY = SamplingConfig(temperature=0.0)
# Both tags of the wire begin with these two bytes, and nothing else the policy may write does.
NO_SEARCH = SamplingConfig(temperature=0.0, banned=(BEGIN_QUERY[:2],))

# name -> what it shows
CONTROLS = {
    "forced": "every response is made to begin with a query",
    "banned": "the query tag cannot be written; its one turn has the tokens of all turns",
    "wrong_passages": "every search brings well-formed passages about something else",
    "first_only": "only the first search of an episode is answered",
}


def evaluate(
    parts: Parts, config: RunConfig, mode: str = "search"
) -> tuple[dict[str, float], list[Trajectory]]:
    """Plays every held-out question once, greedily; `mode` is "search" or one of CONTROLS.

    The engine's present weights are evaluated. Returns (metrics, trajectories).
    """
    rollout_config = dataclasses.replace(
        config.rollout,
        documents=config.evaluation.documents,
        max_searches=config.evaluation.max_searches,
    )
    retriever: Retriever = parts.index
    if mode == "forced":
        rollout_config = dataclasses.replace(rollout_config, opening=BEGIN_QUERY)
    elif mode == "banned":
        tokens = rollout_config.max_new_tokens * (rollout_config.max_searches + 1)
        rollout_config = dataclasses.replace(rollout_config, max_new_tokens=tokens)
    elif mode == "wrong_passages":
        retriever = WrongPassages(parts.index, parts.index.documents, seed=config.seed)
    elif mode == "first_only":
        rollout_config = dataclasses.replace(rollout_config, answered_searches=1)
    rollout = Rollout(parts.engine, parts.tokenizer, parts.prompt, retriever, rollout_config)
    result = rollout.run(
        parts.eval_questions,
        samples=1,
        sampling=NO_SEARCH if mode == "banned" else GREEDY,
        call=Call(seed=config.seed, phase=f"eval/{mode}", step=0),
    )
    trajectories = [t for group in result.groups for t in group.trajectories]
    metrics = summarise(trajectories)
    metrics["retrieval_failed"] = float(result.failed)
    metrics["rollout_seconds"] = result.seconds
    metrics["retrieval_seconds"] = result.retrieval_seconds
    metrics["retrieval_wait_seconds"] = result.retrieval_wait_seconds
    metrics["decode_utilization"] = result.decode_utilization
    return metrics, trajectories


def summarise(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Means over episodes, by the stable names of metrics.jsonl.

    `em_given_search` is over the episodes that searched, `gold_found` over questions that name
    their gold passages, `em_one_hop` and `em_two_hop` by how many they name.
    """
    rows = [episode_metrics(t) for t in trajectories]
    hops = np.array([len(t.question.gold_documents) for t in trajectories])
    column = {name: np.array([row[name] for row in rows]) for name in rows[0]} if rows else {}

    def mean(name: str, chosen: np.ndarray | None = None) -> float:
        values = column.get(name, np.zeros(0))
        values = values if chosen is None else values[chosen]
        return float(values.mean()) if len(values) else 0.0

    searched = column.get("searched", np.zeros(0)) > 0
    return {
        "em": mean("em"),
        "acc_r": mean("acc_r"),
        "f1": mean("f1"),
        "format_rate": mean("format"),
        "retrieval_rate": mean("searched"),
        "searches_mean": mean("searches"),
        "em_given_search": mean("em", searched),
        "gold_found": mean("gold_found", hops > 0),
        "em_one_hop": mean("em", hops == 1),
        "em_two_hop": mean("em", hops == 2),
        "answered_rate": mean("answered"),
        "response_tokens_mean": mean("response_tokens"),
        "truncated_rate": mean("truncated"),
        "episodes": float(len(rows)),
    }
