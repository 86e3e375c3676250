"""Algorithms by name: the presets, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest

import launch
from r1s_jax.rl.algorithm import AlgorithmConfig
from r1s_jax.types import UserError
from tests.rl.packed import PRESETS, preset

# What each differs in from the paper's; clips and weights are those of the sources in its header.
GRPO = {"estimator": "grpo"}
EXPECTED = {
    "neutral": {},
    "faithful": {},
    "reinforce_plus_plus_baseline": {},
    "grpo": GRPO,
    "rloo": {"estimator": "rloo"},
    "dr_grpo": {"estimator": "dr_grpo", "aggregation": "fixed_length"},
    "dapo": {
        **GRPO, "aggregation": "token_mean", "clip_high": 0.28, "drop_zero_variance": True,
    },
    "gspo": {**GRPO, "ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    "cispo": {
        **GRPO, "objective": "cispo", "aggregation": "token_mean", "clip_low": 1.0,
        "clip_high": 4.0,
    },
    "stable": {
        "clip_high": 0.28, "drop_zero_variance": True, "drop_void_turns": True,
        "importance_cap": 2.0, "sequence_band": (0.99, 1.01), "llds_weight": 0.2,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    assert preset(name) == dataclasses.replace(AlgorithmConfig(), **EXPECTED[name])


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_replaces_all_of_another(name):
    """Whatever came before it, but for lengths that only one aggregation reads."""
    lines = ["from __gin__ import dynamic_registration"]
    lines += [f'include "algorithms/{other}.gin"' for other in (*PRESETS, name)]
    after_others = launch.load_text("\n".join(lines) + "\n", "all", top=AlgorithmConfig).value
    alone = preset(name)
    if alone.aggregation != "fixed_length":
        after_others = dataclasses.replace(after_others, length_norm=alone.length_norm)
    if name == "neutral":  # which names no estimator
        after_others = dataclasses.replace(after_others, estimator=alone.estimator)
    assert after_others == alone


def test_the_reference_is_wanted_for_a_weight_and_enters_where_k_says():
    off, reward = AlgorithmConfig(kl="k3"), AlgorithmConfig(kl="k1", kl_weight=1e-4)
    in_loss = [AlgorithmConfig(kl=k, kl_weight=1e-4) for k in ("k2", "k3")]
    assert [c.needs_reference for c in (off, reward, *in_loss)] == [False, True, True, True]
    assert [c.kl_in_reward for c in (off, reward, *in_loss)] == [False, True, False, False]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("estimator", "ppo", r"'ppo': unknown, choose one of .*rloo"),
        ("ratio", "episode", r"algorithm\.ratio = 'episode': choose one of token, sequence"),
        ("objective", "ppo", r"algorithm\.objective = 'ppo': choose one of clip, cispo"),
        ("aggregation", "mean", r"algorithm\.aggregation = 'mean': .*token_mean, fixed_length"),
        ("kl", "k4", r"algorithm\.kl = 'k4': choose one of k1, k2, k3"),
        ("length_norm", 0, r"algorithm\.length_norm = 0, must be at least 1"),
        ("clip_low", -0.1, r"algorithm\.clip_low = -0\.1, must be at least 0"),
        ("clip_high", -0.1, r"algorithm\.clip_high"),
        ("importance_cap", -2.0, r"algorithm\.importance_cap"),
        ("kl_weight", -1e-4, r"algorithm\.kl_weight"),
        ("kl_weight", float("nan"), r"algorithm\.kl_weight = nan"),
        ("entropy_weight", -1.0, r"algorithm\.entropy_weight"),
        ("llds_weight", -1.0, r"algorithm\.llds_weight"),
        ("sequence_band", (1.01, 0.99), r"algorithm\.sequence_band = \(1\.01, 0\.99\)"),
        ("sequence_band", (0.0, 1.01), r"algorithm\.sequence_band"),
        ("sequence_band", (0.99, float("nan")), r"algorithm\.sequence_band"),
    ],
)
def test_refusals(field, value, words):
    with pytest.raises(UserError, match=words) as caught:
        AlgorithmConfig(**{field: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("clip_low", 0.0), ("length_norm", 1), ("sequence_band", (1.0, 1.0)), ("importance_cap", 1.0)],
)
def test_the_last_that_is_allowed(field, value):
    assert getattr(AlgorithmConfig(**{field: value}), field) == value
