import json

import pytest

from r1s_jax.data.difficulty import Graded, Thresholds, count_difficulties, graded_row
from r1s_jax.data.questions import read_questions
from r1s_jax.types import Question, UserError

QUESTIONS = [
    Question(id="7", text="Wo?", answers=("Köln", "Cologne"), kind="bridge", gold_documents=("d",)),
    Question(id="b", text="?", answers=("x",)),
]


@pytest.mark.parametrize(
    ("needed", "difficulty"),
    [
        *[(1, "easy"), (9, "easy"), (10, "medium"), (20, "medium"), (21, "hard"), (400, "hard")],
        (None, "hard"),
    ],
)
def test_the_papers_thresholds(needed, difficulty):
    assert Thresholds().difficulty(needed) == difficulty


def test_thresholds_of_ones_own():
    narrow = Thresholds(easy_below=3, hard_above=2)
    assert [narrow.difficulty(n) for n in (1, 2, 3, None)] == ["easy", "easy", "hard", "hard"]
    for easy, hard in ((4, 2), (0, 2)):
        with pytest.raises(UserError, match=f"easy_below = {easy}, hard_above = {hard}"):
            Thresholds(easy_below=easy, hard_above=hard)


def test_rollouts_needed_end_with_the_first_right_one():
    rights = [(True,), (False, False, True, True), (False,) * 4]
    graded = [Graded(question=QUESTIONS[1], right=right) for right in rights]
    assert [g.needed for g in graded] == [1, 3, None]
    thresholds = Thresholds(easy_below=2, hard_above=4)
    assert count_difficulties(graded, thresholds) == {"easy": 1, "medium": 1, "hard": 1}


def test_a_graded_file_is_a_question_file(tmp_path):
    graded = [
        Graded(question=QUESTIONS[0], right=(False,) * 11 + (True, False, True)),
        Graded(question=QUESTIONS[1], right=(False,) * 20),
    ]
    rows = [graded_row(g, Thresholds()) for g in graded]
    figures = [[r[k] for k in ("rollouts", "played", "passes", "difficulty")] for r in rows]
    assert figures == [[12, 14, 2, "medium"], [None, 20, 0, "hard"]]
    path = tmp_path / "graded.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_questions(path) == QUESTIONS
