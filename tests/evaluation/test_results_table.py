"""The Markdown beside the published table; the released files score as published."""

import json

import pytest

from r1s_jax.evaluation.published import dataset_in, published_results
from r1s_jax.evaluation.records import write_records
from r1s_jax.evaluation.scores import Figure, Report
from r1s_jax.evaluation.table import results_markdown, score_file
from r1s_jax.types import UserError
from tests.evaluation.transcripts import EIFFEL, record, released

REPORT = Report(
    count=40,
    figures={
        "em": Figure(mean=0.5, low=0.25, high=0.75, count=40),
        "acc_l": Figure(mean=0.1234, low=0.1, high=0.2, count=30),
        "searches": Figure(mean=2.114, low=2.0, high=2.2, count=40),
    },
    kinds={"a|b": {"em": Figure(mean=1.0, low=1.0, high=1.0, count=7)}},
    stop_reasons={"finished": 39, "eos": 1},
    judge="gpt",
    punished_for_documents=4,
)


def test_markdown():
    facts = {"top-k": 5, "corpus": "kilt", "retriever": {"dim": 8}}
    text = results_markdown({"search": REPORT}, dataset="hotpotqa:validation", facts=facts)
    lines = text.splitlines()
    empty = "– | – | –"
    assert lines[0] == "### hotpotqa:validation"
    assert lines[2].startswith("|  | questions | EM | ACC_R | F1 | ACC_L | searches | answer shown")
    assert lines[4] == (
        "| search | 40 | 50.0 (25.0 to 75.0) | – | – | 12.3 (10.0 to 20.0) | 2.11 (2.00 to 2.20) "
        f"| {empty} |"
    )
    assert lines[5] == f"| published: GPT-4o-mini, naive | – | – | 32.4 | – | 40.4 | {empty} | – |"
    assert (
        f"| published: R1-Searcher, Qwen2.5-7B | – | – | 65.4 | – | 75.0 | {empty} | – |" in lines
    )
    assert "#### search, by kind of question" in lines
    assert f"| a\\|b | 7 | 100.0 (100.0 to 100.0) | – | – | – | {empty} | – |" in lines
    for note in (
        "- search: episodes ended: finished 39, eos 1",
        "- search: known of some of 40 questions: ACC_L of 30",
        "- search: verdicts of ACC_L by gpt",
        "- top-k: 5",
        "- corpus: kilt",
        '- retriever: {"dim": 8}',
    ):
        assert note in lines
    assert any(line.startswith("- search: 4 transcripts (10.0%) say") for line in lines)
    assert any(line.startswith("- published rows:") and "2017-10-01" in line for line in lines)


def test_without_published_rows():
    text = results_markdown({"a": REPORT, "b": REPORT}, dataset="atlas:eval")
    assert "published" not in text and text.count("| 40 |") == 2
    assert results_markdown({"a": REPORT}).startswith("### Results\n")


def test_the_published_table():
    """The sums of the paper's columns, added up from its text."""
    sums = {
        name: [round(sum(getattr(row, part) for row in published_results(name)), 3)
               for part in ("acc_r", "acc_l")]
        for name in ("hotpotqa", "2wikimultihopqa", "bamboogle", "musique")
    }  # fmt: skip
    assert sums == {
        "hotpotqa": [3.402, 3.956],
        "2wikimultihopqa": [3.608, 3.280],
        "bamboogle": [2.790, 3.108],
        "musique": [1.554, 1.702],
    }
    assert {len(published_results(name)) for name in sums} == {8}
    assert "KILT" in results_markdown({"a": REPORT}, dataset="musique")
    assert published_results("HotpotQA") == published_results("hotpotqa:validation")
    assert published_results("") == ()


@pytest.mark.parametrize(
    ("name", "dataset"),
    [
        ("hotpotqa:validation", "hotpotqa"),
        ("data/released_HotpotQA_qwen.jsonl", "hotpotqa"),
        ("eval_2wiki", "2wikimultihopqa"),
        ("2wikimultihopqa:validation", "2wikimultihopqa"),
        ("atlas:eval", ""),
    ],
)
def test_the_data_set_that_a_name_speaks_of(name, dataset):
    assert dataset_in(name) == dataset


def test_a_file_with_a_bad_line(tmp_path):
    path = tmp_path / "r.jsonl"
    write_records(path, [record("1", documents=(EIFFEL,))])
    with path.open("a") as file:
        file.write("{\n")
    with pytest.raises(UserError, match=r"r\.jsonl:2: not a line of JSON.*--skip_bad"):
        score_file(path)
    skipped = []
    report, markdown = score_file(path, skipped=skipped, facts={"top-k": 5}, resamples=10)
    assert report.count == 1 and len(skipped) == 1
    assert "- bad lines left out: 1\n" in markdown and "- top-k: 5\n" in markdown
    json.dumps(report.as_json(), allow_nan=False)


def test_two_released_files_question_by_question():
    text = score_file(released("qwen"), against=released("llama"))[1]
    lines = text.splitlines()
    assert [line.split(" |")[0] for line in lines[4:7]] == [
        "| released_hotpotqa_qwen.jsonl",
        "| released_hotpotqa_llama.jsonl",
        "| released_hotpotqa_qwen.jsonl less released_hotpotqa_llama.jsonl",
    ]
    em, _, _, judged, searches = lines[6].split(" | ")[2:7]
    assert [cell.split(" (")[0] for cell in (em, judged, searches)] == ["-0.4", "0.4", "-0.69"]
    # Paired: 0.4 points apart, and surer of it than of either mean (8.6 points wide).
    low, high = (float(end) for end in em.split("(")[1].rstrip(")").split(" to "))
    assert low < -0.4 < high and 6 < high - low < 8


@pytest.mark.parametrize(
    ("policy", "em", "acc_r", "f1", "acc_l", "searches", "punished"),
    [
        ("qwen", "58.0", "65.4", "71.9", "0.750", "2.11", 17),
        ("llama", "58.4", "64.8", "70.6", "0.746", "2.80", 15),
    ],
)
def test_released_files_score_as_published(policy, em, acc_r, f1, acc_l, searches, punished):
    report, markdown = score_file(released(policy), dataset="hotpotqa")
    means = {name: figure.mean for name, figure in report.figures.items()}
    assert f"{100 * means['em']:.1f}" == em
    assert f"{100 * means['acc_r']:.1f}" == acc_r
    assert f"{100 * means['f1']:.1f}" == f1
    assert f"{means['acc_l']:.3f}" == acc_l
    assert f"{means['searches']:.2f}" == searches
    assert report.count == 500 and {f.count for f in report.figures.values()} == {464, 500}
    assert report.punished_for_documents == punished
    assert f"| {em} (" in markdown and f"{punished} transcripts (" in markdown
    for name in ("em", "acc_r"):  # 500 drawn: a standard error of about 2.2 points
        figure = report.figures[name]
        assert 0.035 < figure.mean - figure.low < 0.05 > figure.high - figure.mean > 0.035
