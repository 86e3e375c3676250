"""One episode, step by step, on hand-written turns."""

import random

import numpy as np
import pytest

from r1s_jax.engine.automaton import StopAutomaton
from r1s_jax.engine.programs import Stop
from r1s_jax.protocol.observation import render_documents
from r1s_jax.rollout.episode import STOP_STRINGS, Episode, EpisodeLimits, Need
from r1s_jax.types import Document, RetrievalFailure, StopReason, TokenSource
from tests import tiny

TOKENIZER = tiny.tokenizer()
STOPS = StopAutomaton.build(STOP_STRINGS, TOKENIZER.token_bytes)
EOS = TOKENIZER.eos_ids[0]
PROMPT, SAMPLED, OBSERVATION = TokenSource
QUERY = "I look.<|begin_of_query|> who <|end_of_query|>"
ANSWER = "</think><answer>x</answer>"
DOCUMENT = Document(id="d", title="T", text="t")


def episode(*, prompt=(1, 2, 3), opening="", **limits):
    return Episode(
        tiny.question("q"),
        attempt=4,
        sample=5,
        prompt_ids=prompt,
        tokenizer=TOKENIZER,
        limits=EpisodeLimits(**{"max_searches": 2, "max_new_tokens": 100, "context": 500} | limits),
        match_end=STOPS.match_end,
        weights_version=6,
        opening=opening,
    )


def write(e, text, stop=Stop.STRING, chunk=1000):
    """Writes a text (or ids) in chunks; returns its ids. Log-probs are -1, -2, ..."""
    ids = TOKENIZER.encode(text) if isinstance(text, str) else text
    for start in range(0, len(ids), chunk):
        piece = ids[start : start + chunk]
        last = start + chunk >= len(ids)
        logprobs = -np.arange(start + 1, start + 1 + len(piece), dtype=np.float32)
        e.write(np.array(piece), logprobs, logprobs / 2, stop if last else Stop.RUNNING)
    return ids


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_a_whole_episode_token_by_token(chunk):
    """Invariants 1 and 2: ids as sampled, each with source and log-prob, whatever the chunks."""
    e = episode()
    first = write(e, QUERY, chunk=chunk)
    assert (e.need, e.query) == (Need.DOCUMENTS, "who")
    documents = e.observe((DOCUMENT,))
    block = "<|begin_of_documents|>\n(1)Title: T Text: t\n<|end_of_documents|>\n\n"
    assert documents == TOKENIZER.encode(block)
    assert e.need == Need.TOKENS
    second = write(e, ANSWER, chunk=chunk)
    assert e.need == Need.NOTHING
    t = e.trajectory()
    n, d, m = len(first), len(documents), len(second)
    assert t.token_ids_T.tolist() == [1, 2, 3, *first, *documents, *second]
    assert t.sources_T.tolist() == [PROMPT] * 3 + [SAMPLED] * n + [OBSERVATION] * d + [SAMPLED] * m
    logprobs = [0, 0, 0, *range(-1, -n - 1, -1), *[0] * d, *range(-1, -m - 1, -1)]
    assert t.logprobs_T.tolist() == logprobs
    assert t.drawn_logprobs_T.tolist() == [x / 2 for x in logprobs]
    assert [(s.source, s.text) for s in t.segments] == [
        (SAMPLED, QUERY),
        (OBSERVATION, block),
        (SAMPLED, ANSWER),
    ]
    assert [(s.query, s.documents) for s in t.searches] == [("who", (DOCUMENT,))]
    assert (t.attempt, t.sample, t.weights_version) == (4, 5, 6)
    assert t.stop_reason == StopReason.ANSWER and t.question.id == "q"
    assert t.written == QUERY + ANSWER and t.response == QUERY + block + ANSWER
    assert t.sampled_count == n + m


def test_ids_are_not_retokenised():
    """Invariant 1: an odd way to spell a text stays as it was sampled."""
    odd = [TOKENIZER.token_bytes.index(bytes([b])) for b in QUERY.encode()]
    assert odd != TOKENIZER.encode(QUERY)
    e = episode()
    write(e, odd)
    assert e.query == "who"
    e.observe(RetrievalFailure(reason="gone"))
    assert e.trajectory().token_ids_T.tolist() == [1, 2, 3, *odd]


def test_bytes_behind_the_stop_string():
    """Invariant 4: the completing token stays whole; its spare bytes are no text, in no turn."""
    spare = [*TOKENIZER.encode("</answer"), tiny.token_id(">\n")]
    e = episode()
    write(e, spare)
    t = e.trajectory()
    assert t.token_ids_T.tolist() == [1, 2, 3, *spare] and t.sources_T[-1] == SAMPLED
    assert t.response == "</answer>" and t.stop_reason == StopReason.ANSWER
    query = [*TOKENIZER.encode("<|begin_of_query|>a<|end_of_query"), tiny.token_id("|>\n")]
    e = episode()
    write(e, query)
    assert e.query == "a" and e.text == "<|begin_of_query|>a<|end_of_query|>"


def test_an_invented_document_block_is_sampled():
    """Invariant 2: what the policy makes up is its own, to be trained on, and brings nothing."""
    invented = "<|begin_of_documents|>\n(1)Title: T Text: t\n<|end_of_documents|>\n\n" + ANSWER
    e = episode()
    ids = write(e, invented)
    t = e.trajectory()
    assert t.sources_T.tolist() == [PROMPT] * 3 + [SAMPLED] * len(ids)
    assert t.searches == () and [s.source for s in t.segments] == [SAMPLED]


@pytest.mark.parametrize(
    "text, stop, reason",
    [
        (ANSWER, Stop.STRING, StopReason.ANSWER),
        ("<|end_of_query|>", Stop.STRING, StopReason.EMPTY_QUERY),
        ("<|begin_of_query|> '' <|end_of_query|>", Stop.STRING, StopReason.EMPTY_QUERY),
        ([5, EOS], Stop.EOS, StopReason.EOS),
        ([EOS], Stop.EOS, StopReason.EOS),
        ([5] * 9, Stop.BUDGET, StopReason.TURN_LENGTH),
        ([5] * 7, Stop.BUDGET, StopReason.CONTEXT_FULL),
    ],
)
def test_how_a_turn_ends(text, stop, reason):
    """Each way to stop without a search; the budget that was smaller gives the reason."""
    context = 10 if reason == StopReason.CONTEXT_FULL else 500
    e = episode(max_new_tokens=9, context=context)
    assert e.budget == (7 if context == 10 else 9)
    ids = write(e, text, stop)
    t = e.trajectory()
    assert t.stop_reason == reason and t.sampled_count == len(ids) and not t.searches


def test_eos_is_a_token_but_no_text():
    """Its literal text would count as the policy's words."""
    e = episode()
    write(e, [*TOKENIZER.encode("hm"), EOS], Stop.EOS)
    assert e.trajectory().written == "hm" and e.trajectory().token_ids_T[-1] == EOS


def test_one_search_too_many():
    """The third query of two allowed ends the episode and is not asked."""
    e = episode()
    for _ in range(2):
        write(e, QUERY)
        assert e.observe(()) == TOKENIZER.encode(render_documents((), ()))
    write(e, QUERY)
    t = e.trajectory()
    assert t.stop_reason == StopReason.MAX_SEARCHES and len(t.searches) == 2
    assert episode(max_searches=0).stop_reason is None


def test_no_search_allowed():
    """max_searches = 0: the first query ends it."""
    e = episode(max_searches=0)
    write(e, QUERY)
    assert e.trajectory().stop_reason == StopReason.MAX_SEARCHES


def test_retrieval_failure():
    """Invariant 8: no document block, not even an empty one; the ids end with the query."""
    e = episode()
    ids = write(e, QUERY)
    assert e.observe(RetrievalFailure(reason="down")) == []
    t = e.trajectory()
    assert t.stop_reason == StopReason.RETRIEVAL_FAILED and t.searches == ()
    assert t.token_ids_T.tolist() == [1, 2, 3, *ids]


@pytest.mark.parametrize("room, reason", [(1, None), (0, StopReason.CONTEXT_FULL)])
def test_documents_and_the_context(room, reason):
    """Documents need room for themselves and one more token; else nothing of them is kept."""
    used = 3 + len(TOKENIZER.encode(QUERY))
    block = len(TOKENIZER.encode(render_documents((DOCUMENT,), ())))
    e = episode(context=used + block + room)
    write(e, QUERY)
    ids = e.observe((DOCUMENT,))
    assert e.stop_reason == reason
    if reason is None:
        assert len(ids) == block and e.budget == 1
    else:
        t = e.trajectory()
        assert ids == [] and len(t.token_ids_T) == used and len(t.segments) == 1
        assert len(t.searches) == 1  # the search took place


def test_opening():
    """Forced search: the opening's ids are PROMPT, its text begins the first turn, only that."""
    opening = "Let me see.<|begin_of_query|>"
    ids = [1, *TOKENIZER.encode(opening)]
    e = episode(prompt=ids, opening=opening)
    assert e.text == opening
    write(e, " who<|end_of_query|>")
    assert e.query == "who" and e.text == opening + " who<|end_of_query|>"
    e.observe((DOCUMENT,))
    write(e, ANSWER)
    t = e.trajectory()
    assert t.written == opening + " who<|end_of_query|>" + ANSWER
    assert (t.sources_T[: len(ids)] == PROMPT).all() and t.sources_T[len(ids)] == SAMPLED


def test_an_opening_that_holds_a_stop_string():
    """Bug: the host searched the opening too and took its stop for the turn's own."""
    e = episode(opening="no </answer> yet")
    write(e, QUERY)
    assert e.need == Need.DOCUMENTS and e.query == "who"
    assert e.text == "no </answer> yet" + QUERY


def test_partial_characters():
    """Half a character at the end of a turn is U+FFFD in the text and itself in the ids."""
    half = TOKENIZER.encode("ü")[:1]
    e = episode(max_new_tokens=1)
    write(e, half, Stop.BUDGET)
    t = e.trajectory()
    assert t.written == "\ufffd" and t.token_ids_T.tolist() == [1, 2, 3, *half]


def test_documents_with_half_surrogates():
    """Bug: JSON's "\\ud800" in a document crashed the tokenizer, and the rollout with it."""
    e = episode()
    write(e, QUERY)
    e.observe((Document(id="d", title="T", text="a\ud800b"),))
    assert "Text: a?b\n" in e.text and e.need == Need.TOKENS


def test_text_while_it_is_written():
    """`watch` may print the growing text at any time."""
    e, seen = episode(), ""
    for token in TOKENIZER.encode(QUERY)[:-1]:
        e.write([token], [-1.0], [-1.0], Stop.RUNNING)
        assert e.text.startswith(seen)
        seen = e.text
    assert seen == QUERY[:-2]  # the last token is "|>"


def test_unfinished_episodes_are_no_trajectories():
    """A boundary: ValueError, naming the question and what it waits for."""
    e = episode()
    with pytest.raises(ValueError, match="'q' still needs tokens"):
        e.trajectory()
    write(e, QUERY)
    with pytest.raises(ValueError, match="'q' still needs documents"):
        e.trajectory()


CONTROLS = [*TOKENIZER.control_strings, *STOP_STRINGS]


@pytest.mark.parametrize("seed", range(3))
def test_documents_are_data(seed):
    """Invariant 9: no document opens a query, closes a block, gives an answer or makes a control
    token, whole, cut, overlapping or across title and text.
    """
    rng = random.Random(seed)
    documents = []
    for number in range(3):
        pieces = [rng.choice([s, s[: len(s) // 2], s[len(s) // 2 :], "x"]) for s in CONTROLS]
        rng.shuffle(pieces)
        half = len(pieces) // 2
        documents.append(
            Document(
                id=str(number), title="".join(pieces[:half]), text=rng.choice(pieces).join(pieces)
            )
        )
    e = episode(context=100_000)
    write(e, QUERY)
    ids = e.observe(tuple(documents))
    added = {TOKENIZER.token_bytes.index(s.encode()) for s in TOKENIZER.added_tokens}
    assert not added.intersection(ids)
    block = e.text.removeprefix(QUERY)
    inside = block.removeprefix("<|begin_of_documents|>").removesuffix("<|end_of_documents|>\n\n")
    assert not any(s in inside for s in CONTROLS)
    assert TOKENIZER.decode(ids) == block
    assert e.query == "who"
    write(e, "<|end_of_query|>")  # nothing was opened by the documents
    assert e.trajectory().stop_reason == StopReason.EMPTY_QUERY
