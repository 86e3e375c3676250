"""What the hosts of a run tell each other: their episodes, and what one decides for all."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")

# Everything travels in pieces of one size, so that there is one program, whatever is sent.
_PIECE = 1 << 18
_HEADER = 8  # bytes of the length that comes first


def from_all_hosts(mine: T) -> list[T]:
    """Every host's object, in the order of the hosts; all of them have to call this together.

    The objects are plain data of this package, sent between processes of one run. Compiles at the
    first call only.
    """
    if jax.process_count() == 1:
        return [mine]
    text = pickle.dumps(mine)
    sent = len(text).to_bytes(_HEADER, "big") + text
    pieces = [_gather(sent[:_PIECE])]
    lengths = [int.from_bytes(row[:_HEADER].tobytes(), "big") for row in pieces[0]]
    for start in range(_PIECE, _HEADER + max(lengths), _PIECE):
        pieces.append(_gather(sent[start : start + _PIECE]))
    received = np.concatenate(pieces, axis=1)[:, _HEADER:]
    return [pickle.loads(row[:n].tobytes()) for row, n in zip(received, lengths, strict=True)]


def from_first_host(ask: Callable[[], T]) -> T:
    """What `ask` returns on host 0, which alone calls it; all of them have to call this together.

    So is decided what depends on one host's files, clock or signals.
    """
    return from_all_hosts([ask()] if jax.process_index() == 0 else [])[0][0]


def _gather(piece: bytes) -> np.ndarray:
    """[hosts, _PIECE] bytes."""
    padded = np.zeros(_PIECE, np.uint8)
    padded[: len(piece)] = np.frombuffer(piece, np.uint8)
    return np.asarray(multihost_utils.process_allgather(padded))
