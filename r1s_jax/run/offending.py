"""The batch that stopped a run, kept so that its update can be played again."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, Int

from r1s_jax.run.metrics import write_bytes_atomic
from r1s_jax.types import Trajectory

_FIELDS = ("token_ids_T", "sources_T", "logprobs_T", "drawn_logprobs_T")


def write_offending_batch(
    run_dir: epath.PathLike,
    step: int,
    trajectories: Sequence[Trajectory],
    rewards_N: Float[np.ndarray, " N"],
    group_ids_N: Int[np.ndarray, " N"],
) -> epath.Path:
    """Writes what `Learner.update` was given to RUN_DIR/offending_batch.npz; returns its path.

    The file holds `step`, `rewards_N`, `group_ids_N`, `lengths_N` and, with all episodes end to
    end, the four arrays of a `Trajectory`. Numbers are kept as they are, NaN too. A kill leaves
    the whole file or none.

    Raises:
        ValueError: there are no episodes.
    """
    arrays: dict[str, Any] = {
        "step": step,
        "rewards_N": rewards_N,
        "group_ids_N": group_ids_N,
        "lengths_N": [len(t.token_ids_T) for t in trajectories],
        **{name: np.concatenate([getattr(t, name) for t in trajectories]) for name in _FIELDS},
    }
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    path = epath.Path(run_dir) / "offending_batch.npz"
    write_bytes_atomic(path, buffer.getvalue())
    return path
