"""Two thousand episodes on the real engine, with a retriever that fails in every way it can."""

import random

import pytest

from r1s_jax.engine.sampling import SamplingConfig
from r1s_jax.rollout.loop import Call, Rollout, RolloutConfig
from r1s_jax.types import RetrievalFailure, StopReason, TokenSource
from tests import tiny


class Faulty:
    """A tenth of what it is asked fails, and one batch in ten raises: asked singly, it answers."""

    def __init__(self):
        self.rng, self.lost = random.Random(0), 0

    def search(self, queries, k):
        if len(queries) > 1 and self.rng.random() < 0.1:
            raise TimeoutError("slow")
        failed = [self.rng.random() < 0.1 for _ in queries]
        self.lost += sum(failed)
        return [RetrievalFailure(reason="x") if f else tiny.DOCUMENTS for f in failed]


@pytest.mark.slow
def test_soak_on_the_engine(monkeypatch):
    """Every episode is accounted for, every trajectory whole, nothing is left in the engine.

    Pages for a fifth of what the slots could use, so that rows have to wait for them as well.
    """
    from r1s_jax.engine import engine as module

    plan_memory = module.plan_memory
    little = {"limit_bytes": 1_200_000}
    monkeypatch.setattr(module, "plan_memory", lambda *a, **k: plan_memory(*a, **k | little))
    engine = tiny.new_engine(rows=16, extend_rows=8)
    plan = engine.plan
    assert plan.pages < plan.slots * plan.pages_per_episode / 2
    retriever = Faulty()
    config = RolloutConfig(
        documents=2, max_searches=2, max_new_tokens=48, search_window=0.0, search_timeout=0.3
    )
    rollout = Rollout(engine, tiny.tokenizer(), tiny.PROMPT, retriever, config)
    questions = [tiny.question(f"q{i}", f"{i}?") for i in range(500)]
    result = rollout.run(
        questions,
        samples=4,
        sampling=SamplingConfig(),
        call=Call(seed=0, phase="train", step=0),
        min_survivors=2,
    )
    assert engine.idle
    trajectories = [t for g in result.groups for t in g.trajectories]
    assert len(result.groups) + result.dropped_groups == 500
    lone = 2000 - result.failed - len(trajectories)
    assert 0 <= lone <= result.dropped_groups
    # Equal queries of a batch are asked once, and fail together.
    assert result.failed >= retriever.lost > 50
    for t in trajectories:
        assert t.stop_reason != StopReason.RETRIEVAL_FAILED
        assert len(t.token_ids_T) <= engine.config.context
        sampled = t.sources_T == TokenSource.SAMPLED
        assert (t.logprobs_T[sampled] < 0).all() and (t.logprobs_T[~sampled] == 0).all()
    assert sum(len(t.searches) for t in trajectories) > 500
