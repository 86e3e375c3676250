"""The algorithms once more, slowly: float64, one episode after the other, one token at a time.

Written from the formulas in `r1s_jax.rl.algorithm` and `r1s_jax.rl.advantages` alone: no rows, no
packing, no jax. Of the library it uses the names and numbers of an `AlgorithmConfig`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from r1s_jax.rl.algorithm import AlgorithmConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Episode:
    """An episode's tokens, prompt included; what stands off the mask is never read."""

    reward: float
    group: int
    mask: np.ndarray  # True where the policy sampled the token
    new: np.ndarray  # log-probs: of the policy that is differentiated,
    old: np.ndarray  # of the policy of the rollout,
    drawn: np.ndarray  # of what the sampler drew from,
    ref: np.ndarray  # of the frozen reference
    entropy: np.ndarray
    void: bool = False  # has a turn that neither asks nor answers

    @property
    def sampled(self) -> list[int]:
        return [t for t, is_sampled in enumerate(self.mask) if is_sampled]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update:
    """Loss of one minibatch, its gradients and sums; an array an episode, 0 off the mask."""

    value: float
    by_logprob: list[np.ndarray]
    by_entropy: list[np.ndarray]
    sums: dict[str, float]


def clamped(reward: float) -> float:
    return min(max(reward, -10.0), 10.0)


def rewards_of_group(episodes: Sequence[Episode], group: int) -> list[float]:
    return [clamped(e.reward) for e in episodes if e.group == group]


def kept(config: AlgorithmConfig, episodes: Sequence[Episode]) -> list[int]:
    """Numbers of the episodes that are learned from."""
    numbers = []
    for number, episode in enumerate(episodes):
        same = len(set(rewards_of_group(episodes, episode.group))) == 1
        if config.drop_zero_variance and same:
            continue
        if config.drop_void_turns and episode.void:
            continue
        numbers.append(number)
    return numbers


def baselined(estimator: str, episodes: Sequence[Episode], number: int) -> float:
    """What its group makes of an episode's reward, before any whitening."""
    reward = clamped(episodes[number].reward)
    rewards = rewards_of_group(episodes, episodes[number].group)
    if len(set(rewards)) == 1:
        return 0.0
    mean = math.fsum(rewards) / len(rewards)
    if estimator == "grpo":
        variance = math.fsum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1)
        return (reward - mean) / (math.sqrt(variance) + 1e-9)
    if estimator == "rloo":
        others = list(rewards)
        others.remove(reward)
        return reward - math.fsum(others) / len(others)
    return reward - mean  # dr_grpo, and reinforce_plus_plus_baseline before the whitening


def advantages(config: AlgorithmConfig, episodes: Sequence[Episode]) -> dict[int, np.ndarray]:
    """Advantage of every sampled token of the kept episodes, by the episode's number."""
    found: dict[int, np.ndarray] = {}
    for number in kept(config, episodes):
        episode = episodes[number]
        value = np.zeros(len(episode.mask))
        # The reward comes on the last sampled token, a penalty on each; returns add up from behind.
        flow = baselined(config.estimator, episodes, number)
        for t in reversed(episode.sampled):
            if config.kl == "k1" and config.kl_weight > 0:
                flow -= config.kl_weight * (episode.old[t] - episode.ref[t])
            value[t] = flow
        found[number] = value
    if config.estimator == "reinforce_plus_plus_baseline":
        values = [float(found[i][t]) for i in found for t in episodes[i].sampled]
        if values:
            mean = math.fsum(values) / len(values)
            variance = math.fsum((v - mean) ** 2 for v in values) / len(values)
            for i in found:
                for t in episodes[i].sampled:
                    found[i][t] = (found[i][t] - mean) / math.sqrt(max(variance, 1e-8))
    return found


def weights(config: AlgorithmConfig, minibatch: Sequence[Episode]) -> list[float]:
    """w_t of every episode's tokens."""
    counts = [len(e.sampled) for e in minibatch]
    found = []
    for count in counts:
        if config.aggregation == "sequence_mean":
            found.append(1 / (count * len(counts)) if count else 0.0)
        elif config.aggregation == "token_mean":
            found.append(1 / sum(counts) if count else 0.0)
        else:
            found.append(1 / (config.length_norm * len(counts)))
    return found


def update(
    config: AlgorithmConfig,
    minibatch: Sequence[Episode],
    advantage: Sequence[np.ndarray],
    weight: Sequence[float],
) -> Update:
    """The loss, and its gradients by formula."""
    by_logprob = [np.zeros(len(e.mask)) for e in minibatch]
    by_entropy = [np.zeros(len(e.mask)) for e in minibatch]
    sums: dict[str, float] = {}

    def add(name: str, amount: float) -> None:
        sums[name] = sums.get(name, 0.0) + float(amount)

    for e, a, w, d_new, d_entropy in zip(
        minibatch, advantage, weight, by_logprob, by_entropy, strict=True
    ):
        masked, displaced = outside_band(config, e), is_displaced(config, e, a)
        w = 0.0 if masked else w
        for t in e.sampled:
            rho, c = ratio(config, e, e.new, t), correction(config, e, t)
            bounded = min(max(rho, 1 - config.clip_low), 1 + config.clip_high)
            if config.objective == "cispo":
                add("clip_fraction", bounded != rho)
                d_new[t] -= w * c * bounded * a[t]
            else:
                cut = bounded * a[t] < rho * a[t]
                add("clip_fraction", cut)
                slope = 0.0 if cut else -w * c * rho * a[t]  # by the log of the ratio
                if config.ratio == "token":
                    d_new[t] += slope
                else:
                    for s in e.sampled:
                        d_new[s] += slope / len(e.sampled)
            k1 = e.new[t] - e.ref[t]
            if config.kl_weight > 0 and config.kl == "k2":
                add("kl_ref", k1**2 / 2)
                d_new[t] += w * config.kl_weight * k1
            if config.kl_weight > 0 and config.kl == "k3":
                add("kl_ref", math.exp(-k1) - 1 + k1)
                d_new[t] += w * config.kl_weight * (1 - math.exp(-k1))
            if config.llds_weight > 0:
                fell = displaced and a[t] >= 0 and e.new[t] < e.old[t]
                add("llds", e.old[t] - e.new[t] if fell else 0.0)
                d_new[t] -= w * config.llds_weight if fell else 0.0
            d_entropy[t] -= w * config.entropy_weight
            if config.importance_cap > 0:
                add("importance_weight", c)
            if config.sequence_band is not None:
                add("sequence_masked", masked)
            change = e.new[t] - e.old[t]
            add("approx_kl", math.exp(change) - 1 - change)
            add("ratio_mean", rho)
            add("entropy", e.entropy[t])
    value = loss(config, minibatch, advantage, weight, [(e.new, e.entropy) for e in minibatch])
    return Update(value=value, by_logprob=by_logprob, by_entropy=by_entropy, sums=sums)


def loss(
    config: AlgorithmConfig,
    minibatch: Sequence[Episode],
    advantage: Sequence[np.ndarray],
    weight: Sequence[float],
    at: Sequence[tuple[np.ndarray, np.ndarray]],
) -> float:
    """The loss at other log-probs and entropies, `at`.

    What no gradient passes through (CISPO's weight, TIS, the band, LLDS's choice of episodes)
    stays as it is at the episodes' own.
    """
    terms = []
    for e, a, w, (new, entropy) in zip(minibatch, advantage, weight, at, strict=True):
        if outside_band(config, e):
            continue
        displaced = is_displaced(config, e, a)
        for t in e.sampled:
            low, high = 1 - config.clip_low, 1 + config.clip_high
            if config.objective == "cispo":
                term = -min(max(ratio(config, e, e.new, t), low), high) * a[t] * new[t]
            else:
                rho = ratio(config, e, new, t)
                term = -min(rho * a[t], min(max(rho, low), high) * a[t])
            term *= correction(config, e, t)
            k1 = new[t] - e.ref[t]
            if config.kl == "k2":
                term += config.kl_weight * k1**2 / 2
            if config.kl == "k3":
                term += config.kl_weight * (math.exp(-k1) - 1 + k1)
            term -= config.entropy_weight * entropy[t]
            if displaced and a[t] >= 0:
                term += config.llds_weight * max(0.0, e.old[t] - new[t])
            terms.append(w * term)
    return math.fsum(terms)


def ratio(config: AlgorithmConfig, episode: Episode, new: np.ndarray, t: int) -> float:
    if config.ratio == "token":
        return math.exp(new[t] - episode.old[t])
    changes = [new[s] - episode.old[s] for s in episode.sampled]
    return math.exp(math.fsum(changes) / len(changes))


def correction(config: AlgorithmConfig, episode: Episode, t: int) -> float:
    if config.importance_cap == 0:
        return 1.0
    return min(math.exp(episode.old[t] - episode.drawn[t]), config.importance_cap)


def outside_band(config: AlgorithmConfig, episode: Episode) -> bool:
    if config.sequence_band is None or not episode.sampled:
        return False
    off = [episode.old[t] - episode.drawn[t] for t in episode.sampled]
    low, high = config.sequence_band
    return not low <= math.exp(math.fsum(off) / len(off)) <= high


def is_displaced(config: AlgorithmConfig, episode: Episode, advantage: np.ndarray) -> bool:
    fallen = [episode.old[t] - episode.new[t] for t in episode.sampled if advantage[t] >= 0]
    return config.llds_weight > 0 and math.fsum(fallen) > 0


# ---------------------------------------------------------------- random batches

# What may stand where nothing was sampled.
GARBAGE = (np.nan, np.inf, -np.inf, 1e30)
# Changes of log-probs around GSPO's clips, PPO's, and CISPO's; and off-policy around the band.
CHANGES, OFF = (2e-4, 0.1, 0.6, 2.0, 2e-4), (0.004, 0.5, 0.004)


def random_episodes(
    seed: int, sizes: Sequence[int] = (4, 3, 2, 5, 2), *, ties: bool = True
) -> list[Episode]:
    """Groups of unequal sizes, as where members were lost; all numbers are float32 ones."""
    rng = np.random.default_rng(seed)
    made = []
    for group, size in enumerate(sizes):
        rewards = rng.choice([-2.0, 0.0, 0.5, 1.0], size)
        rewards[:2] = 1.0, -2.0
        if group == 1:
            rewards[:] = 0.1
        if group == 4:
            rewards[:] = 10.0 + np.arange(size)  # the clamp makes them equal
        for reward in rewards:
            number = len(made)
            mask = rng.random(rng.integers(2, 15)) < 0.7
            mask[0] = False
            if number == 2:
                mask[1:] = np.arange(1, len(mask)) == 1  # a one-token response
            if number == 6:
                mask[:] = False
            elif not mask.any():
                mask[-1] = True
            made.append(random_episode(rng, mask, number, float(reward), 10 * group, ties))
    return made


def random_episode(
    rng: np.random.Generator, mask: np.ndarray, number: int, reward: float, group: int, ties: bool
) -> Episode:
    def near(values: np.ndarray, scale: float) -> np.ndarray:
        return (values + scale * rng.normal(size=len(mask))).astype(np.float32)

    old = near(-rng.exponential(size=len(mask)), 0.1)
    new = near(old, CHANGES[number % len(CHANGES)])
    if ties:
        new = np.where(rng.random(len(mask)) < (1.0 if number == 5 else 0.1), old, new)
    arrays = {
        "new": new, "old": old, "drawn": near(old, OFF[number % len(OFF)]),
        "ref": near(old, 0.4), "entropy": rng.exponential(size=len(mask)).astype(np.float32),
    }  # fmt: skip
    for values in arrays.values():
        values[~mask] = rng.choice(GARBAGE, int((~mask).sum()))
    arrays = {k: v.astype(np.float64) for k, v in arrays.items()}
    return Episode(reward=reward, group=group, mask=mask, void=bool(rng.random() < 0.2), **arrays)
