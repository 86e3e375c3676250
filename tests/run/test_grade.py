"""Grading with a scripted policy: which rollouts are played, and what a kill leaves behind."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from r1s_jax.data.difficulty import DIFFICULTIES, Thresholds
from r1s_jax.engine.sampling import SamplingConfig, row_seed
from r1s_jax.rollout.episode import STOP_STRINGS
from r1s_jax.rollout.loop import Rollout, RolloutConfig
from r1s_jax.run.grade import GradeConfig, RolloutLog, grade_report, grades, play_waves
from r1s_jax.run.progress import Progress
from r1s_jax.types import UserError
from tests import tiny
from tests.fakes import DictionaryRetriever, FailingRetriever, ScriptedEngine
from tests.scripted import ENGINE, TOKENIZER

GRADING = GradeConfig(rollouts=11, thresholds=Thresholds(easy_below=3, hard_above=6))
WAVES = [(0, 1), (1, 1), (2, 2), (4, 4), (8, 3)]
NAMES = tuple("abcdefgh")
MOST = [(0, 1), (1, 1), (2, 2), (4, 4), (8, 8), (16, 16)]  # whole waves, of any number of rollouts
SEED = 3
# RIGHTS[question][rollout]; some are right at once, some never.
RIGHTS = dict(
    zip(
        NAMES,
        np.random.default_rng(70).random((8, 32)) < np.linspace(0, 0.4, 8)[:, None],
        strict=True,
    )
)
SETTINGS = {"seed": SEED, "rollout.opening": "", "sampling.banned": []}


class Policy(ScriptedEngine):
    """Right where RIGHTS says so; every episode asks once, so that the retriever can fail it.

    Of a name and a wave it sees `name/wave`; the same key may be played again.
    """

    def __init__(self, right="x"):
        super().__init__(self.turn, config=ENGINE, tokenizer=TOKENIZER, stop_strings=STOP_STRINGS)
        self.right, self.played = right, []
        for wave, (_, width) in enumerate(MOST):
            for name in NAMES:
                for sample in range(width):
                    key = row_seed(SEED, "grade", 0, name, wave, sample)
                    self._names[key.tobytes()] = (f"{name}/{wave}", sample)

    def insert(self, prompt, *, seed, budget):
        self.rows.pop(self._names[seed.tobytes()], None)
        return super().insert(prompt, seed=seed, budget=budget)

    def turn(self, name, sample, turn):
        name, wave = name.split("/")
        if turn == 0:
            return f"hm <|begin_of_query|> {name} <|end_of_query|>"
        number = MOST[int(wave)][0] + sample
        self.played.append((name, number))
        answer = self.right if RIGHTS[name][number] else "z"
        return f"</think><answer>{answer}</answer>"


def play(path, engine=None, *, retriever=None, names=NAMES, grading=GRADING, at_once=5):
    engine = engine or Policy()
    questions = [tiny.question(name) for name in names]
    config = RolloutConfig(documents=1, max_searches=2, max_new_tokens=60, search_window=0.0)
    retriever = retriever or DictionaryRetriever(mapping={})
    log = RolloutLog(path, SETTINGS, questions)
    play_waves(
        Rollout(engine, TOKENIZER, tiny.PROMPT, retriever, config),
        questions,
        log,
        grading,
        sampling=SamplingConfig(),
        seed=SEED,
        at_once=at_once,
        progress=Progress(console=Console(file=io.StringIO())),
    )
    return grades(questions, log, grading)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("grade") / "log.jsonl"
    return play(path), path.read_bytes()


def test_waves_double():
    assert GRADING.waves == WAVES
    paper = GradeConfig()
    assert paper.waves == [(0, 1), (1, 1), (2, 2), (4, 4), (8, 8), (16, 4)]


def test_needed_is_the_first_right_rollout(tmp_path):
    engine = Policy()
    graded = play(tmp_path / "log.jsonl", engine)
    expected, played = [], []
    for name in NAMES:
        right = RIGHTS[name][:11].tolist()
        first = right.index(True) + 1 if any(right) else None
        expected.append(first)
        # The wave of the first right one is the last.
        last = next((s + w for s, w in WAVES if first and s + w >= first), 11)
        played += [(name, number) for number in range(last)]
    assert [g.needed for g in graded] == expected
    assert None in expected and 1 in expected and len(set(expected)) >= 4  # else it shows little
    assert sorted(engine.played) == sorted(played)
    assert [list(g.right) for g in graded] == [
        RIGHTS[name][: len(g.right)].tolist() for name, g in zip(NAMES, graded, strict=True)
    ]


@pytest.mark.parametrize("at_once", [1, 3, 10_000])
def test_the_size_of_a_call_changes_nothing(whole, tmp_path, at_once):
    path = tmp_path / "log.jsonl"
    assert (play(path, at_once=at_once), path.read_bytes()) == whole


def test_a_grade_does_not_depend_on_the_other_questions(whole, tmp_path):
    assert play(tmp_path / "log.jsonl", names="ceg") == whole[0][2::2]


def test_killed_anywhere_the_same_command_goes_on(whole, tmp_path):
    """Within the header, within lines, and between two of them."""
    graded, text = whole
    path = tmp_path / "log.jsonl"
    header = text.index(b"\n") + 1
    between = text.index(b"\n", 800) + 1
    for length in (0, 7, header - 1, *range(header, len(text), 149), between, len(text)):
        path.write_bytes(text[:length])
        engine = Policy()
        assert (play(path, engine), path.read_bytes()) == (graded, text)
        kept = text[header:length].count(b"\n")
        done = [json.loads(line) for line in text[header:].splitlines()[:kept]]
        # Nothing is played twice.
        again = len(engine.played) + sum(len(row["right"]) for row in done)
        assert again == sum(len(g.right) for g in graded)


def test_what_another_run_has_written_is_refused_and_left_alone(whole, tmp_path):
    path = tmp_path / "log.jsonl"
    questions = [tiny.question(name) for name in NAMES]
    lines = whole[1].decode().splitlines()
    for text, settings, said in (
        (whole[1].decode(), {**SETTINGS, "seed": 4}, "log.jsonl: seed is 3 in this file and 4 now"),
        (whole[1].decode(), {"seed": 3}, "rollout.opening is '' in this file and None now"),
        ('{"idx": 1, "question": "?"}\n', SETTINGS, "not a log of rollouts"),
        ("7\n", SETTINGS, "not a log of rollouts"),
        ("precious", SETTINGS, "not a log of rollouts"),
        ("\n".join([lines[0], "?", *lines[1:], ""]), SETTINGS, "log.jsonl:2: not a wave: '?'"),
        ("\n".join([*lines, lines[1], ""]), SETTINGS, f"{len(lines) + 1}: not a wave"),
        ("\n".join([lines[0], lines[-1], ""]), SETTINGS, "log.jsonl:2: not a wave"),
        ("\n".join([lines[0], lines[1].replace('"a"', '"q"'), ""]), SETTINGS, ":2: not a wave"),
    ):
        path.write_text(text)
        with pytest.raises(UserError) as caught:
            RolloutLog(path, settings, questions)
        assert said in str(caught.value) and "\n" not in str(caught.value)
        assert path.read_text() == text


def grading_of(rollouts):
    return GradeConfig(rollouts=rollouts, thresholds=Thresholds(easy_below=1, hard_above=1))


def test_what_was_played_for_another_number_of_rollouts_serves(tmp_path):
    """The grades are those of a new log; played again is only what a question had of a cut wave."""
    assert [int(RIGHTS[n].argmax()) + 1 for n in "bcdefgh"] == [20, 13, 11, 12, 2, 1, 2]
    assert not RIGHTS["a"].any()
    path = tmp_path / "log.jsonl"
    play(path, grading=grading_of(11))
    again = [(n, i) for n in "abcde" for i in range(8, 16)]  # d was right within the cut wave
    for rollouts, played in (
        (30, again + [(n, i) for n in "ab" for i in range(16, 30)]),
        *((fewer, []) for fewer in (20, 12, 11, 1, 30)),
        (32, [(n, i) for n in "ab" for i in range(16, 32)]),
        (11, []),
    ):
        engine, grading, before = Policy(), grading_of(rollouts), path.read_bytes()
        graded = play(path, engine, grading=grading)
        assert sorted(engine.played) == sorted(played)
        assert path.read_bytes().startswith(before) and (played or path.read_bytes() == before)
        assert graded == play(tmp_path / f"new{rollouts}.jsonl", grading=grading)


def test_killed_while_more_is_played(tmp_path):
    """Also where the waves of two numbers of rollouts meet in one log."""
    path = tmp_path / "log.jsonl"
    play(path, grading=grading_of(11))
    first = len(path.read_bytes())
    graded = play(path, grading=grading_of(30))
    text = path.read_bytes()
    for length in range(first, len(text), 101):
        path.write_bytes(text[:length])
        assert play(path, grading=grading_of(20)) == play(tmp_path / "20", grading=grading_of(20))
        assert play(path, grading=grading_of(30)) == graded


class Flaky:
    """Fails the first `failures` searches that name `name`."""

    def __init__(self, name, failures):
        self.name, self.failures = name, failures

    def search(self, queries, k):
        failing = self.name in queries and self.failures > 0
        self.failures -= failing
        pattern = self.name if failing else "no query has this"
        return FailingRetriever(pattern=pattern).search(queries, k)


def test_episodes_lost_to_the_retriever_are_played_again(whole, tmp_path):
    path = tmp_path / "log.jsonl"
    retriever = Flaky("b", failures=2)
    assert (play(path, retriever=retriever), path.read_bytes()) == whole
    assert retriever.failures == 0


def test_a_retriever_that_stays_down_is_told_and_costs_nothing(whole, tmp_path):
    path = tmp_path / "log.jsonl"
    with pytest.raises(UserError, match=r"1 of 5 questions lost .* \(the fake is down\)"):
        play(path, retriever=FailingRetriever(pattern="b"))
    assert (play(path), path.read_bytes()) == whole


@pytest.mark.parametrize(("measure", "easy"), [("acc_r", True), ("em", False)])
def test_what_counts_as_right(tmp_path, measure, easy):
    """Cover-EM finds the gold answer among other words, exact match does not."""
    grading = GradeConfig(rollouts=11, measure=measure, thresholds=GRADING.thresholds)
    (graded,) = play(tmp_path / "log.jsonl", Policy("an x, no"), names="h", grading=grading)
    assert (graded.needed is not None) == easy


def test_settings_that_make_no_sense_are_refused():
    for settings, said in (
        ({"rollouts": 19}, "rollouts = 19 do not show .* hard_above = 20"),
        ({"keep": ("easy", "harder")}, "keep = 'harder'"),
        ({"measure": "f1"}, "measure = 'f1'"),
    ):
        with pytest.raises(UserError, match=said):
            GradeConfig(**settings)


def test_the_report_counts(whole, capsys):
    text = grade_report(whole[0], GRADING.thresholds)
    needed = [g.needed for g in whole[0]]
    counts = [
        sum(n is not None and n < 3 for n in needed),
        sum(n is not None and 3 <= n <= 6 for n in needed),
        sum(n is None or n > 6 for n in needed),
    ]
    for name, need, count in zip(
        DIFFICULTIES, ("below 3", "3 to 6", "above 6"), counts, strict=True
    ):
        assert f"| {name} | {need} | {count} | {count / 8:.3f} |" in text
    assert f"8 questions, {sum(len(g.right) for g in whole[0])} rollouts" in text
    assert "easy" in capsys.readouterr().out
