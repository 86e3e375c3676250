"""Bytes that a compiled program sends over the links between chips, read from its optimised HLO.

Collectives count as on a ring of the n chips of a group, the least that links in one dimension
allow (Patarasuk & Yuan 2009): what a chip sends of an array of S bytes is S (n-1)/n where it is
gathered, scattered or exchanged, and twice that where it is reduced and every chip gets the sum.
"""

from __future__ import annotations

import math
import re

from r1s_jax.aot.hlo_bytes import Computation, Instruction, Program, goes_on

_COLLECTIVES = {"all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"}


def link_bytes(hlo: str, *, open_trips: int = 1) -> int:
    """Bytes that each chip sends in one run of a program, given as `Compiled.as_text()`.

    `open_trips` as in `hlo_bytes.hbm_bytes`.
    """
    return _Links(hlo, open_trips).total()


class _Links(Program):
    def leaf(self, computation: Computation, it: Instruction) -> int:
        if it.opcode == "fusion":
            return self.of(it.called("calls"))
        kind = it.opcode.removesuffix("-start")
        if kind not in _COLLECTIVES or goes_on(computation, it):
            return 0
        operands = sum(a.size for name in it.operands for a in computation[name].arrays)
        # An asynchronous one's type names its operands before its results, and a context behind.
        results = sum(a.size for a in it.arrays)
        if it.opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):
            results = (
                it.arrays[len(it.operands)].size if len(it.operands) == 1 else results - operands
            )
        if kind == "collective-permute":
            return operands
        chips = group_size(it.text)
        whole = results if kind == "all-gather" else operands
        rounds = 2 if kind == "all-reduce" and not self._scattered(computation, it) else 1
        return rounds * whole * (chips - 1) // chips

    def _scattered(self, computation: Computation, it: Instruction) -> bool:
        """Whether nothing but this chip's part of a sum is used: the chip then scatters it."""
        users = list(computation.users(it.name))
        return bool(users) and all(user.opcode == "dynamic-slice" for user in users)


def group_size(text: str) -> int:
    """How many chips take part in a collective together, from one of three ways of saying so.

    Lists of groups; groups x members as the shape of an iota; or a mesh and the axes that a group
    runs along. Raises ValueError for anything else.
    """
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", found[2]))
    raise ValueError(f"no replica groups in: {text[:200]}")
