"""Penalties and the filter of void turns, by hand-written episodes and hand-computed numbers."""

import numpy as np
import pytest

from r1s_jax.rl.rewards import paper_stage2, reward_by_name
from r1s_jax.rl.shaping import ShapingConfig, has_void_turn, overlong, shaped
from r1s_jax.types import (
    Document,
    Question,
    Search,
    Segment,
    StopReason,
    TokenSource,
    Trajectory,
    UserError,
)

QUERY = "who <|begin_of_query|>ada<|end_of_query|>"
DOCS = "<|begin_of_documents|>\n(1)Title: Ada Text: x\n<|end_of_documents|>\n\n"
END = "so</think><answer>Ada Lovelace</answer>"


def _trajectory(*texts, stop_reason=StopReason.ANSWER, tokens=6):
    """Texts alternate: written by the policy, brought by the retriever; `tokens` were sampled.

    As many document tokens are in between, which must not count.
    """
    segments = tuple(
        Segment(source=TokenSource.OBSERVATION if i % 2 else TokenSource.SAMPLED, text=text)
        for i, text in enumerate(texts)
    )
    document = Document(id="d", title="Ada", text="x")
    sources = [TokenSource.PROMPT] * 3 + [TokenSource.OBSERVATION] * 4
    sources = np.array([*sources, *[TokenSource.SAMPLED] * tokens])
    return Trajectory(
        question=Question(id="q7", text="Who?", answers=("Ada Lovelace",)),
        attempt=0,
        sample=1,
        weights_version=0,
        token_ids_T=np.zeros(len(sources), np.int32),
        sources_T=sources,
        logprobs_T=np.zeros(len(sources), np.float32),
        drawn_logprobs_T=np.zeros(len(sources), np.float32),
        segments=segments,
        searches=(Search(query="ada", documents=(document,)),) * (len(texts) // 2),
        stop_reason=stop_reason,
    )


@pytest.mark.parametrize(
    ("length", "penalty"),
    [(0, 0.0), (11, 0.0), (12, 0.0), (13, -0.25), (14, -0.5), (15, -0.75), (16, -1.0), (17, -1.0)],
)
def test_overlong_by_hand(length, penalty):
    """16 tokens at most, the last four of them on the slope."""
    assert overlong(length, 16, 4) == penalty
    reward = shaped(paper_stage2, ShapingConfig(overlong_max=16, overlong_cache=4))
    parts = reward(_trajectory(QUERY, DOCS, END, tokens=length)).parts
    assert dict(parts) == {"answer": 1.0, "format": 0.0, "overlong": penalty}


def test_overlong_with_a_slope_over_everything():
    assert [overlong(n, 2, 2) for n in range(4)] == [0.0, -0.5, -1.0, -1.0]


def test_actions_that_are_missing_cost():
    config = ShapingConfig(no_answer=0.5, no_search=0.25)
    reward = shaped(paper_stage2, config)
    cases = {
        (QUERY, DOCS, END): {"no_answer": 0.0, "no_search": 0.0},
        (END,): {"no_answer": 0.0, "no_search": -0.25},
        (QUERY, DOCS, "so I think"): {"no_answer": -0.5, "no_search": 0.0},
        ("so I think",): {"no_answer": -0.5, "no_search": -0.25},
        # The documents are the policy's own: nothing was searched.
        (QUERY + DOCS + END,): {"no_answer": 0.0, "no_search": -0.25},
        ("so</think><answer></answer>",): {"no_answer": 0.0, "no_search": -0.25},
    }
    for texts, penalties in cases.items():
        trajectory = _trajectory(*texts)
        parts = dict(reward(trajectory).parts)
        assert parts == {**paper_stage2(trajectory).parts, **penalties}, texts
    # Silence: 2 for the format, half a point and a quarter for the two actions.
    assert reward(_trajectory("so I think")).total == -2.75


def test_only_what_is_on_becomes_a_part():
    trajectory = _trajectory("so I think", tokens=9)
    options = {
        "overlong": ShapingConfig(overlong_max=8, overlong_cache=2),
        "no_answer": ShapingConfig(no_answer=1.0),
        "no_search": ShapingConfig(no_search=1.0),
    }
    for part, config in options.items():
        parts = dict(shaped(reward_by_name("paper_stage1"), config)(trajectory).parts)
        assert parts == {"retrieval": 0.0, "format": 0.0, part: -1.0}
    assert shaped(paper_stage2, ShapingConfig()) is paper_stage2
    assert shaped(paper_stage2, ShapingConfig(overlong_cache=4)) is paper_stage2


def test_a_failed_retrieval_is_never_scored():
    trajectory = _trajectory(QUERY, stop_reason=StopReason.RETRIEVAL_FAILED)
    with pytest.raises(ValueError, match="'q7' sample 1 ended retrieval_failed"):
        shaped(lambda t: paper_stage2(_trajectory(END)), ShapingConfig(no_answer=1.0))(trajectory)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlong_max": -1}, r"overlong_max = -1"),
        ({"overlong_max": 8}, r"overlong_cache = 0: expected 1 to overlong_max = 8"),
        ({"overlong_max": 8, "overlong_cache": 9}, r"overlong_cache = 9"),
        ({"no_answer": -0.5}, r"no_answer = -0.5: a penalty is subtracted"),
        ({"no_search": float("nan")}, r"no_search = nan"),
    ],
)
def test_nonsense_is_refused(options, message):
    with pytest.raises(UserError, match=message) as caught:
        ShapingConfig(**options)
    assert "\n" not in str(caught.value)


# stop reason, texts -> whether a turn was void
VOID = {
    "answer": ("answer", (QUERY, DOCS, END), False),
    "answer, empty": ("answer", ("</think><answer></answer>",), False),
    "answer never opened": ("answer", (QUERY, DOCS, "so</think> Ada</answer>"), True),
    "answer opened a turn before": (
        "answer",
        ("so</think><answer>" + QUERY, DOCS, "Ada</answer>"),
        False,
    ),
    "end of sequence": ("eos", (QUERY, DOCS, "so I think"), True),
    "end of sequence at once": ("eos", ("",), True),
    "turn too long": ("turn_length", (QUERY, DOCS, "and and and"), True),
    "query not closed": ("turn_length", ("who <|begin_of_query|>ada ada",), True),
    "context full while writing": ("context_full", (QUERY, DOCS, "so</think><answer>A"), True),
    "no room for the documents": ("context_full", (QUERY, DOCS, QUERY), False),
    "query without a span": ("empty_query", ("who <|end_of_query|>",), True),
    "empty query": ("empty_query", ("<|begin_of_query|> ''<|end_of_query|>",), True),
    "one search too many": ("max_searches", (QUERY, DOCS, QUERY), False),
    "failed retrieval": ("retrieval_failed", (QUERY,), False),
    # Not from our loop, which ends an episode with such a turn: any turn counts.
    "void turn in the middle": ("answer", ("hm", DOCS, END), True),
    "void turn after an answer": ("eos", (END, DOCS, "hm"), True),
}


@pytest.mark.parametrize("case", VOID)
def test_void_turns(case):
    reason, texts, void = VOID[case]
    assert has_void_turn(_trajectory(*texts, stop_reason=StopReason(reason))) is void


def test_every_stop_reason_is_among_the_cases():
    assert {reason for reason, _, _ in VOID.values()} == set(StopReason)
