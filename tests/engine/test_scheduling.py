"""Who decodes when: rows stay full, long documents stall nobody, and what fits is planned."""

import numpy as np
import pytest

from r1s_jax.engine.programs import Stop
from r1s_jax.engine.sampling import SamplingConfig, row_seed
from tests import tiny

GREEDY = SamplingConfig(temperature=0.0)


@pytest.fixture(scope="module")
def engine():
    """Four rows, sixteen slots; nothing but a budget ends a turn."""
    engine = tiny.new_engine(stop_strings=(), extend_rows=2, extend_tokens=4)
    engine._eos_ids = np.array([-1], np.int32)
    return engine


def start(engine, budgets):
    """Starts an episode of a two-token prompt for every budget; returns their slots."""
    slots = []
    for i, budget in enumerate(budgets):
        ref = engine.prefill([i, 5])
        slot = engine.insert(ref, seed=row_seed(0, "t", 0, "q", 0, i), budget=budget)
        engine.drop(ref)
        slots.append(slot)
    assert None not in slots
    return slots


def finish(engine, slots):
    """Decodes until every turn is over, then frees the slots."""
    left = set(slots)
    while left:
        for written in engine.decode_chunk(GREEDY).written:
            if written.stop != Stop.RUNNING:
                left.remove(written.slot)
                engine.release(written.slot)
    assert engine.idle


def test_a_long_document_stalls_nobody(engine):
    """Its eleven calls come one by one, each between two chunks of the others."""
    short, *others = start(engine, [2, *[150] * 5])
    stopped = False
    while not stopped:
        written = engine.decode_chunk(GREEDY).written
        stopped = any(w.slot == short and w.stop == Stop.BUDGET for w in written)
    engine.extend(short, [7] * 88, budget=5)
    calls = 0
    while calls < 11:
        step = engine.decode_chunk(GREEDY)
        assert step.steps > 0 and step.extended == 1
        assert len(step.written) == 4 and short not in {w.slot for w in step.written}
        calls += step.extended
    finish(engine, [short, *others])


def test_rows_are_full_while_somebody_waits(engine):
    """Turns of 1 to 40 tokens: a row that stops is replaced before many steps have gone by."""
    rng = np.random.default_rng(0)
    budgets = np.minimum(np.ceil(6 * np.exp(rng.normal(size=200))), 40).astype(int).tolist()
    engine.take_work()
    full, playing, left = None, set(), list(enumerate(budgets))
    while left or playing:
        while left:
            ref = engine.prefill([left[0][0] % 250, 5])
            if ref is None:
                break
            i, budget = left[0]
            slot = engine.insert(ref, seed=row_seed(0, "t", 0, "q", 0, i), budget=budget)
            engine.drop(ref)
            playing.add(slot)
            left.pop(0)
        if not left and full is None:
            full = engine.work.sampled_tokens / engine.work.row_steps
        for written in engine.decode_chunk(GREEDY).written:
            if written.stop != Stop.RUNNING:
                engine.release(written.slot)
                playing.remove(written.slot)
    assert engine.work.sampled_tokens == sum(budgets)
    assert full > 0.9
    assert engine.idle


def test_idle_calls_run_nothing(engine):
    """Nothing decodes, nothing is queued: no program runs, and `busy` is what the caller says."""
    for busy in (True, False):
        step = engine.decode_chunk(GREEDY, busy=busy)
        assert (step.written, step.steps, step.extended, step.busy) == ((), 0, 0, busy)


def test_misuse_is_refused(engine):
    """A slot with something to be written is not released, a free one not extended."""
    (slot,) = start(engine, [2])
    with pytest.raises(ValueError, match=f"slot {slot} was released while something"):
        engine.release(slot)
    with pytest.raises(ValueError, match="new weights while episodes are in the cache"):
        engine.set_weights(tiny.params(), 8)
    finish(engine, [slot])
    with pytest.raises(ValueError, match=f"slot {slot} is free"):
        engine.extend(slot, [1], budget=1)


def test_reset_forgets_everything(engine):
    """After an error in the middle: every slot and page is free, and the engine plays on."""
    start(engine, [30] * 9)
    engine.decode_chunk(GREEDY)
    assert not engine.idle
    engine.reset()
    assert engine.idle
    finish(engine, start(engine, [1]))
