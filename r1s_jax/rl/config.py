"""How the learner learns: algorithm, optimiser, and the shape of its batches."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from r1s_jax.models.decoder import Remat
from r1s_jax.models.lora import LoraConfig
from r1s_jax.rl.algorithm import AlgorithmConfig
from r1s_jax.types import UserError, require_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """The recipe's defaults (Qwen2.5-7B). Raises UserError for numbers out of range."""

    algorithm: AlgorithmConfig = dataclasses.field(default_factory=AlgorithmConfig)
    learning_rate: float = 2e-6
    adam_b1: float = 0.9
    adam_b2: float = 0.95
    first_moment_dtype: Literal["float32", "bfloat16"] = "float32"
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    updates_per_rollout: int = 4
    # A micro-batch: `rows` rows of `row_tokens` tokens, each filled with whole episodes.
    rows: int = 16
    row_tokens: int = 8192
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # parameters stay f32
    scan_layers: bool = True  # one layer is compiled, not all L of them
    remat: Remat = "full"
    lora: LoraConfig | None = None  # train adapters alone; None: all parameters

    def __post_init__(self) -> None:
        least = {
            **dict.fromkeys(("updates_per_rollout", "rows", "row_tokens"), 1),
            **dict.fromkeys(("learning_rate", "weight_decay"), 0),
        }
        require_least("learner", self, least)
        if not 0 < self.clip_norm < math.inf:
            raise UserError(
                f"learner.clip_norm = {self.clip_norm}, must be more than 0 (1e9 clips nothing)"
            )
        for field in ("adam_b1", "adam_b2"):
            if not 0 <= getattr(self, field) < 1:
                raise UserError(f"learner.{field} = {getattr(self, field)}, must be in [0, 1)")
        if self.first_moment_dtype not in ("float32", "bfloat16"):
            raise UserError(
                f"learner.first_moment_dtype = {self.first_moment_dtype!r}: float32 or bfloat16"
            )
