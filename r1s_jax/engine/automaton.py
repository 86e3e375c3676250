"""Exact stops: which token completes a stop string, decided by one table lookup on the device.

A stop string spans several BPE tokens that merge with their neighbours, so it is no sequence of
ids. Here the Aho-Corasick automaton of the strings' *bytes* (Aho & Corasick 1975) is composed with
the vocabulary: `table[state, token]` is the state after all bytes of the token. An accepting state
absorbs, one per string; the first string completed within a token wins and the bytes behind it
are ignored. A row starts each turn in state 0.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np
from jaxtyping import Int


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StopAutomaton:
    """A byte automaton composed with a vocabulary; used for stop strings and for banned ones.

    table: [S, V] int16 (int32 beyond 32,767 states); the state after a whole token.
    accepting: [S] bool. A token is to be *banned* where `accepting[table[state, token]]`.
    stop_of_state: index of the completed string for accepting states, else None.
    stop_strings: the strings, in the order given.
    start: the state a turn begins in, always 0.
    """

    table: np.ndarray
    accepting: np.ndarray
    stop_of_state: tuple[int | None, ...]
    stop_strings: tuple[str, ...]
    start: int = 0

    @classmethod
    def build(cls, stop_strings: Sequence[str], token_bytes: Sequence[bytes]) -> StopAutomaton:
        """Builds the table, under a second for V = 152k and some 40 states; once, then cached.

        Tokens without bytes (padding of the vocabulary) leave the state as it is. Without any
        stop string the automaton has one state and never accepts. Equal arguments give the same
        object, whose arrays are read-only.

        Raises:
            ValueError: an empty or repeated stop string, or an empty vocabulary.
        """
        patterns = [s.encode() for s in stop_strings]
        if not all(patterns) or len(set(patterns)) < len(patterns):
            raise ValueError(f"stop strings must be non-empty and distinct: {list(stop_strings)!r}")
        if not token_bytes:
            raise ValueError("cannot build a stop automaton over 0 tokens")
        return _built(tuple(stop_strings), tuple(token_bytes))

    def advance(self, state: SupportsIndex, token: SupportsIndex) -> int:
        """The state after `token`, on the host."""
        return int(self.table[state, token])

    def match_end(self, turn_bytes: bytes) -> tuple[int, int] | None:
        """(index of the stop string completed first, end of it in bytes), None if there is none.

        `turn_bytes[:end]` is the turn's text up to and including its stop string. Where two strings
        end on the same byte the longer one counts, as in the table.
        """
        hits = []
        for index, stop in enumerate(self.stop_strings):
            pattern = stop.encode()
            start = turn_bytes.find(pattern)
            if start >= 0:
                hits.append((start + len(pattern), start, index))
        if not hits:
            return None
        end, _, index = min(hits)
        return index, end


# An engine uses two or three at a time: its stops, nothing banned, and what evaluation bans.
@functools.lru_cache(maxsize=4)
def _built(stop_strings: tuple[str, ...], token_bytes: tuple[bytes, ...]) -> StopAutomaton:
    step, stop_of_state = _byte_automaton([s.encode() for s in stop_strings])
    table = _compose(step, token_bytes)
    accepting = np.array([stop is not None for stop in stop_of_state])
    for shared in (table, accepting):
        shared.setflags(write=False)
    return StopAutomaton(
        table=table, accepting=accepting, stop_of_state=stop_of_state, stop_strings=stop_strings
    )


def _byte_automaton(
    patterns: Sequence[bytes],
) -> tuple[Int[np.ndarray, "S 256"], tuple[int | None, ...]]:
    """Aho-Corasick as a full table [S, 256] with absorbing accepting states, states renumbered.

    Only states reachable from the start are kept; the start is 0.
    """
    children: list[dict[int, int]] = [{}]
    stop: list[int | None] = [None]
    for index, pattern in enumerate(patterns):
        node = 0
        for byte in pattern:
            if byte not in children[node]:
                children[node][byte] = len(children)
                children.append({})
                stop.append(None)
            node = children[node][byte]
        stop[node] = index
    delta = np.zeros((len(children), 256), np.int32)
    failure = [0] * len(children)
    order = deque([0])
    while order:  # breadth first: a node's failure is shallower, so its row is already complete
        node = order.popleft()
        delta[node] = delta[failure[node]]
        for byte, child in children[node].items():
            failure[child] = int(delta[failure[node], byte]) if node else 0
            delta[node, byte] = child
            order.append(child)
        if stop[node] is None:  # its own string is the longer one
            stop[node] = stop[failure[node]]
    # One absorbing state per string, whichever node noticed it.
    final = {index: len(children) + index for index in range(len(patterns))}
    goes = np.array([final[s] if s is not None else n for n, s in enumerate(stop)], np.int32)
    delta = np.concatenate(
        [goes[delta], np.repeat(np.array([*final.values()], np.int32)[:, None], 256, axis=1)]
    )
    stop_all = [*stop, *range(len(patterns))]
    seen, order = {0: 0}, deque([0])
    while order:
        for target in np.unique(delta[order.popleft()]).tolist():
            if target not in seen:
                seen[target] = len(seen)
                order.append(target)
    kept = np.array(list(seen), np.int32)
    rename = np.zeros(len(delta), np.int32)
    rename[kept] = np.arange(len(kept))
    return rename[delta[kept]], tuple(stop_all[n] for n in kept.tolist())


def _compose(
    step: Int[np.ndarray, "S 256"], token_bytes: Sequence[bytes]
) -> Int[np.ndarray, "S V"]:
    """Runs every token through the byte automaton from every state, one byte position at a time."""
    states = len(step)
    dtype = np.int16 if states <= np.iinfo(np.int16).max else np.int32
    step = step.astype(dtype)
    lengths = np.array([len(b) for b in token_bytes], np.int64)
    flat = np.frombuffer(b"".join(token_bytes), np.uint8)
    begin = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    # Longest first: at each position the tokens still going are a leading slice, so the work is
    # the number of bytes in the vocabulary and not V times the longest token.
    order = np.argsort(-lengths, kind="stable")
    table = np.repeat(np.arange(states, dtype=dtype)[:, None], len(token_bytes), axis=1)
    for position in range(int(lengths.max())):
        going = int((lengths > position).sum())
        byte = flat[begin[order[:going]] + position]
        table[:, :going] = step[table[:, :going], byte]
    result = np.empty_like(table)
    result[:, order] = table
    return result
