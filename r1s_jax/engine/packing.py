"""What the lanes hand to the programs, as arrays over this host's rows, lane after lane."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from r1s_jax.engine.lane import Block, Slot
from r1s_jax.engine.state import Rows

_REGISTERS = {
    "lengths_R": "length",
    "pending_R": "pending",
    "budget_R": "budget",
    "stop_state_R": "stop_state",
    "ban_state_R": "ban_state",
}


def pack_copies(
    pairs: Sequence[Sequence[tuple[int, int]]], rows: int
) -> tuple[Int[np.ndarray, " M"], Int[np.ndarray, " M"]]:
    """Source and target pages of every lane's pairs, up to `rows` each; 0 where there is none."""
    numbers = np.zeros((len(pairs), rows, 2), np.int32)
    for lane, of_lane in enumerate(pairs):
        if of_lane:
            numbers[lane, : len(of_lane)] = of_lane
    sources, targets = np.moveaxis(numbers.reshape(-1, 2), 1, 0)
    return sources, targets


def pack_blocks(
    blocks: Sequence[Sequence[Block]], rows: int, width: int, pages: int
) -> tuple[
    Int[np.ndarray, "R T"], Int[np.ndarray, "R J"], Int[np.ndarray, " R"], Int[np.ndarray, " R"]
]:
    """Tokens, page tables, starts and counts of every lane's blocks, up to `rows` each."""
    total = len(blocks) * rows
    tokens, table = np.zeros((total, width), np.int32), np.zeros((total, pages), np.int32)
    starts, counts = np.zeros(total, np.int32), np.zeros(total, np.int32)
    for lane, of_lane in enumerate(blocks):
        for row, block in enumerate(of_lane, start=lane * rows):
            tokens[row, : len(block.tokens)] = block.tokens
            table[row, : len(block.pages)] = block.pages
            starts[row], counts[row] = block.start, len(block.tokens)
    return tokens, table, starts, counts


def pack_rows(slots: Sequence[Sequence[Slot]], rows: int, pages: int) -> Rows:
    """Every lane's decoding slots, up to `rows` each; a budget of 0 where there is none."""
    total = len(slots) * rows
    table, seeds = np.zeros((total, pages), np.int32), np.zeros((total, 2), np.uint32)
    registers = {name: np.zeros(total, np.int32) for name in _REGISTERS}
    for lane, of_lane in enumerate(slots):
        for row, slot in enumerate(of_lane, start=lane * rows):
            table[row, : len(slot.pages)] = slot.pages
            seeds[row] = slot.seed
            for name, field in _REGISTERS.items():
                registers[name][row] = getattr(slot, field)
    return Rows(table_RJ=table, seeds_R2=seeds, **registers)
