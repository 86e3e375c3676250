"""The display: few plain lines without a terminal, a bar with one, tables as markdown."""

import io

import pytest
from rich.console import Console

from r1s_jax.run.progress import Progress, final_table


def console(terminal=False):
    return Console(file=io.StringIO(), force_terminal=terminal, width=120, highlight=False)


def written(screen):
    return screen.file.getvalue()


def test_plain_lines_are_few_and_say_what_matters():
    screen, now = console(), [0.0]
    with Progress(every=30.0, console=screen, clock=lambda: now[0]) as progress:
        for step in range(1, 101):
            now[0] += 2.0
            metrics = {"reward_mean": 0.5, "retrieval_rate": 0.25, "tokens_per_second": 1234.5}
            if step == 10:
                metrics["em"] = 0.125
            progress.update("stage1", step, 100, metrics)
        progress.note("saved [bold] /tmp/x")
    lines = written(screen).splitlines()
    assert lines[0] == "stage1 1/100  reward 0.500  search 25%  tok/s 1,234"
    assert lines[1] == (
        "stage1 16/100  2:48 min left  reward 0.500  search 25%  tok/s 1,234  EM 0.125"
    )
    assert lines[-2].startswith("stage1 100/100  0:00 min left")
    assert lines[-1] == "saved [bold] /tmp/x"
    assert len(lines) == 1 + 6 + 1 + 1  # first, every 30 s of 198 s, last, note


def test_eta_starts_anew_with_a_stage_and_survives_odd_values():
    screen, now = console(), [0.0]
    with Progress(every=0.0, console=screen, clock=lambda: now[0]) as progress:
        progress.update("a", 1, 10, {})
        now[0] = 3600.0
        progress.update("a", 2, 10, {"reward_mean": float("nan"), "em": None})
        progress.update("b", 1, 10, {"em": 1})
    assert written(screen).splitlines() == ["a 1/10", "a 2/10  8 h 00 min left", "b 1/10  EM 1.000"]


def test_bar_on_a_terminal():
    screen = console(terminal=True)
    with Progress(console=screen) as progress:
        progress.update("stage2", 3, 10, {"reward_mean": 0.5})
        progress.note("hello")
    assert "stage2" in written(screen) and "3/10" in written(screen)
    assert "reward 0.500" in written(screen) and "hello" in written(screen)


@pytest.mark.parametrize("terminal", [False, True])
def test_one_of_several_hosts_says_nothing(terminal):
    screen = console(terminal)
    with Progress(console=screen, shown=False) as progress:
        progress.update("stage2", 10, 10, {"reward_mean": 0.5})
        progress.note("hello")
    assert written(screen) == ""


def test_final_table():
    screen = console()
    text = final_table("EM", ["policy", "EM"], [["base", 0.25], ["a|b", None]], console=screen)
    assert text == "**EM**\n\n| policy | EM |\n| --- | ---: |\n| base | 0.250 |\n| a\\|b | – |\n"
    assert "base" in written(screen) and "0.250" in written(screen)
    with pytest.raises(ValueError, match="1 cells for 2 columns"):
        final_table("EM", ["policy", "EM"], [["base"]], console=screen)
