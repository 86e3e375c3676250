"""The oracle searches bytes, token by token, knowing nothing of automata."""

import itertools
import random
import time

import numpy as np
import pytest

from r1s_jax.engine.automaton import StopAutomaton

QUERY, ANSWER = "<|end_of_query|>", "</answer>"


def oracle(stops, tokens):
    """(number of tokens up to the completing one, stop index, end byte), or None."""
    written = b""
    for count, token in enumerate(tokens, start=1):
        for byte in token:
            written += bytes([byte])
            done = [s for s in stops if written.endswith(s.encode())]
            if done:
                return count, stops.index(max(done, key=len)), len(written)
    return None


def check(automaton, stops, vocab, ids):
    """Runs one turn from the start state, as every turn does, and compares."""
    state, seen = automaton.start, None
    for count, token in enumerate(ids, start=1):
        state = automaton.advance(state, token)
        if automaton.accepting[state] and seen is None:
            seen = (count, automaton.stop_of_state[state])
        assert (automaton.stop_of_state[state] is None) == (seen is None)
        if seen is not None:
            assert automaton.stop_of_state[state] == seen[1]  # absorbing
    expected = oracle(stops, [vocab[i] for i in ids])
    match = automaton.match_end(b"".join(vocab[i] for i in ids))
    if expected is None:
        assert seen is None and match is None
    else:
        assert seen == expected[:2]
        assert match == expected[1:]


def handmade(stops):
    """Single bytes, pieces of the stops with bytes before and after, halves of characters."""
    pieces = {bytes([b]) for b in range(256)} | {b""}
    for stop in stops:
        raw = stop.encode()
        for i, j in itertools.combinations(range(len(raw) + 1), 2):
            if j - i <= 6 or i == 0 or j == len(raw):
                pieces |= {raw[i:j]}
        for i in range(len(raw)):
            pieces |= {raw[i:] + b"\n\n", b"x" + raw[: i + 1], raw[:i] + raw, raw[:i] + raw[0:1]}
    pieces |= {"ü".encode()[:1] + b"<", b"\xbc<|", "北".encode()[1:], b"<<|end", b"||>", b">\n\n"}
    pieces |= {b"<|im_end|>", b"<|endoftext|>"}
    return [b"", *sorted(pieces - {b""}), b"", b""]


def random_turn(rng, vocab, stops):
    """Half noise, half a stop string cut into tokens at random, with bits that nearly match."""
    index = {b: i for i, b in enumerate(vocab)}
    ids = []
    for _ in range(rng.randint(1, 4)):
        kind = rng.random()
        if kind < 0.4:
            ids += rng.choices(range(len(vocab)), k=rng.randint(1, 6))
            continue
        text = rng.choice(stops).encode()
        if kind < 0.6:
            cut = rng.randrange(len(text))
            text = (
                text[:cut]
                + rng.choice([b"", text[:1], b"\xc3", b"x"])
                + text[rng.randint(0, cut) :]
            )
        text = rng.choice([b"", b"x", b"<", "ü".encode()]) + text + rng.choice([b"", b"\n\n", b">"])
        while text:
            length = rng.choice([n for n in range(1, len(text) + 1) if text[:n] in index])
            ids.append(index[text[:length]])
            text = text[length:]
    return ids


@pytest.mark.parametrize(
    "stops",
    [
        (QUERY,),
        (QUERY, ANSWER),
        ("aa", "aab", "ba", "aabaa"),
        ("bc", "abcd", "abc", "c<"),
        ("abcd", "bc", "b<d"),
        ("ü>", "\u00fc\u00fc", "北京"),
    ],
)
def test_random_and_adversarial_turns(stops):
    vocab = handmade(stops)
    automaton = StopAutomaton.build(stops, vocab)
    assert automaton.table.dtype == np.int16
    assert automaton.table.shape == (len(automaton.accepting), len(vocab))
    rng = random.Random(1)
    hits = 0
    for _ in range(1200):
        ids = random_turn(rng, vocab, stops)
        check(automaton, stops, vocab, ids)
        hits += oracle(stops, [vocab[i] for i in ids]) is not None
    assert 300 < hits < 1199


def test_every_two_and_three_token_cut_of_a_stop_string():
    vocab = handmade((QUERY,))
    index = {b: i for i, b in enumerate(vocab)}
    automaton = StopAutomaton.build((QUERY,), vocab)
    raw = QUERY.encode()
    for i, j in itertools.combinations_with_replacement(range(len(raw) + 1), 2):
        parts = [b"<", raw[:i], raw[i:j], raw[j:]]  # a false start in front: "<<|end…"
        check(automaton, (QUERY,), vocab, [index[p] for p in parts if p in index])
    # Whole token: starts before the tag, carries bytes beyond it.
    beyond = index[raw[-1:] + b"\n\n"]
    check(automaton, (QUERY,), vocab, [index[raw[:-1]], beyond])
    assert automaton.match_end(b"a" + raw + b"\n\n") == (0, 1 + len(raw))


def test_first_completed_in_a_token_wins_and_the_rest_is_ignored():
    vocab = [b"x</answer><|end_of_query|>", b"<|end_of_query|></answer>", b"a", b""]
    automaton = StopAutomaton.build((QUERY, ANSWER), vocab)
    assert [automaton.stop_of_state[automaton.advance(0, t)] for t in range(4)] == [
        1,
        0,
        None,
        None,
    ]
    assert automaton.advance(0, 3) == 0 and automaton.advance(0, 2) == 0


def test_each_turn_starts_anew():
    """A stop split across two turns is none: the state is reset, not carried on."""
    vocab = [b"<|end_of", b"_query|>"]
    automaton = StopAutomaton.build((QUERY,), vocab)
    assert automaton.accepting[automaton.advance(automaton.advance(automaton.start, 0), 1)]
    assert not automaton.accepting[automaton.advance(automaton.start, 1)]


def test_banned_tokens_are_those_that_would_complete_the_string():
    vocab = [b"<|begin_of", b"_query|>", b"_query|", b">\n", b"a", b"_query|>x"]
    automaton = StopAutomaton.build(("<|begin_of_query|>",), vocab)
    state = automaton.advance(automaton.start, 0)
    banned = automaton.accepting[automaton.table[state]]
    assert banned.tolist() == [False, True, False, False, False, True]
    assert automaton.accepting[automaton.table[automaton.advance(state, 2)]].tolist()[3]
    assert not automaton.accepting[automaton.table[automaton.start]].any()


def test_with_a_trained_bpe():
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    from r1s_jax.protocol.tokenizer import byte_alphabet

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=alphabet)
    corpus = [f"Zürich 北京{QUERY}<|begin", f"{QUERY}\n\n", f"a{ANSWER}\n\n</answers><<|end>>"] * 5
    backend.train_from_iterator(corpus, trainer)
    spelt = byte_alphabet()
    vocab = [
        bytes(spelt[c] for c in backend.id_to_token(i)) for i in range(backend.get_vocab_size())
    ]
    automaton = StopAutomaton.build((QUERY, ANSWER), vocab)
    rng = random.Random(2)
    parts = [QUERY, ANSWER, "</answe", "<|end_of_", "query|>", "\n\n", "ü北", "<", " a", "r>", "|"]
    for _ in range(400):
        text = "".join(rng.choices(parts, k=rng.randint(1, 6)))
        ids = backend.encode(text).ids
        check(automaton, (QUERY, ANSWER), vocab, ids)
        check(automaton, (QUERY, ANSWER), vocab, rng.choices(range(len(vocab)), k=4) + ids)


def test_no_stop_strings_and_wrong_ones():
    automaton = StopAutomaton.build((), [b"a", b""])
    assert automaton.table.tolist() == [[0, 0]] and not automaton.accepting.any()
    assert automaton.match_end(b"anything") is None
    for wrong in (("",), ("a", "a")):
        with pytest.raises(ValueError, match="stop strings"):
            StopAutomaton.build(wrong, [b"a"])
    with pytest.raises(ValueError, match="0 tokens"):
        StopAutomaton.build(("a",), [])


def test_a_vocabulary_of_the_real_size_takes_seconds():
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.geometric(1 / 6.5, 152_000), 128)
    vocab = [rng.bytes(n) for n in lengths.tolist()]
    begin = time.perf_counter()
    automaton = StopAutomaton.build((QUERY, ANSWER, "<|begin_of_query|>"), vocab)
    assert automaton.table.shape == (len(automaton.accepting), 152_000)
    assert 35 <= len(automaton.accepting) <= 45
    assert time.perf_counter() - begin < 10
