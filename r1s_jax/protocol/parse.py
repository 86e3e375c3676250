"""Reading what the policy wrote: its query, its answer, and the state of its format.

Pure functions of text. How the findings become rewards is decided in `rl.rewards`.

Departures from the released code of R1-Searcher (RECIPE.md, "Known faults"): what counts as a
document is known from where the text came from (`Segment.source`), not from searching for tags;
so "assistant" and Chinese characters are looked for in everything the policy wrote and in nothing
else, and a document block that the policy made up is reported (`Verdict.invented_documents`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from r1s_jax.protocol.tags import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    BEGIN_QUERY,
    COUNTED_TAGS,
    DOCUMENT_TAGS,
    END_QUERY,
    QUERY_TAGS,
    THINK_CLOSE,
    THINK_OPEN,
)
from r1s_jax.types import Segment, TokenSource

# An apostrophe between letters ("d'Ivoire") belongs to a name; the other single marks are quotes.
_QUOTES = re.compile(r"[\"“”„«»`]|(?<!\w)['‘’]+|['‘’]+(?!\w)")
_CHINESE = re.compile(r"[\u4e00-\u9fff]")


def extract_query(turn_text: str) -> str:
    """The cleaned query of a turn, "" if there is none.

    It is the text after the last `<|begin_of_query|>` up to the `<|end_of_query|>` behind it,
    without quotation marks, white space collapsed. A span that is not closed is no query.
    """
    _, opened, tail = turn_text.rpartition(BEGIN_QUERY)
    query, closed, _ = tail.partition(END_QUERY)
    if not (opened and closed):
        return ""
    return " ".join(_QUOTES.sub("", query).split())


def extract_answer(written: str) -> str | None:
    """The text inside the last `<answer>…</answer>`, stripped; None if there is no such pair."""
    body, closed, _ = written.rpartition(ANSWER_CLOSE)
    _, opened, answer = body.rpartition(ANSWER_OPEN)
    return answer.strip() if opened and closed else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the reward table needs to know of one response; every field stands on its own.

    tag_counts: counts of the seven `COUNTED_TAGS` over the whole response, documents included.
    tags_balanced: the seven counts are equal; all zero (no search) counts as equal.
    searched: documents really came back at least once (an OBSERVATION segment exists).
    think_answer_ok: no `<think>`, exactly one each of `</think>`, `<answer>`, `</answer>`.
    ordered: `think_answer_ok`, and the three stand in that order (the released code asks not).
    has_chinese: a CJK unified ideograph (U+4E00 to U+9FFF) in the policy's own text.
    says_assistant: "Assistant" or "assistant" in the policy's own text.
    invented_documents: a document tag in the policy's own text.
    answer: text of the last answer pair, None without one (`has_answer`).
    answer_words: its words by white space, 0 without one.
    answer_has_tag: a query or document tag inside the answer.
    """

    tag_counts: tuple[int, ...]
    tags_balanced: bool
    searched: bool
    think_answer_ok: bool
    ordered: bool
    has_chinese: bool
    says_assistant: bool
    invented_documents: bool
    answer: str | None
    answer_words: int
    answer_has_tag: bool

    @property
    def has_answer(self) -> bool:
        """Whether an `<answer>…</answer>` pair was written (its text may be empty)."""
        return self.answer is not None


def judge_format(segments: Sequence[Segment]) -> Verdict:
    """Judges the segments of one response, prompt left out, in order.

    Documents are defused before they are shown, so a tag in an OBSERVATION segment is always the
    wrapper's.
    """
    response = "".join(s.text for s in segments if s.source != TokenSource.PROMPT)
    written = "".join(s.text for s in segments if s.source == TokenSource.SAMPLED)
    counts = tuple(response.count(tag) for tag in COUNTED_TAGS)
    once = (THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)
    think_answer_ok = THINK_OPEN not in written and all(written.count(tag) == 1 for tag in once)
    places = [written.find(tag) for tag in once]
    answer = extract_answer(written)
    return Verdict(
        tag_counts=counts,
        tags_balanced=len(set(counts)) == 1,
        searched=any(s.source == TokenSource.OBSERVATION for s in segments),
        think_answer_ok=think_answer_ok,
        ordered=think_answer_ok and places == sorted(places),
        has_chinese=_CHINESE.search(written) is not None,
        says_assistant="Assistant" in written or "assistant" in written,
        invented_documents=any(tag in written for tag in DOCUMENT_TAGS),
        answer=answer,
        answer_words=len((answer or "").split()),
        answer_has_tag=any(tag in (answer or "") for tag in (*QUERY_TAGS, *DOCUMENT_TAGS)),
    )
