"""Random play of whole rollouts on a simulated device: the engine's own host side, every page
counted after every operation, and every row's ids read back from the pages."""

from __future__ import annotations

import dataclasses
import zlib
from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest

from r1s_jax.engine.lane import TRASH, Lane
from r1s_jax.engine.programs import Stop
from r1s_jax.engine.state import Chunk
from r1s_jax.retrieval.pool import SearchPool
from r1s_jax.rollout.episode import Need
from r1s_jax.rollout.play import Samples, play
from r1s_jax.sharding import MeshConfig
from tests import tiny

PAGE = 4


class CheckedLane(Lane):
    """A lane whose pages are counted anew after every operation."""

    operations = 0

    def __init__(self, **sizes):
        self._few = sizes["slots"] % 2 == 0
        super().__init__(**sizes)
        self.pages, self.fresh, self.prompt = sizes["pages"], set(), None

    @property
    def _typical(self):
        """In half of the plays as many come in as the banker allows."""
        return self._mean if self._few else 0.0

    @_typical.setter
    def _typical(self, mean):
        self._mean = mean

    def prefill(self, tokens):
        prompt = super().prefill(tokens)
        self.prompt = prompt or self.prompt
        return self.checked(prompt)

    def insert(self, prompt, *, seed, budget):
        return self.checked(super().insert(prompt, seed=seed, budget=budget))

    def extend(self, slot, tokens, budget):
        return self.checked(super().extend(slot, tokens, budget))

    def drop(self, prompt):
        super().drop(prompt)
        self.prompt = None
        self.checked()

    def release(self, slot):
        self.checked(super().release(slot))

    def blocks(self, count, width):
        return self.checked(super().blocks(count, width))

    def copies(self):
        return self.checked(super().copies())

    def decoding(self, rows, chunk):
        return self.checked(super().decoding(rows, chunk))

    def _take(self, count):
        pages = super()._take(count)
        self.fresh.update(pages)
        return pages

    def checked(self, result=None):
        CheckedLane.operations += 1
        users = Counter(self.prompt.pages if self.prompt else ())
        own = []
        for slot in filter(None, self._slots):
            users.update(slot.pages)
            own += slot.pages[slot.shared :]
            if slot.prompt and len(slot.pages) > slot.shared:
                users[slot.prompt.pages[slot.shared]] += 1
            assert slot.length <= PAGE * len(slot.pages) and len(slot.pages) <= self._limit
        assert users == self._users and all(users[page] == 1 for page in own)
        assert sorted([*self._free, *users]) == list(range(1, self.pages))
        assert self._known == {content: page for page, content in self._content.items()}
        assert self._content.keys() <= users.keys()
        return result


def next_token(seed, ids):
    """What the simulated policy writes after these ids."""
    return zlib.crc32(np.array([*seed, *ids], np.int64).tobytes()) % 1009


def stop_of(token):
    """A third of the tokens end a turn."""
    return {0: Stop.STRING, 1: Stop.EOS}.get(token % 9, Stop.RUNNING)


class Device:
    """The engine's programs, with a token as the KV of its place.

    A place is written once and read only afterwards; what a row reads is what it writes after.
    """

    def __init__(self, engine):
        self.engine = engine
        self.places = np.full((engine.plan.lanes, engine.plan.pages, PAGE), -1)

    def reads(self, lane, table, length):
        at = np.arange(length)
        ids = self.places[lane, table[at // PAGE], at % PAGE]
        assert not {*table[at // PAGE]} & {TRASH, *self.engine._lanes[lane].fresh} and min(ids) >= 0
        return ids.tolist()

    def opened(self, lane, page):
        """The page, which holds nothing if it was just given to a sequence."""
        assert page != TRASH
        if page in self.engine._lanes[lane].fresh:
            self.engine._lanes[lane].fresh.remove(page)
            self.places[lane, page] = -1
        return self.places[lane, page]

    def writes(self, lane, table, position, token):
        page = self.opened(lane, int(table[position // PAGE]))
        assert page[position % PAGE] == -1
        page[position % PAGE] = token

    def copy(self, pages, sources, targets):
        for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
            if target:
                lane = i * self.engine.plan.lanes // len(sources)
                self.opened(lane, int(target))[:] = self.places[lane, source]
        return pages

    def extend(self, weights, pages, tokens, table, starts, counts):
        for row in range(len(tokens)):
            lane = row // self.engine.plan.extend_rows
            for t in range(counts[row]):
                self.writes(lane, table[row], starts[row] + t, tokens[row, t])
        for row in np.flatnonzero(counts):
            self.reads(row // self.engine.plan.extend_rows, table[row], starts[row] + counts[row])
        return pages

    def decode(self, sampling, steps, weights, tables, pages, rows, leave):
        count = len(rows.lengths_R)
        tokens, counts = np.zeros((count, steps), np.int32), np.zeros(count, np.int32)
        stops, pending = np.zeros(count, np.int8), rows.pending_R.copy()
        step, live = 0, rows.budget_R > 0
        while step < steps and live.sum() > leave:
            for row in np.flatnonzero(live):
                lane, table = row // self.engine.plan.rows, rows.table_RJ[row]
                length = rows.lengths_R[row] + step
                self.writes(lane, table, length, pending[row])
                token = next_token(rows.seeds_R2[row], self.reads(lane, table, length + 1))
                tokens[row, step] = pending[row] = token
                counts[row] += 1
                over = Stop.BUDGET if counts[row] == rows.budget_R[row] else Stop.RUNNING
                stops[row] = stop_of(token) or over
                live[row] = stops[row] == Stop.RUNNING
            step += 1
        arrays = (tokens, tokens * 0.0, tokens * 0.0, counts, stops, counts, counts)
        names = [name for name in Chunk.__dataclass_fields__ if name != "steps"]
        named = {name: jnp.asarray(x) for name, x in zip(names, arrays, strict=True)}
        return pages, Chunk(**named, steps=jnp.asarray(step))


class Script:
    """An episode that knows all it should be: what to expect of the device next."""

    query, documents = "q", 1

    def __init__(self, rng, prompt, context):
        self.seed = rng.integers(0, 2**32, 2, dtype=np.uint32)
        self.ids, self.context, self.need = list(prompt), context, Need.TOKENS
        self.turn, self.left = int(rng.integers(1, 2 * context)), int(rng.integers(0, 4))
        self.rng = np.random.default_rng(self.seed)

    @property
    def budget(self):
        return min(self.turn, self.context - len(self.ids))

    def write(self, tokens, logprobs, drawn_logprobs, stop):
        for token in tokens.tolist():
            assert token == next_token(self.seed, self.ids)
            self.ids.append(token)
        if stop != Stop.RUNNING:
            self.need = Need.NOTHING if stop == Stop.EOS or not self.left else Need.DOCUMENTS

    def observe(self, outcome):
        """Documents, now and then such that one token is left to sample, or too many."""
        self.left -= 1
        left = self.context - 1 - len(self.ids)
        count = left if self.rng.random() < 0.3 else int(self.rng.integers(1, self.context))
        self.need = Need.TOKENS if 0 < count <= left else Need.NOTHING
        documents = self.rng.integers(0, 2000, count).tolist() if self.need == Need.TOKENS else []
        self.ids += documents
        return documents


class Pool(SearchPool):
    """Answers come in any order, and late."""

    def __init__(self, rng):
        self.rng, self.out = rng, []

    @property
    def pending(self):
        return len(self.out)

    def submit(self, ticket, query, k):
        self.out.append(ticket)

    def step(self):
        pass

    def wait(self, timeout):
        pass

    def finished(self):
        came = [t for t in self.out if self.rng.random() < 0.3]
        self.out = [t for t in self.out if t not in came]
        return [(t, ()) for t in came]


@pytest.fixture(scope="module", params=[1, 2])
def engine(request):
    """With one lane, and with two."""
    return tiny.new_engine(mesh=MeshConfig(data=request.param))


def simulated(engine, rng, monkeypatch):
    """The engine's own host side, with random sizes, over a device that holds tokens."""
    monkeypatch.setattr("r1s_jax.engine.engine.Lane", CheckedLane)
    size = lambda low, high: int(rng.integers(low, high))  # noqa: E731
    context = size(2, 50)
    engine.config = dataclasses.replace(
        engine.config, context=context, page=PAGE, chunk=size(1, 9), extend_tokens=size(1, 14)
    )
    per_episode, rows = engine.config.pages_per_episode, size(1, 6)
    engine.plan = dataclasses.replace(
        engine.plan, rows=rows, slots=size(rows, 4 * rows + 1), extend_rows=size(1, 5),
        pages_per_episode=per_episode, pages=per_episode + 3 + int(30 * rng.random() ** 3),
    )  # fmt: skip
    engine.reset()
    engine._programs = Device(engine)
    return context


def questions(rng, context, count):
    """Prompts that begin alike, often end with a page, and come more than once."""
    roots = rng.integers(0, 3000, (2, context))
    for _ in range(count):
        length = int(rng.integers(1, context))
        if rng.random() < 0.5:
            length -= (length - 1) % PAGE
        tail = int(rng.integers(0, length)) if rng.random() < 0.4 else 0
        prompt = roots[rng.integers(2), :length].tolist()
        prompt[length - tail :] = rng.integers(0, 3000, tail).tolist()
        episodes = [Script(rng, prompt, context) for _ in range(rng.integers(1, 7))]
        yield Samples(prompt_ids=prompt, episodes=[(e, e.seed) for e in episodes])


@pytest.mark.parametrize("seed", range(30))
def test_random_play(engine, monkeypatch, seed):
    """Whatever the sizes: every row reads its own ids and no others, all come to their end, no
    page is lost, and none that others read is written."""
    rng = np.random.default_rng(seed)
    context = simulated(engine, rng, monkeypatch)
    asked = list(questions(rng, context, 12))
    CheckedLane.operations = 0
    play(engine, asked, Pool(rng), tiny.SAMPLED)
    assert all(e.need == Need.NOTHING for s in asked for e, _ in s.episodes)
    assert engine.idle and CheckedLane.operations > 100
