"""Which policy gradient is taken: advantage x ratio x objective x aggregation, and the extras.

The loss of a minibatch, summed over its sampled tokens t:

    sum_t w_t (c_t l(rho_t, A_t) + kl_weight k_t - entropy_weight H_t + llds_weight L_t)

estimator    A_t from the rewards of a question's samples, see `advantages`
ratio        token     rho_t = pi(t) / pi_old(t)                              (PPO, 1707.06347)
             sequence  rho_t = exp(mean over the episode of log pi - log pi_old)
                                                                         (GSPO, 2507.18071, eq. 7)
objective    clip      l = -min(rho A, clip(rho, 1 - low, 1 + high) A)    (PPO, 1707.06347, eq. 7)
             cispo     l = -sg(clip(rho, 1 - low, 1 + high)) A log pi  (CISPO, 2506.13585, eq. 4)
aggregation  w_t = sequence_mean  1 / (episode's sampled tokens * episodes)             (GRPO)
                   token_mean     1 / sampled tokens of the minibatch       (DAPO, 2503.14476)
                   fixed_length   1 / (length_norm * episodes)           (Dr.GRPO, 2503.20783)
correction   c_t = sg(min(pi_old(t) / mu(t), importance_cap)), mu the distribution that the
             sampler drew from (TIS, Yao et al. 2025); w_t = 0 in whole episodes whose
             exp(mean(log pi_old - log mu)) lies outside `sequence_band` (geometric mask)
k            to the frozen reference: k1 = log pi - log ref inside the reward, k2 = (k1)^2 / 2 or
             k3 = exp(-k1) - 1 + k1 as a term of the loss (Schulman 2020)
H            entropy of the next-token distribution at the sampling temperature
L            LLDS (2512.04220): max(0, log pi_old - log pi) on tokens with A >= 0, in episodes
             where these differences sum to more than 0

pi_old is the policy that the rollout was played with, in the learner's arithmetic.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from r1s_jax.rl.advantages import estimator_by_name
from r1s_jax.types import UserError, require_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """The parts above by name. The defaults are the paper's (R1-Searcher, 2503.05592).

    Raises UserError for a name that does not exist and for numbers out of range.
    """

    estimator: str = "reinforce_plus_plus_baseline"
    ratio: Literal["token", "sequence"] = "token"
    objective: Literal["clip", "cispo"] = "clip"
    aggregation: Literal["sequence_mean", "token_mean", "fixed_length"] = "sequence_mean"
    length_norm: int = 1024  # tokens, of `fixed_length`
    clip_low: float = 0.2
    clip_high: float = 0.2
    # Episodes left out of the update and of the whitening; group baselines still count them.
    drop_zero_variance: bool = False  # of groups whose rewards are all equal
    drop_void_turns: bool = False  # with a turn that neither asks nor answers
    # For what the sampler drew from otherwise than the learner computes it; 0 and None: off.
    importance_cap: float = 0.0
    sequence_band: tuple[float, float] | None = None
    kl: Literal["k1", "k2", "k3"] = "k1"
    kl_weight: float = 0.0  # 0: no reference is kept or evaluated
    entropy_weight: float = 0.0
    llds_weight: float = 0.0

    def __post_init__(self) -> None:
        estimator_by_name(self.estimator)
        names = {
            "ratio": ("token", "sequence"),
            "objective": ("clip", "cispo"),
            "aggregation": ("sequence_mean", "token_mean", "fixed_length"),
            "kl": ("k1", "k2", "k3"),
        }
        for field, known in names.items():
            if getattr(self, field) not in known:
                raise UserError(
                    f"algorithm.{field} = {getattr(self, field)!r}: choose one of "
                    f"{', '.join(known)}"
                )
        least = {
            "length_norm": 1, "clip_low": 0, "clip_high": 0, "importance_cap": 0, "kl_weight": 0,
            "entropy_weight": 0, "llds_weight": 0,
        }  # fmt: skip
        require_least("algorithm", self, least)
        band = self.sequence_band
        if band is not None and not (len(band) == 2 and 0 < band[0] <= 1 <= band[1]):
            raise UserError(
                f"algorithm.sequence_band = {band}: two ratios around 1, such as (0.99, 1.01)"
            )

    @property
    def needs_reference(self) -> bool:
        """Whether log-probs of the frozen reference are wanted."""
        return self.kl_weight > 0

    @property
    def kl_in_reward(self) -> bool:
        """Whether the reference enters through the reward, before any update."""
        return self.needs_reference and self.kl == "k1"
