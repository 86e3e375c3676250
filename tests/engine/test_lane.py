"""The host's bookkeeping of pages and slots, case by case; `test_lane_play` plays at random."""

from __future__ import annotations

import numpy as np
import pytest

from r1s_jax.engine.lane import Lane

PAGE = 4
SEED = np.zeros(2, np.uint32)


def new_lane(*, slots=8, pages=100, pages_per_episode=8):
    return Lane(slots=slots, pages=pages, page=PAGE, pages_per_episode=pages_per_episode)


def start(lane, tokens, samples=1, budget=5):
    """The slots of some samples of a prompt, which is dropped again."""
    prompt = lane.prefill(tokens)
    slots = [lane.insert(prompt, seed=SEED, budget=budget) for _ in range(samples)]
    lane.drop(prompt)
    return slots


def write_all(lane):
    """Everything queued, as (start, tokens) of the blocks; and the copies of it."""
    blocks = []
    while taken := lane.blocks(4, 5):
        blocks += [(b.start, list(b.tokens)) for b in taken]
    return blocks, lane.copies()


def finish(lane, slots):
    for slot in slots:
        lane.release(slot)
    assert lane.idle


def test_samples_share_all_but_the_last_page():
    """Ten written tokens: two full pages for all, and a copy each of the third."""
    lane = new_lane()
    prompt = lane.prefill(list(range(11)))
    slots = [lane.insert(prompt, seed=SEED, budget=5) for _ in range(3)]
    lane.drop(prompt)
    assert len({tuple(s.pages[:2]) for s in slots}) == 1
    own = [s.pages[2] for s in slots]
    assert [len(s.pages) for s in slots] == [3] * 3 and len({*own, prompt.pages[2]}) == 4
    assert lane.ready() == [] and lane.copies() == []  # nothing is written yet
    blocks, copies = write_all(lane)
    assert blocks == [(0, [0, 1, 2, 3, 4]), (5, [5, 6, 7, 8, 9])]
    assert copies == [(prompt.pages[2], page) for page in own] and lane.copies() == []
    assert [(s.length, s.pending) for s in lane.ready()] == [(10, 10)] * 3
    finish(lane, slots)


@pytest.mark.parametrize("length, own", [(1, 0), (5, 0), (9, 0), (2, 1), (4, 1), (8, 1)])
def test_only_a_page_with_room_is_copied(length, own):
    """The last token is not written: a prompt of 4n + 1 tokens fills n pages."""
    lane = new_lane()
    slots = start(lane, list(range(length)), samples=2)
    assert len(write_all(lane)[1]) == 2 * own
    assert [len(s.pages) - s.shared for s in slots] == [own] * 2
    assert lane.decoding(8, 4) == slots and len(slots[0].pages) == -(-(length + 3) // PAGE)
    finish(lane, slots)


def test_questions_share_common_full_pages():
    """Prompts begin with the same pages as far as they agree, while somebody holds those."""
    lane = new_lane()
    (first,) = start(lane, [*range(8), 70, 71, 72, 73, 74])
    (second,) = start(lane, [*range(8), 80, 81, 82, 83, 84])
    (third,) = start(lane, [9, *range(1, 8), 70, 71, 72, 73, 74])  # differs at once
    assert first.pages[:2] == second.pages[:2] and first.pages[2] != second.pages[2]
    assert not {*third.pages} & {*first.pages, *second.pages}
    blocks, _ = write_all(lane)
    assert (8, [80, 81, 82, 83]) in blocks and sum(len(tokens) for _, tokens in blocks) == 28
    lane.release(first)
    (fourth,) = start(lane, [*range(8), 80, 81, 82, 83, 99])
    assert fourth.pages == second.pages and lane.ready() == [second, third]
    assert lane.copies() == [] and lane.ready() == [second, third, fourth]
    for slot in (second, third, fourth):
        lane.release(slot)
    assert lane.idle
    (again,) = start(lane, list(range(9)))  # nothing is known any more
    assert sum(len(tokens) for _, tokens in write_all(lane)[0]) == 8
    finish(lane, [again])


def test_shared_pages_are_written_before_they_are_read():
    """Bug: a prompt that fills its pages and shared all of them decoded before they were written,
    where the prompt that was to write them had come between the same two chunks."""
    lane = new_lane()
    (first,) = start(lane, list(range(9)))
    assert lane.prefill(list(range(9))) is None
    lane.copies()
    assert lane.ready() == []
    write_all(lane)
    (second,) = start(lane, list(range(9)))
    lane.copies()
    assert lane.ready() == [first, second] and first.pages == second.pages
    finish(lane, [first, second])


def test_a_dropped_prompt_leaves_nothing():
    """Before, while and after it is written, with and without samples."""
    lane = new_lane()
    for written in (0, 1, 9):
        prompt = lane.prefill(list(range(20)))
        lane.blocks(written, 5)
        lane.drop(prompt)
        assert lane.idle and lane.blocks_queued(5) == 0 and not lane.open
    slots = start(lane, list(range(20)))
    lane.blocks(1, 5)
    with pytest.raises(ValueError, match="slot 0 was released while something is to be written"):
        lane.release(slots[0])
    write_all(lane)
    finish(lane, slots)
    with pytest.raises(ValueError, match="slot 0 is free"):
        lane.slot(0)


def test_one_prompt_at_a_time_and_no_more_than_slots():
    lane = new_lane(slots=2)
    prompt = lane.prefill([1, 2])
    assert lane.prefill([3]) is None and lane.open
    slots = [lane.insert(prompt, seed=SEED, budget=5) for _ in range(2)]
    assert lane.insert(prompt, seed=SEED, budget=5) is None
    lane.drop(prompt)
    assert lane.prefill([3]) is None and lane.free_slots == 0
    write_all(lane)
    lane.release(slots[0])
    assert lane.prefill([3]) is not None


def test_documents_follow_what_was_decoded():
    """The last sampled token is written with them, their last is fed to the next decode step."""
    lane = new_lane()
    slots = start(lane, [1, 2, 3], samples=2)
    write_all(lane)
    assert lane.decoding(2, 3) == slots
    slots[0].length, slots[0].pending, slots[0].budget = 5, 77, 0
    assert lane.ready() == [slots[1]]
    lane.extend(slots[0], [90, 91, 92], budget=4)
    assert lane.blocks_queued(2) == 2 and lane.ready() == [slots[1]]
    assert write_all(lane) == ([(5, [77, 90, 91])], [])
    assert (slots[0].length, slots[0].pending, slots[0].budget) == (8, 92, 4)
    # Longer sequences come last, whoever was first.
    assert lane.decoding(2, 3) == [slots[1], slots[0]] and lane.decoding(1, 3) == [slots[0]]
    finish(lane, slots)


def test_blocks_come_in_order():
    """First come first written, a long sequence over several calls, no call above its count."""
    lane = new_lane()
    slots = [s for i in range(3) for s in start(lane, [i] * 8, samples=2)]
    assert lane.blocks_queued(4) == 6
    # A prompt's two blocks make two slots ready.
    assert [lane.blocks_wanted(n, 4) for n in (0, 1, 2, 3, 5, 9)] == [0, 2, 2, 4, 6, 6]
    calls = []
    while taken := lane.blocks(3, 4):
        calls.append([(b.tokens[0], b.start, len(b.tokens)) for b in taken])
    assert calls == [[(0, 0, 4), (0, 4, 3), (1, 0, 4)], [(1, 4, 3), (2, 0, 4), (2, 4, 3)]]
    lane.copies()
    finish(lane, slots)


def short_lived(**sizes):
    """A lane whose episodes so far took no page at all."""
    lane = new_lane(**sizes)
    for _ in range(200):
        slots = start(lane, [1])
        lane.copies()
        finish(lane, slots)
    return lane


def test_no_more_come_in_than_will_fit():
    """Bug: where pages are few, everybody came in, and then one row decoded at a time while all
    the others held pages. Before anything has ended, episodes may fill their contexts."""
    for lane, fit in [(new_lane(pages=30), 3), (new_lane(pages=65), 8), (short_lived(pages=30), 8)]:
        prompt = lane.prefill([1])
        slots = [lane.insert(prompt, seed=SEED, budget=31) for _ in range(9)]
        assert slots.count(None) == 9 - fit


def test_pages_are_given_so_that_all_can_finish():
    """Two may not both hold what neither can go on from; the first to come gets it all."""
    with pytest.raises(ValueError, match="10 pages cannot hold an episode of 8"):
        new_lane(pages=10)
    lane = short_lived(pages=12)
    slots = start(lane, [1], samples=2, budget=31)
    lane.copies()
    got = []
    for _ in range(8):
        got.append([s.index for s in lane.decoding(2, PAGE)])
        for index in got[-1]:
            slots[index].length += PAGE
    # With three pages each, five are left: enough for one of them to fill its eight.
    assert got == [[0, 1]] * 3 + [[0]] * 5 and [len(s.pages) for s in slots] == [8, 3]
    # Bug: calls of `extend` were made, over and over, for documents that had no pages.
    lane.extend(slots[1], [5] * 6, budget=2)
    assert (lane.blocks_queued(4), lane.blocks_wanted(1, 4), lane.blocks(4, 4)) == (0, 0, [])
    lane.release(slots[0])
    assert (lane.blocks_queued(4), lane.blocks_wanted(1, 4)) == (2, 2)
    assert len(lane.blocks(4, 4)) == 2 and lane.decoding(2, PAGE) == slots[1:]
    finish(lane, slots[1:])
