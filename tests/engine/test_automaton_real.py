"""The stop automaton over real vocabularies, against a search in bytes.

The oracle joins the bytes of a turn and looks the stop strings up in them; it knows no automaton.
The turns are made to be hard: stop strings that begin and end within tokens, cut anywhere,
interrupted, misspelt, after halves of characters.
"""

import bisect
import collections
import dataclasses
import itertools
import random
import time

import numpy as np
import pytest

from r1s_jax.engine.automaton import StopAutomaton
from r1s_jax.protocol.tags import PROTOCOL_TAGS
from r1s_jax.protocol.tokenizer import Tokenizer
from r1s_jax.rollout.episode import STOP_STRINGS
from r1s_jax.run.evaluate import NO_SEARCH
from tests import real

STOPS = [stop.encode() for stop in STOP_STRINGS]
BANNED = tuple(NO_SEARCH.banned)

# name -> (where it is, rows of the model's embedding, in which ids beyond the tokenizer's are free)
VOCABULARIES = {
    "qwen3": (real.qwen3_tokenizer, 151_936),
    "llama": (real.llama_tokenizer, 128_256),
    "qwen2_5": (real.qwen2_5_tokenizer, 152_064),
}

# Share of each kind of turn; the first four are made against the automaton.
KINDS = {
    "cut": 0.25,  # a stop string cut into tokens anywhere
    "merged": 0.2,  # its first token begins before it, its last one ends after it
    "misspelt": 0.15,
    "interrupted": 0.1,  # a token of another sort within it
    "written": 0.15,  # as the tokenizer itself writes texts with stop strings
    "random": 0.15,
}
AROUND = [
    b"", b" ", b"\n\n", b"<", b"<|", b"</", b"x", b"></", b">", b'">', b"\r\n", "ü".encode(),
    "北京".encode(), b"\xc3", b"\xbc", b"\xe5\x8c", b"\x97", "🎉".encode()[:3], "🎉".encode()[2:],
    b"\xff", "e\u0301".encode(), b"query|>", b"<|end_of_", b"</think>", b"<answer>",
    b"<|begin_of_query|>",
]  # fmt: skip
WORDS = [
    *PROTOCOL_TAGS, *PROTOCOL_TAGS, *STOP_STRINGS, *STOP_STRINGS, "</answe", "<|end_of_", "query|>",
    "<|end_of_documents|>", "\n\n", "\r\n", " ", "<", ">", '">', "</", "r>", "|", " Bern", "Zürich",
    "北京", "🎉", "ü", "e\u0301", "1914", " the", ".", "');", "</Answer>", "answer", "query",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    name: str
    tokenizer: Tokenizer
    bytes: tuple[bytes, ...]
    index: dict[bytes, int]
    openers: list[tuple[int, int, bytes]]  # (stop, bytes of it that the token ends with, token)
    closers: list[tuple[int, int, bytes]]  # (stop, bytes of it before the token, token)


@pytest.fixture(
    scope="module",
    params=["qwen3", "llama", pytest.param("qwen2_5", marks=pytest.mark.slow)],
)
def vocabulary(request):
    where, rows = VOCABULARIES[request.param]
    tokenizer = Tokenizer.load(where(), vocab_size=rows)
    spelt = tokenizer.token_bytes
    index = {b: i for i, b in enumerate(spelt) if b}
    openers, closers = [], []
    for s, stop in enumerate(STOPS):
        first, last = ([b for b in index if byte in b] for byte in (stop[:1], stop[-1:]))
        for cut in range(1, len(stop)):
            head, tail = stop[:cut], stop[cut:]
            openers += [(s, cut, b) for b in first if b.endswith(head) and b != head]
            closers += [(s, cut, b) for b in last if b.startswith(tail) and b != tail]
    return Vocabulary(request.param, tokenizer, spelt, index, openers, closers)


class Turns:
    """Makes turns as lists of ids, every draw from one seed."""

    def __init__(self, vocabulary, seed):
        self.v, self.rng = vocabulary, random.Random(seed)
        self.of_stop = [
            ([o[1:] for o in vocabulary.openers if o[0] == s],
             [c[1:] for c in vocabulary.closers if c[0] == s])
            for s in range(len(STOPS))
        ]  # fmt: skip
        names = vocabulary.tokenizer.added_tokens
        self.added = [vocabulary.index[name.encode()] for name in names]
        self.free = [i for i, b in enumerate(vocabulary.bytes) if not b]

    def make(self, count):
        """[(kind, ids)], `count` turns in all, in the order of the kinds."""
        turns = []
        for kind, share in KINDS.items():
            number = round(count * share)
            if kind == "written":
                texts = ["".join(self.rng.choices(WORDS, k=self.rng.randint(3, 9)))
                         for _ in range(number)]  # fmt: skip
                turns += [(kind, ids) for ids in self.v.tokenizer.encode_batch(texts)]
            else:
                turns += [(kind, getattr(self, kind)()) for _ in range(number)]
        return turns

    def cut(self):
        """Sometimes two of them, or one in which another begins."""
        stop, other = self.rng.choices(STOPS, k=2)
        draw = self.rng.random()
        if draw < 0.2:
            stop = stop + self.rng.choice(AROUND) + other
        elif draw < 0.4:
            stop = other[: self.rng.randrange(1, len(other))] + stop
        return self.ids(self.noise() + stop + self.noise())

    def merged(self):
        s = self.rng.randrange(len(STOPS))
        openers, closers = self.of_stop[s]
        (begun, opener), (left, closer) = self.rng.choice(openers), self.rng.choice(closers)
        middle = self.ids(STOPS[s][begun:left])
        tokens = [self.v.index[opener], *middle, self.v.index[closer]]
        return [*self.some(2), *tokens, *self.ids(self.noise())]

    def misspelt(self):
        stop, rng = self.rng.choice(STOPS), self.rng
        at = rng.randrange(len(stop))
        wrong = rng.choice([
            stop[:at] + stop[at + 1 :],
            stop[:at] + stop[at : at + 1] + stop[at:],
            stop[:at] + bytes([rng.randrange(256)]) + stop[at + 1 :],
            stop[:at] + rng.choice(AROUND) + stop[at:],
            stop[:at] + stop[: at // 2] + stop[at:],
            stop[:-1],
            stop[1:],
            stop[: at + 1].upper() + stop[at + 1 :],
        ])  # fmt: skip
        return self.ids(self.noise() + wrong + rng.choice([b"\n", b"x", b" "]) + self.noise())

    def interrupted(self):
        """Free ids have no bytes and do not interrupt; all others do, <|im_end|> too."""
        ids, rng = self.ids(self.rng.choice(STOPS)), self.rng
        kinds = [self.added, self.free or self.added, range(len(self.v.bytes))]
        for _ in range(rng.choice((1, 1, 2))):
            ids.insert(rng.randint(0, len(ids)), rng.choice(rng.choice(kinds)))
        return ids

    def random(self):
        return self.some(12)

    def some(self, most):
        return [self.rng.randrange(len(self.v.bytes)) for _ in range(self.rng.randint(0, most))]

    def noise(self):
        return b"".join(self.rng.choices(AROUND, k=self.rng.randint(0, 2)))

    def ids(self, text):
        """Cuts bytes into tokens of the vocabulary, each as long as a drawn limit allows."""
        ids, index, start = [], self.v.index, 0
        while start < len(text):
            length = min(1 + int(self.rng.random() * 9), len(text) - start)
            while text[start : start + length] not in index:
                length -= 1
            ids.append(index[text[start : start + length]])
            start += length
        return ids


def search(stops, parts):
    """(number of the completing token, stop, its start and end, ends of the tokens), or None."""
    text, found = b"".join(parts), []
    for number, stop in enumerate(stops):
        start = text.find(stop)
        if start >= 0:
            found.append((start + len(stop), -len(stop), number))
    if not found:
        return None
    end, length, number = min(found)  # the earliest end, of two the longer string
    ends = list(itertools.accumulate(map(len, parts)))
    return bisect.bisect_left(ends, end), number, end + length, end, ends


def walk(automaton, turns):
    """For every turn the number of the token after which the automaton accepts, and its stop."""
    longest = max(map(len, turns))
    ids = np.full((len(turns), longest), -1, np.int32)
    for row, turn in zip(ids, turns, strict=True):
        row[: len(turn)] = turn
    stop_of = np.array([-1 if s is None else s for s in automaton.stop_of_state])
    assert ((stop_of >= 0) == automaton.accepting).all()
    state = np.full(len(turns), automaton.start)
    at = np.full(len(turns), -1)
    stop = np.full(len(turns), -1)
    for number in range(longest):
        token = ids[:, number]
        state = np.where(token >= 0, automaton.table[state, token], state)
        new = automaton.accepting[state] & (at < 0)
        at[new], stop[new] = number, stop_of[state[new]]
    np.testing.assert_array_equal(stop_of[state], stop, err_msg="an accepting state was left")
    return at, stop


def compare(automaton, v, turns):
    """Asserts that automaton and search agree on every turn; returns what was searched out."""
    stops = [s.encode() for s in automaton.stop_strings]
    found = [search(stops, [v.bytes[i] for i in turn]) for turn in turns]
    at, stop = walk(automaton, turns)
    expected = np.array([(-1, -1) if f is None else f[:2] for f in found])
    wrong = np.flatnonzero((expected[:, 0] != at) | (expected[:, 1] != stop))
    examples = [(expected[i], at[i], stop[i], [v.bytes[t] for t in turns[i]]) for i in wrong[:3]]
    assert not len(wrong), f"{len(wrong)} turns differ, such as {examples}"
    return found


def count_what_occurred(v, turns, found):
    """Counted from the turns themselves, not from how they were meant."""
    seen, cuts, openers, closers, ways = collections.Counter(), set(), set(), set(), set()
    for (kind, ids), hit in zip(turns, found, strict=True):
        parts = [v.bytes[i] for i in ids]
        if hit is None:
            seen["no stop"] += 1
            text = b"".join(parts)
            seen["near miss"] += any(s[:-1] in text or s[1:] in text for s in STOPS)
            continue
        at, stop, start, end, ends = hit
        first = bisect.bisect_right(ends, start)
        begin = ends[first] - len(parts[first])
        if begin < start:
            seen["begins before it"] += 1
            openers.add(ids[first])
        if ends[at] > end:
            seen["ends after it"] += 1
            closers.add(ids[at])
        seen["both"] += begin < start and ends[at] > end
        seen["stop"] += 1
        seen[f"stop, {kind}"] += 1
        seen["free id within"] += not all(parts[first : at + 1])
        seen["half a character before it"] += half(b"".join(parts[:first]))
        seen["tokens behind it"] += at + 1 < len(ids)
        cuts.update((stop, e - start) for e in ends[first:at])
        ways.add(tuple(ids[first : at + 1]))
    return seen, cuts, openers, closers, ways


def half(text):
    return "\ufffd" in text.decode(errors="replace")


@pytest.mark.parametrize("count", [20_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_every_stop_and_nothing_but_stops(vocabulary, count):
    """Invariant 4: no miss, no false stop, and the very token that completes the string."""
    v = vocabulary
    automaton = StopAutomaton.build(STOP_STRINGS, v.bytes)
    made = Turns(v, seed=1).make(count)
    turns = [ids for _, ids in made]
    found = compare(automaton, v, turns)
    # The text of the turn is cut at the same byte, on the host.
    for ids, hit in zip(turns[::5], found[::5], strict=True):
        match = automaton.match_end(v.tokenizer.decode_bytes(ids))
        assert match == (None if hit is None else (hit[1], hit[3]))
    # What evaluation bans is found the same way.
    compare(StopAutomaton.build(BANNED, v.bytes), v, turns[::5])

    seen, cuts, openers, closers, ways = count_what_occurred(v, made, found)
    print(f"\n{v.name}: {len(turns):,} turns; {dict(seen.most_common())}")
    print(
        f"  {len(ways):,} ways to spell a stop string; "
        f"{len(openers)} tokens had it begin within, {len(closers)} had it end within"
    )
    assert len(turns) == count
    assert cuts == {(s, cut) for s, stop in enumerate(STOPS) for cut in range(1, len(stop))}
    for what, share in {
        "stop": 0.4, "no stop": 0.3, "near miss": 0.05, "begins before it": 0.2,
        "ends after it": 0.2, "both": 0.15, "half a character before it": 0.05,
        "tokens behind it": 0.2, "stop, written": 0.05, "stop, misspelt": 0.005,
    }.items():  # fmt: skip
        assert seen[what] >= share * count, what
    assert seen["free id within"] >= 0.01 * count or b"" not in v.bytes
    assert openers == {v.index[b] for _, _, b in v.openers}
    assert closers == {v.index[b] for _, _, b in v.closers}
    assert len(openers) > 150 and len(closers) > 250 and len(ways) > 0.15 * count


def test_every_entry_of_the_table(vocabulary):
    """Exhaustive, hence for turns of any length: every token after every beginning of a stop."""
    v = vocabulary
    automaton = StopAutomaton.build(STOP_STRINGS, v.bytes)
    beginnings = {stop[:cut] for stop in STOPS for cut in range(len(stop))}
    state_of = {}
    for begun in beginnings:
        state = automaton.start
        for byte in begun:
            state = automaton.advance(state, v.index[bytes([byte])])
        state_of[begun] = state
    final = {s: state for state, s in enumerate(automaton.stop_of_state) if s is not None}
    states = [*state_of.values(), *final.values()]
    assert sorted(states) == list(range(len(automaton.table)))

    # A token without both brackets that is no piece of a stop leads to nothing.
    matters = [any(x in b for x in (b"<", b">")) or any(b in stop for stop in STOPS)
               for b in v.bytes]  # fmt: skip
    idle = np.flatnonzero(~np.array(matters))
    assert not automaton.table[np.ix_(sorted(state_of.values()), idle)].any()
    for state in final.values():
        assert (automaton.table[state] == state).all()

    for begun, state in state_of.items():
        for i in np.flatnonzero(matters).tolist():
            text = begun + v.bytes[i]
            hit = search(STOPS, [text])
            end = max((b for b in beginnings if text.endswith(b)), key=len)
            assert automaton.table[state, i] == (final[hit[1]] if hit else state_of[end]), text


def test_the_table_is_quick_to_build_and_built_once(vocabulary):
    v = vocabulary
    # With another last token, no test before this one can have built it.
    fresh = (*v.bytes[:-1], f"fresh {v.name}".encode())
    begin = time.perf_counter()
    automaton = StopAutomaton.build(STOP_STRINGS, fresh)
    first = time.perf_counter() - begin
    begin = time.perf_counter()
    again = StopAutomaton.build(list(STOP_STRINGS), list(fresh))
    second = time.perf_counter() - begin
    states, tokens = automaton.table.shape
    print(
        f"\n{v.name}: table {states} x {tokens:,} {automaton.table.dtype}, "
        f"{automaton.table.nbytes / 1e6:.1f} MB; built in {first:.2f} s, again in {second:.3f} s"
    )
    assert first <= 10
    assert again is automaton
    # 15 + 8 beginnings, the empty one, and one state for each of the two strings that is complete.
    assert (states, tokens) == (25, len(v.bytes)) and automaton.table.dtype == np.int16


def test_a_cached_table_belongs_to_its_arguments_and_cannot_be_changed():
    vocab = [b"a", b"b", b""]
    automaton = StopAutomaton.build(("a", "b"), vocab)
    assert StopAutomaton.build(["a", "b"], tuple(vocab)) is automaton
    swapped = StopAutomaton.build(("b", "a"), vocab)
    assert swapped.stop_strings == ("b", "a")
    assert [a.stop_of_state[a.advance(0, 1)] for a in (automaton, swapped)] == [1, 0]
    vocab.reverse()  # a list that is changed afterwards is another vocabulary
    assert StopAutomaton.build(("a", "b"), vocab).table[0].tolist() == [
        0,
        *automaton.table[0, 1::-1],
    ]
    for array in (automaton.table, automaton.accepting):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
