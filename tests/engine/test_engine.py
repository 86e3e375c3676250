"""The four verbs on a real, if tiny, policy: exact numbers, exact stops, exact budgets."""

import dataclasses
import functools
from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1s_jax.engine.programs import Stop
from r1s_jax.engine.sampling import SamplingConfig, row_seed
from r1s_jax.rollout.episode import STOP_STRINGS
from r1s_jax.types import UserError
from tests import tiny

GREEDY = SamplingConfig(temperature=0.0)
MANY = 64  # episodes of a test, far more than there are slots


@dataclasses.dataclass
class Played:
    """An episode: all its ids, and each turn's (first position, tokens, log-probs, stop)."""

    ids: list
    turns: list


def prompt(i):
    """Ids of a prompt of 1 to 33 tokens; 17 and 33 fill pages of 16 but for the last token."""
    length = (1, 2, 5, 9, 16, 17, 18, 33)[i % 8]
    return [(7 * i + 3 * j) % 256 for j in range(length)]


def play(engine, count, sampling, budgets, documents):
    """Plays episodes of len(budgets) turns; `documents[t]` (ids) is written before turn t + 1."""
    episodes = [Played(ids=prompt(i), turns=[]) for i in range(count)]
    waiting, playing = deque(enumerate(episodes)), {}
    while waiting or playing:
        while waiting:
            i, episode = waiting[0]
            ref = engine.prefill(episode.ids)
            if ref is None:
                break
            seed = row_seed(0, "train", 0, f"q{i}", 0, 0)
            slot = engine.insert(ref, seed=seed, budget=budgets[0])
            engine.drop(ref)
            if slot is None:
                break
            waiting.popleft()
            playing[slot] = episode, (len(episode.ids), [], [])
        for written in engine.decode_chunk(sampling).written:
            assert 0 < len(written.tokens) <= engine.config.chunk
            episode, turn = playing[written.slot]
            turn[1].extend(written.tokens.tolist())
            turn[2].extend(written.logprobs.tolist())
            if written.stop == Stop.RUNNING:
                continue
            episode.turns.append((*turn, written.stop))
            episode.ids += turn[1]
            if len(episode.turns) == len(budgets):
                engine.release(written.slot)
                del playing[written.slot]
                continue
            tokens = documents[len(episode.turns) - 1]
            engine.extend(written.slot, tokens, budget=budgets[len(episode.turns)])
            episode.ids += tokens
            playing[written.slot] = episode, (len(episode.ids), [], [])
    assert engine.idle
    return episodes


@functools.cache
def forward():
    """Full forward pass over right-padded rows: logits [B, T, V]."""
    return jax.jit(functools.partial(tiny.full_logits, tiny.MODEL))


def full_logits(episodes):
    tokens = np.zeros((MANY, tiny.CONFIG.context), np.int32)
    for row, e in enumerate(episodes):
        tokens[row, : len(e.ids)] = e.ids
    return np.asarray(forward()(tiny.params(), tokens), np.float64)


def ids_of(*texts):
    return [tiny.token_id(t) for t in texts]


# Blocks have 12 tokens and pages 16: documents of 1, of two blocks and one more, of four. Each
# ends with `begin`, after which the policy likes to write `_of_query|>`.
DOCUMENTS = [[5, 6] * (n // 2) + [9] * (n % 2) + ids_of("begin") for n in (0, 24, 47)]
BUDGETS = [2, 9, 5, 20]


@pytest.fixture(scope="module")
def sampled():
    """Episodes of four turns at temperature 1."""
    return play(tiny.engine(), MANY, tiny.SAMPLED, BUDGETS, DOCUMENTS)


def test_sampler_and_full_forward_agree(sampled):
    """Invariant 3: across turns and pieces of documents the log-probs are those of a full pass."""
    logits = full_logits(sampled)
    log_softmax = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for row, episode in enumerate(sampled):
        for first, tokens, logprobs, _ in episode.turns:
            assert episode.ids[first : first + len(tokens)] == tokens
            expected = log_softmax[row, np.arange(len(tokens)) + first - 1, tokens]
            np.testing.assert_allclose(logprobs, expected, atol=1e-5, rtol=0)


def test_greedy_equals_full_forward():
    """Invariant 5: with the KV kept across turns, each token is the full pass's likeliest."""
    episodes = play(tiny.engine(), 8, GREEDY, [7, 13], [DOCUMENTS[1]])
    logits = full_logits(episodes)
    for row, episode in enumerate(episodes):
        for first, tokens, _, _ in episode.turns:
            at = np.arange(len(tokens)) + first - 1
            picked = logits[row, at, tokens]
            np.testing.assert_allclose(picked, logits[row, at].max(-1), atol=1e-5, rtol=0)


def oracle(tokens, budget):
    """(number of tokens, why), searching bytes."""
    written = b""
    for count, token in enumerate(tokens, start=1):
        written += tiny.tokenizer().token_bytes[token]
        if any(s.encode() in written for s in STOP_STRINGS):
            return count, Stop.STRING
        if token in tiny.tokenizer().eos_ids:
            return count, Stop.EOS
        if count == budget:
            return count, Stop.BUDGET
    raise AssertionError("no reason to stop")


def test_stops_are_exact(sampled):
    """Invariant 4: every turn stops where a search of that turn's own bytes says, and not later.

    Among the turns are some that a stop string ends with bytes left over, and some that begin with
    the rest of a stop string begun in the turn before, which must not stop them.
    """
    left_over = traps = 0
    seen = set()
    for episode in sampled:
        before = b""
        for (_, tokens, _, stop), budget in zip(episode.turns, BUDGETS, strict=True):
            assert (len(tokens), stop) == oracle(tokens, budget)
            seen.add(stop)
            text = tiny.tokenizer().decode_bytes(tokens)
            left_over += stop == Stop.STRING and text.endswith(b">\n")
            rest = b"_of_query|>"
            traps += before.endswith(b"<|end") and text.startswith(rest) and len(tokens) > 3
            before = text
    assert seen == {Stop.STRING, Stop.EOS, Stop.BUDGET} and left_over > 3 and traps > 0


def test_match_end_speaks_of_the_bytes():
    """The host finds the stop string and its end, the bytes behind it left out."""
    match = tiny.engine().match_end(b"\xff x</answer>\n")
    assert match == (STOP_STRINGS.index("</answer>"), 12)
    assert tiny.engine().match_end(b"<|end_of_query|") is None


@pytest.fixture(scope="module")
def banned():
    """Episodes that cannot write `_query|>`; the documents between their turns end with `query`."""
    config = dataclasses.replace(tiny.BANNED, temperature=1.0)
    return play(tiny.engine(), MANY, config, [4, 30], [[5, 6, *ids_of("query")]])


def test_banned_strings_never_appear(banned, sampled):
    """Not within a token, not across tokens or chunks; log-probs stay the full softmax's."""
    texts = [
        tiny.tokenizer().decode_bytes(tokens)
        for episode in banned
        for _, tokens, _, _ in episode.turns
    ]
    assert not any(s.encode() in text for s in tiny.BANNED.banned for text in texts)
    free = b" ".join(tiny.tokenizer().decode_bytes(e.ids) for e in sampled)
    assert all(free.count(s.encode()) > 5 for s in tiny.BANNED.banned)
    # The ban is no broader than it says: up to the last token the string may be written, and its
    # rest may begin the next turn, as both turns are searched on their own.
    assert sum(b"_query" in text for text in texts) > 5
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    assert any(a.endswith(b"_query") and b.startswith(b"|>") for a, b in pairs)
    logits = full_logits(banned)
    log_softmax = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for row, episode in enumerate(banned):
        for first, tokens, logprobs, _ in episode.turns:
            expected = log_softmax[row, np.arange(len(tokens)) + first - 1, tokens]
            np.testing.assert_allclose(logprobs, expected, atol=1e-5, rtol=0)


def test_a_ban_leaves_the_end_of_sequence_free():
    """Bug: without `<|` a policy could not write `<|endoftext|>` either, and never ended by it."""
    tables = tiny.engine()._stop_tables(("<|",))
    banned_V = np.asarray(tables.banned_accepting_S)[np.asarray(tables.banned_next_SV)[0]]
    assert [bool(banned_V[tiny.token_id(t)]) for t in ("<|", "x<|", "</")] == [True, True, False]
    assert not banned_V[list(tiny.tokenizer().eos_ids)].any()
    assert banned_V[tiny.token_id(tiny.IM_END)]  # another added token, which ends nothing


def test_ban_is_the_first_draw_that_differs(banned, sampled):
    """Up to its first forbidden token a row draws what it would have drawn without the ban."""
    same = 0
    for with_ban, without in zip(banned, sampled, strict=True):
        a, b = with_ban.turns[0][1], without.turns[0][1]
        written = tiny.tokenizer().decode_bytes(b)
        if not any(s.encode() in written for s in tiny.BANNED.banned):
            assert a[: len(b)] == b
            same += 1
    assert same > MANY // 2


def test_prompts_fill_all_but_one_token():
    """One token has to be sampled; a prompt too long, or none at all, is an error."""
    engine = tiny.engine()
    for length in (0, 176):
        with pytest.raises(ValueError, match=rf"{length} tokens, engine.context = 176"):
            engine.prefill([1] * length)
    ref = engine.prefill([1] * 175)
    assert ref is not None
    engine.drop(ref)
    assert engine.idle


def test_weights_may_be_donated_afterwards():
    """set_weights copies: the learner may donate or delete its parameters."""
    engine = tiny.engine()
    before = play(engine, 4, GREEDY, [5], [])
    mine = jax.tree.map(lambda p: jnp.array(p, copy=True), tiny.params())
    engine.set_weights(mine, 8)
    assert engine.weights_version == 8
    jax.tree.map(lambda p: p.delete(), mine)
    assert play(engine, 4, GREEDY, [5], []) == before
    engine.set_weights(tiny.params(), 7)


def test_new_weights_are_used():
    """Invariant 5's other side: nothing of the old weights is left in programs or caches."""
    engine = tiny.engine()
    before = play(engine, 4, GREEDY, [5], [])
    engine.set_weights(jax.tree.map(lambda p: -p, tiny.params()), 8)
    assert play(engine, 4, GREEDY, [5], []) != before
    engine.set_weights(tiny.params(), 7)
    assert play(engine, 4, GREEDY, [5], []) == before


def test_numbers_that_are_not_finite_stay_in_their_episode():
    """Pages come back from episodes whose numbers went wrong: their next owners see nothing."""
    engine = tiny.engine()
    before = play(engine, MANY, tiny.SAMPLED, BUDGETS, DOCUMENTS)
    engine.set_weights(jax.tree.map(lambda p: p * jnp.nan, tiny.params()), 8)
    broken = play(engine, MANY, tiny.SAMPLED, BUDGETS, DOCUMENTS)
    assert all(np.isnan(logprobs).all() for e in broken for _, _, logprobs, _ in e.turns)
    engine.set_weights(tiny.params(), 7)
    assert play(engine, MANY, tiny.SAMPLED, BUDGETS, DOCUMENTS) == before


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"context": 300}, UserError, r"engine.context = 300, .*max_position_embeddings = 256"),
        ({"chunk": 0}, UserError, r"engine.chunk = 0, must be at least 1"),
        ({"tensor": 2}, UserError, r"engine.tensor = 2 does not divide the mesh's 1 devices"),
    ],
)
def test_configs_that_cannot_work(changes, error, message):
    """One line at the start, with both numbers."""
    with pytest.raises(error, match=message):
        tiny.new_engine(**changes)


def test_vocabulary_sizes_must_agree():
    """Bug: a table shorter than the vocabulary was read clamped, and stops went wrong silently."""
    from r1s_jax.engine.engine import Engine
    from r1s_jax.sharding import MeshConfig, make_mesh

    arguments = {"mesh": make_mesh(MeshConfig()), "stop_strings": STOP_STRINGS, "eos_ids": (1,)}
    with pytest.raises(ValueError, match="311 entries, vocab_size = 312"):
        Engine(tiny.MODEL, tiny.CONFIG, token_bytes=[b"x"] * 311, **arguments)
    engine = Engine(tiny.MODEL, tiny.CONFIG, token_bytes=[b"x"] * 312, **arguments)
    with pytest.raises(ValueError, match="no weights yet"):
        engine.warm_up([GREEDY])
