"""Every alarm by a hand-made series of rows; real runs, healthy and stuck."""

import json
import math

import pytest

from r1s_jax.run.health import ADVICE, Health, HealthConfig
from r1s_jax.types import UserError

NAN = math.nan

# A train row of a run in which nothing is wrong (4 searches allowed, float32).
GOOD = {
    "reward_mean": 0.6,
    "em": 0.6,
    "f1": 0.65,
    "format_rate": 0.97,
    "searches_mean": 1.4,
    "truncated_rate": 0.02,
    "episodes": 256.0,
    "retrieval_failed": 0.0,
    "dropped_groups": 0.0,
    "policy_loss": -0.01,
    "entropy": 0.4,
    "grad_norm": 0.3,
    "logprob_gap": 6e-7,
    "rewarded_logprob": -0.3,
    "contrast_rate": 0.6,
    "skipped_updates": 0.0,
    "learned_episodes": 200.0,
    "compiles": 0.0,
}
# What the learner knows after a step without a group that has contrast.
NOTHING = dict.fromkeys(
    ("policy_loss", "entropy", "grad_norm", "logprob_gap", "rewarded_logprob"), NAN
) | {"learned_episodes": 0.0, "contrast_rate": 0.0}

# stage, then the columns: a whole run of `tiny`, seed 0
COLUMNS = (
    "format_rate", "f1", "searches_mean", "truncated_rate",
    "entropy", "grad_norm", "logprob_gap", "learned_episodes",
)  # fmt: skip
TINY = """
stage1 0.883 0.0566 0.242 0.00781 0.419 0.299 6.45e-07 240
stage1 0.926 0.0738 0.504 0.00781 0.388 0.352 6.49e-07 256
stage1 0.934 0.144 0.863 0.0352 0.363 0.38 6.42e-07 256
stage1 0.93 0.138 1.17 0.0508 0.354 0.399 6.74e-07 240
stage2 0.969 0.171 1.25 0.0195 0.276 6.71 6.32e-07 160
stage2 0.953 0.22 1.29 0.0312 0.274 0.212 6.02e-07 208
stage2 0.969 0.358 1.28 0.0234 0.226 0.219 5.93e-07 216
stage2 0.961 0.369 1.3 0.0156 0.267 0.264 6.13e-07 224
stage2 0.945 0.287 1.37 0.0234 0.236 0.327 6.06e-07 192
stage2 0.961 0.412 1.27 0.00781 0.219 0.289 6.1e-07 208
stage2 0.977 0.564 1.25 0.00781 0.193 0.298 5.99e-07 160
stage2 0.984 0.456 1.36 0.00781 0.211 0.708 6.01e-07 184
stage2 0.977 0.582 1.24 0.0117 0.168 0.266 6.01e-07 216
stage2 0.941 0.495 1.41 0.0195 0.194 0.336 6.27e-07 216
stage2 0.984 0.606 1.33 0.00391 0.157 0.309 5.79e-07 192
stage2 0.957 0.58 1.5 0.0312 0.167 0.284 6.07e-07 208
stage2 0.961 0.654 1.49 0.0156 0.13 0.345 5.68e-07 192
stage2 0.949 0.681 1.44 0.0195 0.153 0.379 6.1e-07 192
stage2 0.992 0.707 1.41 0 0.146 0.52 6.23e-07 136
stage2 0.969 0.676 1.47 0.0234 0.138 0.318 5.91e-07 184
stage2 0.984 0.844 1.41 0.0117 0.135 0.249 5.72e-07 152
stage2 0.961 0.791 1.45 0.0195 0.128 0.333 5.58e-07 192
stage2 0.98 0.809 1.52 0.00781 0.0987 0.244 5.3e-07 152
stage2 0.996 0.811 1.45 0 0.127 0.339 5.68e-07 136
stage2 0.961 0.696 1.48 0.0352 0.137 0.452 5.8e-07 160
stage2 0.996 0.843 1.46 0 0.124 0.334 5.46e-07 104
stage2 0.98 0.798 1.41 0.0117 0.112 0.322 5.63e-07 168
stage2 0.996 0.858 1.46 0.00391 0.0905 0.336 5.5e-07 136
stage2 0.977 0.865 1.44 0.0117 0.105 0.34 5.47e-07 144
stage2 0.992 0.815 1.46 0 0.0858 0.354 5.47e-07 136
stage2 0.977 0.84 1.62 0.00781 0.0884 0.43 5.57e-07 144
stage2 0.984 0.959 1.59 0.00391 0.093 0.402 5.79e-07 72
"""
# The first steps of a stage 2 that never learned to answer: its base could not use passages.
STUCK = """
stage2 0.977 0.0344 1.04 0 0.654 0.59 6.95e-07 256
stage2 0.988 0.0195 0.98 0.00391 0.703 1.58 7.25e-07 256
stage2 0.949 0.0243 0.969 0.0156 0.658 0.546 6.82e-07 256
stage2 0.996 0.0224 0.945 0.00391 0.645 0.236 6.71e-07 256
stage2 0.973 0.043 0.977 0.0117 0.58 0.548 6.55e-07 256
stage2 0.984 0.0254 0.922 0.00391 0.597 0.755 6.37e-07 256
stage2 0.988 0.0344 0.91 0.00391 0.647 0.851 6.92e-07 256
stage2 0.988 0.0191 0.902 0 0.629 0.847 6.74e-07 256
"""


def _health(dtype="float32", max_searches=4, **thresholds):
    health = Health(HealthConfig(**thresholds), max_searches=max_searches, dtype=dtype)
    health.begin_stage("stage2", pays_for_answer=True)
    return health


def _rows(*changes):
    return [GOOD | change for change in changes]


def _played(health, rows):
    """[(step from 1 on, name)] of every line, in order."""
    lines = [(step, line) for step, row in enumerate(rows, 1) for line in health.check(row)]
    assert all("\n" not in line for _, line in lines)
    return [(step, line.split(":")[0]) for step, line in lines]


def _real(text):
    for line in text.split("\n")[1:-1]:
        stage, *numbers = line.split()
        row = GOOD | dict(zip(COLUMNS, map(float, numbers), strict=True))
        share = row["learned_episodes"] / row["episodes"]
        # Not measured by these runs: the likeliest tokens of a sharp policy are likely.
        yield stage, row | {"contrast_rate": share, "rewarded_logprob": -row["entropy"]}


# name -> (rows, step at which it fires and never again); patience is 5
SERIES = {
    # A tenth of 0.4 is 0.04, below the floor of 0.05 too.
    "entropy_collapsed": (
        _rows({}, *[{"entropy": e} for e in (0.2, 0.1, 0.041, *[0.039] * 9)]),
        9,
    ),
    "entropy_exploded": (_rows({}, *[{"entropy": e} for e in (1.19, *[1.21] * 9)]), 7),
    "logprob_gap": (_rows({}, {"logprob_gap": 9e-5}, *[{"logprob_gap": 1.1e-4}] * 9), 3),
    "searches_stopped": (_rows({}, *[{"searches_mean": s} for s in (0.06, *[0.04] * 9)]), 7),
    "searches_at_limit": (_rows({}, *[{"searches_mean": s} for s in (3.59, *[3.61] * 9)]), 7),
    "grad_norm": (_rows(*[{}] * 5, {"grad_norm": 2.9}, {"grad_norm": 3.1}, *[{}] * 9), 7),
    "not_finite": (_rows({}, {"skipped_updates": 1.0, "grad_norm": NAN}, *[{}] * 9), 2),
    "format_alone": (_rows({}, {"f1": 0.06}, *[{"f1": 0.04, "em": 0.0}] * 9), 7),
    # Means of five: -0.3 at best; then -0.36, -0.42, -0.48, -0.54, -0.6.
    "rewarded_logprob": (_rows(*[{}] * 5, *[{"rewarded_logprob": -0.6}] * 9), 10),
    "truncated": (_rows({}, {"truncated_rate": 0.29}, *[{"truncated_rate": 0.31}] * 9), 7),
    # 62 of 1,250 are 4.96 %, 63 are 5.04 %.
    "retrieval_failed": (
        _rows(*[{"episodes": 1250.0 - n, "retrieval_failed": float(n)} for n in (0, 62, 63, 99)]),
        3,
    ),
    "no_contrast": (_rows({}, {"contrast_rate": 0.06}, *[{"contrast_rate": 0.04}] * 9), 7),
}


@pytest.mark.parametrize("name", SERIES)
def test_each_alarm_fires_once_and_alone(name):
    rows, step = SERIES[name]
    assert _played(_health(), rows) == [(step, name)]


def test_every_alarm_has_its_series_and_its_advice():
    assert SERIES.keys() == ADVICE.keys()


def test_a_healthy_run_is_silent():
    health, stages = _health(), []
    for stage, row in _real(TINY):
        if stage not in stages:
            stages.append(stage)
        health.begin_stage(stage, pays_for_answer=stage == "stage2")
        assert health.check(row) == [] and health.active == ()
    assert stages == ["stage1", "stage2"]


def test_a_stage_that_never_answers_is_named():
    rows = [row for _, row in _real(STUCK)]
    health = _health()
    assert _played(health, rows) == [(5, "format_alone")]
    assert health.active == ("format_alone",)
    # The same figures are in order where the answer is not paid for.
    first = _health()
    first.begin_stage("stage1", pays_for_answer=False)
    assert _played(first, rows) == []


def test_answers_are_missed_only_once_the_format_is_right():
    assert _played(_health(), _rows(*[{"f1": 0.0, "format_rate": 0.79}] * 9)) == []


def test_the_line_says_value_threshold_and_advice():
    (line,) = _health().check(GOOD | {"logprob_gap": 0.002})
    assert line == (
        "logprob_gap: logprob_gap 0.002 above 0.0001; "
        "sampler and learner are not one policy: check dtypes, weights, temperature"
    )
    health = _health(patience=1)
    health.check(GOOD)
    (line,) = health.check(GOOD | {"entropy": 0.01})
    assert line.startswith(
        "entropy_collapsed: entropy 0.01 below 0.04 (0.4 at the stage's start); "
    )
    (line,) = health.check(GOOD | {"skipped_updates": 2.0, "grad_norm": NAN, "entropy": NAN})
    assert line.startswith("not_finite: skipped_updates 2 above 0, entropy, grad_norm not finite; ")


def test_it_fires_again_after_it_was_over():
    high, good = {"truncated_rate": 0.5}, {}
    health = _health(patience=2)
    # One good step among bad ones ends nothing, two do; one bad step begins nothing.
    rows = _rows(high, high, good, high, good, good, high, good, high, high, high)
    assert _played(health, rows) == [(2, "truncated"), (10, "truncated")]
    rows = _rows(high, high, good, good, high, high)
    assert _played(_health(patience=2), rows) == [(2, "truncated"), (6, "truncated")]


def test_active_counts_what_is_on():
    health, counts = _health(patience=2), []
    high, wide = {"truncated_rate": 0.5}, {"logprob_gap": 1.0}
    for row in _rows({}, wide, wide | high, wide | high, high, high, {}, {}):
        health.check(row)
        counts.append(len(health.active))
    assert counts == [0, 1, 1, 2, 2, 1, 1, 0]


def test_a_step_that_learned_nothing_raises_no_alarm_of_the_update():
    health = _health()
    assert _played(health, [GOOD, *[GOOD | NOTHING] * 9]) == [(6, "no_contrast")]
    # Whatever stands there in place of NaN.
    zeros = {name: 0.0 for name, value in NOTHING.items() if math.isnan(value)}
    row = GOOD | NOTHING | zeros | {"contrast_rate": 0.6}
    assert _played(_health(patience=1), [GOOD, row, row]) == []
    # And what was on stays on, unknown.
    health = _health(patience=1)
    health.check(GOOD | {"logprob_gap": 1.0})
    health.check(GOOD | NOTHING | {"contrast_rate": 0.6})
    assert health.active == ("logprob_gap",)


def test_the_same_figures_are_an_alarm_where_something_was_learned():
    for value in (NAN, math.inf, None):
        (line,) = _health().check(GOOD | {"entropy": value})
        assert line.startswith("not_finite: skipped_updates 0 above 0, entropy not finite; ")
    # No episode had a positive advantage: nothing is broken.
    assert _health().check(GOOD | {"rewarded_logprob": NAN}) == []


def test_a_step_without_episodes_says_nothing_of_the_policy():
    """Means over no episodes are written as 0: no policy stopped searching."""
    empty = dict.fromkeys(("em", "f1", "format_rate", "searches_mean", "contrast_rate"), 0.0)
    lost = GOOD | NOTHING | empty | {"episodes": 0.0, "retrieval_failed": 256.0}
    assert _played(_health(), [GOOD, *[lost] * 9]) == [(2, "retrieval_failed")]


def test_unknown_names_are_no_news():
    assert _played(_health(patience=1), [{}, {"em": 0.0}, {"episodes": 8.0}]) == []


def test_the_gap_of_bfloat16_is_wider():
    rows = _rows({"logprob_gap": 0.049}, {"logprob_gap": 0.051})
    assert _played(_health(dtype="bfloat16"), rows) == [(2, "logprob_gap")]


def test_entropy_that_was_low_from_the_start_has_not_collapsed():
    rows = _rows(*[{"entropy": e} for e in (0.02, 0.015, 0.003, 0.0019)])
    assert _played(_health(patience=1), rows) == [(4, "entropy_collapsed")]
    # Nor is a rise an explosion while a token still has few alternatives.
    rows = _rows(*[{"entropy": e} for e in (0.02, 0.5, 0.99, 1.01)])
    assert _played(_health(patience=1), rows) == [(4, "entropy_exploded")]


def test_the_usual_gradient_is_a_running_median():
    """Spikes do not move it, a new level does after half the steps it remembers."""
    spike = {"grad_norm": 30.0}
    rows = _rows(*[{}] * 6, spike, *[{}] * 5, spike)
    assert _played(_health(), rows) == [(7, "grad_norm"), (13, "grad_norm")]
    health = _health(patience=1)
    for row in _rows(*[{}] * 20, *[spike] * 10):
        health.check(row)
    assert health.active == ("grad_norm",)
    health.check(GOOD | spike)  # the median of ten and ten is 15.15
    assert health.active == ()


def test_gradients_of_nothing_are_no_measure():
    rows = _rows(*[{"grad_norm": 0.0}] * 6, {})
    assert _played(_health(), rows) == []


@pytest.mark.parametrize(("limit", "searches"), [(0, 0.0), (1, 1.0)])
def test_searches_are_judged_where_there_is_a_choice(limit, searches):
    rows = _rows(*[{"searches_mean": searches}] * 6)
    assert _played(_health(max_searches=limit), rows) == []


def test_a_stage_has_levels_of_its_own():
    """The first gradient of a stage is often large, and its entropy another."""
    health = _health(patience=1)
    assert _played(health, _rows(*[{}] * 6, {"entropy": 0.01})) == [(7, "entropy_collapsed")]
    health.begin_stage("stage3", pays_for_answer=True)
    assert health.active == ()
    assert _played(health, _rows({"entropy": 0.01, "grad_norm": 6.7})) == []


def test_a_resumed_run_raises_the_same_alarms():
    names = ("entropy_collapsed", "rewarded_logprob", "truncated", "grad_norm")
    rows = [row for name in names for row in SERIES[name][0]]
    rows += _rows(NOTHING, NOTHING, *[{}] * 6, {"grad_norm": 9.0})
    whole = _health()
    expected = [whole.check(row) for row in rows]
    assert sum(map(len, expected)) >= len(names)
    for cut in range(1, len(rows), 3):
        first, second = _health(), Health(HealthConfig(), max_searches=4, dtype="float32")
        lines = [first.check(row) for row in rows[:cut]]
        saved = json.loads(json.dumps(first.state(), allow_nan=False))
        first.check(rows[cut])  # of what comes after the checkpoint nothing is in it
        second.restore(saved)
        second.begin_stage("stage2", pays_for_answer=True)
        assert lines + [second.check(row) for row in rows[cut:]] == expected
        assert second.state() == whole.state() and second.active == whole.active


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 0}, "patience = 0: expected a whole number"),
        ({"patience": 1.5}, "patience = 1.5"),
        ({"entropy_share": 1.0}, "entropy_share = 1.0: a share, expected between 0 and 1"),
        ({"truncated_rate": 30.0}, "truncated_rate = 30.0: a share"),
        ({"failed_share": 0.0}, "failed_share = 0.0: a share"),
        ({"entropy_rise": 0.5}, "entropy_rise = 0.5: expected more than 1"),
        ({"grad_norm_multiple": float("nan")}, "grad_norm_multiple = nan: expected a number"),
        ({"logprob_gap_bfloat16": -1.0}, "logprob_gap_bfloat16 = -1.0: expected a number above 0"),
    ],
)
def test_nonsense_is_refused(options, message):
    with pytest.raises(UserError, match=message) as caught:
        HealthConfig(**options)
    assert "\n" not in str(caught.value)
