import dataclasses

import pytest

from r1s_jax.protocol.observation import render_documents
from r1s_jax.protocol.parse import Verdict, extract_answer, extract_query, judge_format
from r1s_jax.protocol.tags import PROTOCOL_TAGS
from r1s_jax.types import Document, Segment, TokenSource

B, E = "<|begin_of_query|>", "<|end_of_query|>"
DOCS = render_documents([Document(id="1", title="assistant 北京", text="x")], PROTOCOL_TAGS)


@pytest.mark.parametrize(
    ("turn", "query"),
    [
        (f"I look. {B} capital of\tFrance\n {E}", "capital of France"),
        (f"{B}\"Zürich\" “city” 'pop'{E}", "Zürich city pop"),
        (f"{B} Côte d'Ivoire Kings' {E}", "Côte d'Ivoire Kings"),
        (f"{B} first {B} second {E}", "second"),
        (f"{B} a {E} tail {B} b {E} ignored", "b"),
        (f'{B} " \n " {E}', ""),
        (f"{B}{E}", ""),
        (f"{B} open", ""),
        (f"no begin {E}", ""),
        (f"{B} a {E} {B} open", ""),
        ("", ""),
    ],
)
def test_extract_query(turn, query):
    assert extract_query(turn) == query


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        ("</think> <answer> Bern </answer>", "Bern"),
        ("<answer>a</answer><answer>b</answer>", "b"),
        ("<answer>a<answer>b</answer>", "b"),
        ("<answer></answer>", ""),
        ("<answer>a", None),
        ("a</answer>", None),
        ("</answer>a<answer>", None),
        ("", None),
    ],
)
def test_extract_answer(written, answer):
    assert extract_answer(written) == answer


def segments(*texts):
    """Sampled, observation, sampled, …"""
    sources = (TokenSource.SAMPLED, TokenSource.OBSERVATION)
    return [Segment(source=sources[i % 2], text=t) for i, t in enumerate(texts)]


GOOD = Verdict(
    tag_counts=(1,) * 7,
    tags_balanced=True,
    searched=True,
    think_answer_ok=True,
    ordered=True,
    has_chinese=False,
    says_assistant=False,
    invented_documents=False,
    answer="Bern city",
    answer_words=2,
    answer_has_tag=False,
)
ASK, DONE = f"hm {B} Bern {E}", " so </think> <answer> Bern city </answer>"


def test_well_formed():
    """Words of a document, "assistant" and Chinese here, are not the policy's (known fault 3)."""
    assert judge_format(segments(ASK, DOCS, DONE)) == GOOD
    twice = judge_format(segments(ASK, DOCS, ASK, DOCS, DONE))
    assert twice == dataclasses.replace(GOOD, tag_counts=(2,) * 7)


@pytest.mark.parametrize(
    ("texts", "changes"),
    [
        ((DONE,), {"tag_counts": (0,) * 7, "searched": False}),
        ((ASK,), {"tag_counts": (0, 0, 1, 1, 0, 0, 0), "tags_balanced": False, "searched": False,
                  "think_answer_ok": False, "ordered": False, "answer": None, "answer_words": 0}),
        ((ASK, DOCS, "<think>" + DONE), {"think_answer_ok": False, "ordered": False}),
        ((ASK, DOCS, "</think>" + DONE), {"think_answer_ok": False, "ordered": False}),
        ((ASK, DOCS, "<answer> Bern city </answer></think>"), {"ordered": False}),
        ((ASK, DOCS, "北" + DONE), {"has_chinese": True}),
        ((ASK, DOCS, "Assistant:" + DONE), {"says_assistant": True}),
        ((ASK + "assistants", DOCS, DONE), {"says_assistant": True}),
        ((ASK, DOCS, DONE + B), {"tag_counts": (1, 1, 2, 1, 1, 1, 1), "tags_balanced": False}),
        ((ASK, DOCS, "<|begin_of_documents|>\n(1)x\n<|end_of_documents|>\n\n" + DONE),
         {"tag_counts": (2, 2, 1, 1, 2, 2, 2), "tags_balanced": False, "invented_documents": True}),
        ((ASK, DOCS, "</think><answer> a <|end_of_documents|> b</answer>"),
         {"tag_counts": (1, 1, 1, 1, 1, 2, 1), "tags_balanced": False, "invented_documents": True,
          "answer": "a <|end_of_documents|> b", "answer_words": 3, "answer_has_tag": True}),
        ((ASK, DOCS, "</think><answer></answer>"), {"answer": "", "answer_words": 0}),
    ],
)  # fmt: skip
def test_each_fault_shows_in_its_own_field(texts, changes):
    verdict = judge_format(segments(*texts))
    assert verdict == dataclasses.replace(GOOD, **changes)
    assert verdict.has_answer == (verdict.answer is not None)


def test_nothing_written():
    verdict = judge_format([])
    assert verdict.tags_balanced and not verdict.searched and not verdict.think_answer_ok
