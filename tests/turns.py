"""One turn of several episodes on a real engine, and whether two plays are one to the bit."""

import dataclasses

import numpy as np

from r1s_jax.engine.engine import Engine
from r1s_jax.engine.programs import Stop
from r1s_jax.engine.sampling import SamplingConfig, row_seed


def play_turn(engine: Engine, prompts, sampling: SamplingConfig, budget: int):
    """(tokens, log-probs, stop) of every prompt's first turn; sample i's key is that of `q`, i."""
    results, playing, started = [None] * len(prompts), {}, 0
    while started < len(prompts) or playing:
        while started < len(prompts):
            ref = engine.prefill(prompts[started])
            if ref is None:
                break
            seed = row_seed(0, "eval", 0, "q", 0, started)
            slot = engine.insert(ref, seed=seed, budget=budget)
            engine.drop(ref)
            playing[slot] = started, [], []
            started += 1
        for written in engine.decode_chunk(sampling).written:
            index, tokens, logprobs = playing[written.slot]
            tokens += written.tokens.tolist()
            logprobs += written.logprobs.tolist()
            if written.stop != Stop.RUNNING:
                results[index] = tokens, np.array(logprobs), written.stop
                engine.release(written.slot)
                del playing[written.slot]
    return results


def assert_same_trajectories(got, expected):
    """Bit for bit: ids, sources, log-probs, searches, stop reason; every key of `got`."""
    for key, trajectory in got.items():
        for field in dataclasses.fields(trajectory):
            a, b = getattr(trajectory, field.name), getattr(expected[key], field.name)
            if isinstance(a, np.ndarray):
                np.testing.assert_array_equal(a, b, err_msg=f"{key} {field.name}")
            else:
                assert a == b
