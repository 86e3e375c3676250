"""One host of two, with four of the eight devices: it plays what `test_many_hosts` compares."""

import dataclasses
import os
import pickle
import time
import traceback

import jax
import numpy as np

import r1s_jax.engine.engine
from r1s_jax.models.decoder import abstract_params
from r1s_jax.rollout.episode import STOP_STRINGS
from r1s_jax.rollout.hosts import from_all_hosts
from r1s_jax.rollout.loop import Call, Rollout, RolloutConfig
from r1s_jax.run.compiles import CompileCounter
from r1s_jax.sharding import MeshConfig, make_mesh, named_sharding
from r1s_jax.types import RetrievalFailure, UserError
from tests import tiny
from tests.fakes import DictionaryRetriever

SAMPLES = 4
CONFIG = RolloutConfig(documents=2, max_searches=2, max_new_tokens=48)
CALL = Call(seed=0, phase="train", step=3)
SHAPES = {"rows": 8, "extend_rows": 8}
DATA, TENSOR = MeshConfig(data=8), MeshConfig(data=2, fsdp=2, tensor=2)
# The engine's lanes are those of TENSOR; the learner's parameters are split over the hosts.
SPLIT = MeshConfig(fsdp=4, tensor=2)
AT_ONCE = DictionaryRetriever(mapping={}, default=tiny.DOCUMENTS)
TOO_LONG = tiny.question("long", "word " * tiny.CONFIG.context)
# Host i has i MiB more than the first. So much is the learner's that some slots wait for pages.
MEBIBYTES, RESERVED = 8, 7_250_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class LateRetriever:
    """Late by a random time between two numbers of seconds."""

    rng: np.random.Generator
    between: tuple[float, float] = (0.0, 0.03)

    def search(self, queries, k):
        time.sleep(self.rng.uniform(*self.between))
        return AT_ONCE.search(queries, k)


class NoRetriever:
    def search(self, queries, k):
        return [RetrievalFailure(reason="down")] * len(queries)


def play(engine, questions=tiny.QUESTIONS, *, retriever=AT_ONCE, watch=None):
    rollout = Rollout(engine, tiny.tokenizer(), tiny.PROMPT, retriever, CONFIG)
    sampling = tiny.SAMPLED
    return rollout.run(questions, samples=SAMPLES, sampling=sampling, call=CALL, watch=watch)


def learner_params(mesh):
    """The policy's weights in the learner's layout; every host brings the parts it holds."""
    _, axes = abstract_params(tiny.MODEL)

    def put(value, names):
        value, sharding = np.asarray(value), named_sharding(mesh, names)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return jax.tree.map(put, tiny.params(), axes)


def new_engine(mesh):
    engine = r1s_jax.engine.engine.Engine(
        tiny.MODEL,
        dataclasses.replace(tiny.CONFIG, **SHAPES),
        mesh=mesh,
        token_bytes=tiny.tokenizer().token_bytes,
        stop_strings=STOP_STRINGS,
        eos_ids=tiny.tokenizer().eos_ids,
        reserved_bytes=RESERVED,
    )
    engine.set_weights(learner_params(mesh), 7)
    engine.warm_up([tiny.SAMPLED])
    return engine


def on_data(repeats, index):
    """Eight lanes of one device, whatever one of the hosts has to do or to suffer."""
    engine = new_engine(make_mesh(DATA))
    late = [LateRetriever(rng=np.random.default_rng([index, i])) for i in range(repeats)]
    slow = LateRetriever(rng=np.random.default_rng(index), between=(0.3, 0.5))
    ends = []
    Rollout(engine, tiny.tokenizer(), tiny.PROMPT, slow, CONFIG)
    counter = CompileCounter()
    played = {
        "late": [play(engine, retriever=retriever) for retriever in late],
        # The second host has no question; needs far longer; gets no documents.
        "one question": [play(engine, tiny.QUESTIONS[:1])],
        "one is slow": [
            play(
                engine,
                retriever=slow if index else AT_ONCE,
                watch=lambda _: ends.append(time.monotonic()),
            )
        ],
        "one fails": [play(engine, retriever=NoRetriever() if index else AT_ONCE)],
    }
    long = from_all_hosts(bytes([index]) * 600_000 * (1 + index))
    counter.close()
    try:
        refused = str(play(engine, [*tiny.QUESTIONS, TOO_LONG]))
    except UserError as e:
        refused = str(e)
    engine._extends_wanted = lambda *_: 0  # as if no page ever became free
    try:
        stuck = str(play(engine))
    except RuntimeError as e:
        stuck = str(e)
    report = {
        "pages": engine.plan.pages,
        "compiled": counter.count,
        "refused": refused,
        "stuck": stuck,
        "end": ends[-1],
        "long": [(set(x), len(x)) for x in long],
        "gather_seconds": gather_seconds(engine),
        "idle": engine.idle,
    }
    return played, report


def gather_seconds(engine):
    times = []
    for _ in range(200):
        started = time.perf_counter()
        engine._all_hosts((1, 2, 3, 4, 5))
        times.append(time.perf_counter() - started)
    return float(np.median(times))


def on_tensor(repeats, index):
    """Four lanes of two devices."""
    engine = new_engine(make_mesh(TENSOR))
    late = [LateRetriever(rng=np.random.default_rng([index, i])) for i in range(repeats)]
    played = {"tensor": [play(engine, retriever=retriever) for retriever in late]}
    engine.set_weights(learner_params(make_mesh(SPLIT)), 7)
    return played | {"split": [play(engine)]}


def in_turns():
    """Hosts whose devices take turns in the mesh, as on slices where each holds a square."""
    halves = np.split(np.array(jax.devices()), 2)
    turns = [device for pair in zip(*halves, strict=True) for device in pair]
    return {"in turns": [play(new_engine(make_mesh(DATA, turns)))]}


def main(index, port, folder, repeats):
    """`repeats`: how often it plays (on DATA, on TENSOR), each time with other delays."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
    r1s_jax.engine.engine.device_memory = lambda _: (MEBIBYTES + index) << 20
    try:
        played, report = on_data(repeats[0], index)
        if repeats[1]:
            played |= on_tensor(repeats[1], index) | in_turns()
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # the way out of the interpreter waits minutes for the other host
    with open(f"{folder}/{index}.pickle", "wb") as file:
        pickle.dump({"played": played, **report}, file)
    jax.distributed.shutdown()
