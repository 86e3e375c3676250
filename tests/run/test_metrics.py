"""Metrics and trajectories: rows on disk, cutting back, comparing two runs."""

import json
import struct

import numpy as np
import pytest

from r1s_jax.run.metrics import MetricsWriter, TrajectoryWriter, identical, read_rows
from r1s_jax.types import (
    Document,
    Question,
    Search,
    Segment,
    StopReason,
    TokenSource,
    Trajectory,
    UserError,
)


def fill(run_dir, steps, offset=0.0):
    with MetricsWriter(run_dir) as writer:
        for step in steps:
            metrics = {"reward_mean": step / 3 + offset, "learn_seconds": 0.1 + offset}
            writer.write(step, "stage1" if step <= 3 else "stage2", "train", metrics)
            if step % 2 == 0:
                writer.write(step, "stage1" if step <= 3 else "stage2", "eval", {"em": 0.25})


def board(run_dir):
    """(step, tag, value) of every scalar in the event files, read without TensorFlow."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((run_dir / "tensorboard").rglob("*tfevents*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
    return sorted(found)


def test_rows_are_exact_and_in_order(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, "s", "train", {"a": 1 / 3, "b": np.float32(0.1), "n": np.int64(7)})
        writer.write(1, "s", "eval", {"nan": float("nan"), "inf": np.inf, "none": None})
        text = (tmp_path / "metrics.jsonl").read_text()  # flushed while still open
    lines = text.splitlines()
    assert lines[0].startswith(
        '{"step": 1, "stage": "s", "phase": "train", "a": 0.3333333333333333'
    )
    assert json.loads(lines[0])["b"] == float(np.float32(0.1))
    assert json.loads(lines[0])["n"] == 7
    assert lines[1].endswith('"phase": "eval", "nan": null, "inf": null, "none": null}')


def test_bad_metrics(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        with pytest.raises(ValueError, match="metric a is 'x'"):
            writer.write(1, "s", "train", {"a": "x"})
        with pytest.raises(ValueError, match="called step"):
            writer.write(1, "s", "train", {"step": 2})
    assert read_rows(tmp_path / "metrics.jsonl") == []


def test_broken_last_line_is_cut_off(tmp_path):
    fill(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 3, "sta')
    assert len(read_rows(path)) == 3
    fill(tmp_path, [])
    assert path.read_text() == whole
    path.write_text(whole.rstrip("\n"))  # killed between the row and its newline
    fill(tmp_path, [3])
    assert [row["step"] for row in read_rows(path)] == [1, 2, 2, 3]
    path.write_text("{broken\n" + whole)
    with pytest.raises(UserError, match=r"metrics\.jsonl:1: .*broken"):
        MetricsWriter(tmp_path)


def test_cut_back_equals_a_run_that_was_never_killed(tmp_path):
    straight, resumed = tmp_path / "a", tmp_path / "b"
    fill(straight, range(1, 7))
    fill(resumed, range(1, 6))
    with MetricsWriter(resumed) as writer:
        writer.cut_back(6)
        assert writer.rows == 6
        assert [r["step"] for r in read_rows(resumed / "metrics.jsonl")] == [1, 2, 2, 3, 4, 4]
    fill(resumed, [5, 6])
    assert (resumed / "metrics.jsonl").read_text() == (straight / "metrics.jsonl").read_text()
    assert board(resumed) == board(straight)
    assert len(board(straight)) == 6 * 2 + 3
    with MetricsWriter(resumed) as writer:
        writer.cut_back(0)
    assert read_rows(resumed / "metrics.jsonl") == [] and not list(
        (resumed / "tensorboard").rglob("*")
    )


def test_identical_ignores_the_clock_only(tmp_path):
    fill(tmp_path / "a", [1, 2])
    rows = read_rows(tmp_path / "a" / "metrics.jsonl")
    other = tmp_path / "other.jsonl"

    def differences(change):
        changed = [dict(row) for row in rows]
        change(changed)
        other.write_text("".join(json.dumps(row) + "\n" for row in changed))
        return identical(tmp_path / "a" / "metrics.jsonl", other)

    assert differences(lambda r: r[0].update(learn_seconds=9.0, tokens_per_second=1.0)) == []
    assert differences(lambda r: r[2].update(em=0.5)) == ["step 2 stage1 eval: em is 0.25 and 0.5"]
    assert differences(lambda r: r[2].pop("em")) == ["step 2 stage1 eval: em is 0.25 and 'absent'"]
    assert differences(lambda r: r.pop()) == ["3 and 2 rows"]


def trajectory(i):
    document = Document(id=f"d{i}", title="Riga", text="…")
    return Trajectory(
        question=Question(id=f"q{i}", text="Where is Rīga?", answers=("Latvia",), kind="country"),
        attempt=0,
        sample=i,
        weights_version=1,
        token_ids_T=np.zeros(2, np.int32),
        sources_T=np.zeros(2, np.int32),
        logprobs_T=np.zeros(2, np.float32),
        drawn_logprobs_T=np.zeros(2, np.float32),
        segments=(
            Segment(source=TokenSource.SAMPLED, text="look"),
            Segment(source=TokenSource.OBSERVATION, text="Title: Riga"),
        ),
        searches=(Search(query="Riga", documents=(document,)),),
        stop_reason=StopReason.ANSWER,
    )


def test_trajectories(tmp_path):
    writer = TrajectoryWriter(tmp_path, per_step=2)
    for step in (1, 2, 11):
        writer.write(
            step, "stage1", [trajectory(i) for i in range(6)], [{"f1": i} for i in range(6)]
        )
    writer.write(12, "stage1", [], [])
    names = sorted(path.name for path in (tmp_path / "trajectories").iterdir())
    assert names == ["stage1_000001.jsonl", "stage1_000002.jsonl", "stage1_000011.jsonl"]
    text = (tmp_path / "trajectories" / names[0]).read_text()
    first, second = (json.loads(line) for line in text.splitlines())
    assert (first["id"], second["id"], second["reward"]) == ("q0", "q3", {"f1": 3})
    assert first["question"] == "Where is Rīga?" and first["answers"] == ["Latvia"]
    assert first["segments"] == [["sampled", "look"], ["observation", "Title: Riga"]]
    assert first["searches"] == [{"query": "Riga", "documents": ["d0"]}]
    assert (first["stop_reason"], first["kind"]) == ("answer", "country")
    writer.cut_back(2)
    assert sorted(path.name for path in (tmp_path / "trajectories").iterdir()) == names[:2]
    with pytest.raises(ValueError, match="1 trajectories and 2 rewards"):
        writer.write(3, "stage1", [trajectory(0)], [{}, {}])


def test_a_host_that_does_not_write_touches_nothing(tmp_path):
    """Of several hosts that share a run directory, one writes; the others go through the same."""
    fill(tmp_path, [1, 2])
    TrajectoryWriter(tmp_path, per_step=2).write(2, "s", [trajectory(0)], [{}])
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert len(before) >= 3
    with MetricsWriter(tmp_path, writes=False) as metrics:
        metrics.cut_back(0)
        metrics.write(3, "s", "train", {"em": 1.0})
        assert metrics.rows == 0
    samples = TrajectoryWriter(tmp_path, per_step=2, writes=False)
    samples.cut_back(0)
    samples.write(3, "s", [trajectory(0)], [{}])
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
