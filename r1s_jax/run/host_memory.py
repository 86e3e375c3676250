"""How a process on a CPU keeps the memory that JAX gives back."""

from __future__ import annotations

import ctypes
import sys

# From glibc's malloc.h; each takes an int.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_PAD_BYTES = 2**28


def keep_freed_memory() -> bool:
    """From now on memory that is freed stays with this process; returns whether it could be asked.

    JAX on CPUs allocates every result and every program's scratch space anew, and glibc hands large
    pieces back to the system each time. To get them again, zeroed page by page, took a sixth of an
    update like that of benchmarks/learner.md. Only for computing on CPUs: where there are
    accelerators, a checkpoint that was read once should go.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's alone
    if mallopt is None:
        return False
    settings = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: _PAD_BYTES, _ARENA_MAX: 1}
    done = [mallopt(name, value) == 1 for name, value in settings.items()]
    return all(done)
