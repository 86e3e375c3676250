"""Every algorithm, laid into packed rows, against the float64 loops of `reference`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import pytest

from r1s_jax.rl.algorithm import AlgorithmConfig
from tests.rl import reference
from tests.rl.packed import PRESETS, Layout, Played, play, preset
from tests.rl.reference import Episode, random_episode, random_episodes

EXTRAS = {
    "k1": {"kl": "k1", "kl_weight": 0.3},
    "k2": {"kl": "k2", "kl_weight": 0.3},
    "k3": {"kl": "k3", "kl_weight": 0.3},
    "entropy": {"entropy_weight": 0.05},
    "tis": {"importance_cap": 1.2},
    "band": {"sequence_band": (0.99, 1.01)},
    "llds": {"llds_weight": 0.2},
    "zero_variance": {"drop_zero_variance": True},
    "void_turns": {"drop_void_turns": True},
}
_WITH_ALL = ("cispo", "dapo", "dr_grpo", "gspo", "stable")
_ALL = {k: v for extra in EXTRAS.values() for k, v in extra.items()}
# The parts of the presets in pairs that no preset has; clips whose edge a ratio of 1 is.
_EDGE = {"clip_low": 0.0, "clip_high": 0.0, "llds_weight": 0.2}
_PAIRS = {
    "sequence_cispo": {"ratio": "sequence", "objective": "cispo", "aggregation": "fixed_length"},
    "sequence_tokens": {"ratio": "sequence", "aggregation": "token_mean"},
    "sequence_k1": {"ratio": "sequence", "kl_weight": 0.3, "clip_low": 0.05, "clip_high": 0.05},
    "grpo_k1": {"estimator": "grpo", "kl_weight": 0.3},
    "wide_band": {"sequence_band": (0.5, 2.0), "importance_cap": 1.05},
    "edge_clip": {**_EDGE},
    "edge_cispo": {**_EDGE, "objective": "cispo"},
    "edge_sequence": {**_EDGE, "ratio": "sequence"},
}
CONFIGS = {
    **{name: preset(name) for name in PRESETS},
    **{f"with_{k}": dataclasses.replace(AlgorithmConfig(), **v) for k, v in EXTRAS.items()},
    **{name: dataclasses.replace(AlgorithmConfig(), **v) for name, v in _PAIRS.items()},
    **{f"{k}_all": dataclasses.replace(preset(k), **_ALL) for k in _WITH_ALL},
}
IN_FLOAT32 = {*PRESETS, *(f"{name}_all" for name in _WITH_ALL)}
each_config = pytest.mark.parametrize("name", CONFIGS)


def _scenarios() -> dict[str, list[Episode]]:
    def with_masks(seed: int, sampled: int) -> list[Episode]:
        rng, made = np.random.default_rng(seed), []
        for number, e in enumerate(random_episodes(seed)):
            mask = np.zeros(len(e.mask), bool)
            mask[rng.integers(1, len(mask), sampled)] = True
            made.append(random_episode(rng, mask, number, e.reward, e.group, ties=False))
        return made

    # Of five groups of five, two to four members are left each.
    rng, whole = np.random.default_rng(8), random_episodes(8, sizes=(5, 5, 5, 5, 5))
    left = [5 * g + i for g, n in enumerate((2, 4, 2, 3, 2)) for i in rng.permutation(5)[:n]]
    return {
        "random": random_episodes(0),
        "random again": random_episodes(1),
        "on policy": [dataclasses.replace(e, new=e.old) for e in random_episodes(3)],
        "equal rewards": [dataclasses.replace(e, reward=0.1) for e in random_episodes(5)],
        "one token each": with_masks(6, 1),
        "nothing sampled": with_masks(7, 0),
        "members lost": [whole[i] for i in sorted(left)],
    }


SCENARIOS = _scenarios()


@functools.cache  # several presets differ in other things
def played(config: AlgorithmConfig, dtype: str) -> dict[str, list[Played]]:
    return play(config, SCENARIOS, dtype)


def assert_played(
    config: AlgorithmConfig,
    episodes: Sequence[Episode],
    exact: list[Played],
    rough: list[Played] | None,
) -> None:
    """The library's updates, `exact` in float64 and `rough` in float32, are the reference's.

    Advantages and weights are float32 in any case. The loss in float64 is compared at these
    rounded numbers, the one in float32 at the reference's own.
    """
    whole = reference.advantages(config, episodes)
    assert [i for p in exact for i in p.numbers] == list(whole)
    for number, p in enumerate(exact):
        minibatch = [episodes[i] for i in p.numbers]
        advantage = [whole[i] for i in p.numbers]
        weight = reference.weights(config, minibatch)
        for got, want, e in zip(p.advantages, advantage, minibatch, strict=True):
            np.testing.assert_allclose(got[e.mask], want[e.mask], rtol=1e-6, atol=1e-6)
        for got, want, e in zip(p.weights, weight, minibatch, strict=True):
            if e.mask.any():
                np.testing.assert_allclose(got, want, rtol=1e-7)
        rounded = reference.update(config, minibatch, p.advantages, p.weights)
        assert_same(p.update, rounded, 1e-10)
        if rough is not None:
            want = reference.update(config, minibatch, advantage, weight)
            assert_same(rough[number].update, want, 1e-5)


def assert_same(got: reference.Update, want: reference.Update, tolerance: float) -> None:
    """`tolerance` of each number, or of the largest gradient where that is more."""
    largest = 0.0
    for name in ("by_logprob", "by_entropy"):
        have, expected = np.hstack(getattr(got, name)), np.hstack(getattr(want, name))
        atol = tolerance * np.abs(expected).max()
        np.testing.assert_allclose(have, expected, rtol=tolerance, atol=atol, err_msg=name)
        largest = max(largest, atol)
    np.testing.assert_allclose(got.value, want.value, rtol=tolerance, atol=largest)
    assert not set(want.sums) - set(got.sums)
    for key, number in got.sums.items():
        wanted = want.sums.get(key, 0.0)
        np.testing.assert_allclose(number, wanted, rtol=tolerance, atol=10 * tolerance)


# ---------------------------------------------------------------- the reference itself


@each_config
def test_gradients_of_the_reference_are_those_of_its_loss(name):
    """Central differences, what no gradient passes through held fixed."""
    config, step = CONFIGS[name], 1e-6
    episodes = random_episodes(0, ties=False)
    advantage = reference.advantages(config, episodes)
    for number, values in advantage.items():
        e, a, w = episodes[number], [values], [0.1]
        update = reference.update(config, [e], a, w)
        for t in e.sampled:
            assert abs(e.new[t] - e.old[t]) > 2 * step  # no kink of LLDS

            def at(of_new: float, of_entropy: float, e=e, a=a, w=w, t=t) -> float:
                new, entropy = e.new.copy(), e.entropy.copy()
                new[t] += of_new
                entropy[t] += of_entropy
                return reference.loss(config, [e], a, w, [(new, entropy)])

            by_logprob = (at(step, 0) - at(-step, 0)) / (2 * step)
            by_entropy = (at(0, step) - at(0, -step)) / (2 * step)
            np.testing.assert_allclose(update.by_logprob[0][t], by_logprob, rtol=1e-7, atol=1e-8)
            np.testing.assert_allclose(update.by_entropy[0][t], by_entropy, rtol=1e-7, atol=1e-8)


def test_the_random_batches_reach_every_branch():
    """Both sides of each clip with both signs, the cap, the band, LLDS, dropped episodes."""
    for name in PRESETS:
        config = CONFIGS[name]
        seen = set()
        for episodes in (SCENARIOS["random"], SCENARIOS["random again"]):
            for number, a in reference.advantages(config, episodes).items():
                e = episodes[number]
                for t in e.sampled:
                    rho = reference.ratio(config, e, e.new, t)
                    side = (rho > 1 + config.clip_high) - (rho < 1 - config.clip_low)
                    seen.add((side, int(np.sign(a[t]))))
        sides = (0, 1) if config.clip_low == 1.0 else (-1, 0, 1)
        assert seen >= {(side, sign) for side in sides for sign in (-1, 1)}, name
    config, episodes = CONFIGS["stable_all"], SCENARIOS["random"]
    assert 0 < len(reference.kept(config, episodes)) < len(episodes)
    sampled = [e for e in episodes if e.sampled]
    assert {reference.outside_band(config, e) for e in sampled} == {True, False}
    displaced = {
        reference.is_displaced(config, episodes[i], a)
        for i, a in reference.advantages(config, episodes).items()
        if (a[episodes[i].mask] >= 0).any()
    }
    assert displaced == {True, False}
    capped = {reference.correction(config, e, t) == 1.2 for e in episodes for t in e.sampled}
    assert capped == {True, False}
    tied = [(e.new == e.old)[e.mask] for e in sampled]
    assert any(t.all() for t in tied) and any(t.any() and not t.all() for t in tied)
    assert len({len(e.sampled) for e in episodes} & {0, 1}) == 2


# ---------------------------------------------------------------- the library


@each_config
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_update_equals_float64_reference(name, scenario):
    """In float64 to round-off, and the presets, alone and with all extras, in float32 too."""
    config, episodes = CONFIGS[name], SCENARIOS[scenario]
    exact = played(config, "float64")[scenario]
    rough = played(config, "float32")[scenario] if name in IN_FLOAT32 else None
    assert_played(config, episodes, exact, rough)


@each_config
@pytest.mark.parametrize("scenario", ["random", "one token each"])
def test_every_update_moves_the_policy(name, scenario):
    """And the entropy gets a gradient where it has a weight."""
    updates = played(CONFIGS[name], "float64")[scenario]
    assert len(updates) == 2
    for p in updates:
        assert np.hstack(p.update.by_logprob).any()
        assert np.hstack(p.update.by_entropy).any() == (CONFIGS[name].entropy_weight > 0)


@each_config
def test_on_policy_nothing_is_clipped_or_displaced(name):
    for p in played(CONFIGS[name], "float64")["on policy"]:
        assert p.update.sums["clip_fraction"] == 0.0
        assert p.update.sums["approx_kl"] == 0.0
        assert p.update.sums.get("llds", 0.0) == 0.0


@each_config
def test_equal_rewards_move_the_policy_by_extras_alone(name):
    config, updates = CONFIGS[name], played(CONFIGS[name], "float64")["equal rewards"]
    assert len(updates) == (0 if config.drop_zero_variance else 2)
    extras = config.needs_reference or config.entropy_weight or config.llds_weight
    for p in updates:
        if not config.kl_in_reward:
            assert not np.hstack(p.advantages).any()
        assert extras or (p.update.value == 0.0 and not np.hstack(p.update.by_logprob).any())


@each_config
def test_nothing_sampled_is_exactly_nothing(name):
    for p in played(CONFIGS[name], "float64")["nothing sampled"]:
        assert p.update.value == 0.0
        assert not any(p.update.sums.values())
        assert not np.hstack(p.update.by_logprob + p.update.by_entropy).any()


@pytest.mark.parametrize(
    ("name", "rows", "row_tokens"), [("stable_all", 1, 14), ("gspo_all", 16, 60)]
)
def test_update_does_not_depend_on_the_layout(name, rows, row_tokens):
    """An episode a row and a row a micro-batch; one micro-batch, most of whose rows are empty."""
    config, episodes = CONFIGS[name], SCENARIOS["random"]
    layout = Layout(rows=rows, row_tokens=row_tokens, jit=True)
    mine = play(config, {"": episodes}, "float64", layout)[""]
    for here, there in zip(mine, played(CONFIGS[name], "float64")["random"], strict=True):
        assert here.numbers == there.numbers
        assert_same(here.update, there.update, 1e-12)
