"""The pages and slots of one lane: a replica of the policy, on the devices that share its weights.

All of it is bookkeeping on the host. A sequence (a prompt, or an episode in its slot) holds pages
and a length; what is to be written waits in its queue until its turn in an `extend` call comes.
Pages are taken when they are needed, not when an episode starts. So that the lane never ends with
everybody waiting for pages, one is given only if afterwards some order is left in which all
episodes can fill their contexts and finish (the banker's algorithm, Dijkstra 1965). Alone this
would let in so many that in the end one after the other goes on while all hold pages; so no more
come in than would fit if each became as long as the last ones did.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, deque
from collections.abc import Sequence

import numpy as np

TRASH = 0
# The length of episodes to come is a mean over about so many finished ones.
_REMEMBERED = 32


@dataclasses.dataclass(kw_only=True, eq=False)
class Tokens:
    """A sequence of the cache: `length` tokens of it are written or handed to a program."""

    pages: list[int]
    length: int = 0
    queue: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(kw_only=True, eq=False)
class Prompt(Tokens):
    """A prompt without its last token, which the first decode step of each sample feeds."""

    pending: int


@dataclasses.dataclass(kw_only=True, eq=False)
class Slot(Tokens):
    """An episode: its registers between two chunks. It decodes if it has a budget and no queue."""

    index: int
    serial: int
    seed: np.ndarray
    pending: int
    budget: int
    prompt: Prompt | None  # whose last page is still to be copied
    shared: int  # leading pages that are not its own
    stop_state: int = 0
    ban_state: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """Tokens of one sequence for one row of an `extend` call."""

    pages: Sequence[int]
    start: int
    tokens: Sequence[int]


class Lane:
    """Slots and pages of one lane."""

    def __init__(self, *, slots: int, pages: int, page: int, pages_per_episode: int):
        """`pages` counts the trash. Raises ValueError if one episode could not fill its context."""
        if pages < pages_per_episode + 3:
            raise ValueError(f"{pages} pages cannot hold an episode of {pages_per_episode}")
        self._page, self._limit = page, pages_per_episode
        self._page_count, self._typical = pages, float(pages_per_episode)
        self._free = list(range(pages - 1, TRASH, -1))
        self._users: Counter[int] = Counter()
        # Full pages of prompts by what they hold: (the page before, its tokens); and back.
        self._known: dict[tuple[int, tuple[int, ...]], int] = {}
        self._content: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._slots: list[Slot | None] = [None] * slots
        self._serial = 0
        self.open = False  # a prompt is held from which samples are still to be started
        self._queued: deque[Tokens] = deque()

    # ------------------------------------------------------------------------------ sequences

    @property
    def free_slots(self) -> int:
        return self._slots.count(None)

    @property
    def residents(self) -> int:
        return len(self._slots) - self.free_slots

    @property
    def idle(self) -> bool:
        """Nothing lives here: every page and slot is free."""
        return not self._users and all(s is None for s in self._slots)

    def slot(self, index: int) -> Slot:
        """Raises ValueError for a free slot."""
        slot = self._slots[index]
        if slot is None:
            raise ValueError(f"slot {index} is free")
        return slot

    def prefill(self, tokens: Sequence[int]) -> Prompt | None:
        """Queues a prompt for writing; pages that another prompt begins with are shared.

        None if it has to wait: for the prompt before it to be dropped, for a slot or for pages; or
        all it writes is shared, and still queued for another.
        """
        if self.open or not self.free_slots:
            return None
        written = list(tokens[:-1])
        full = [
            tuple(written[start : start + self._page])
            for start in range(0, len(written) - self._page + 1, self._page)
        ]
        shared = [TRASH]
        while len(shared) <= len(full):
            known = self._known.get((shared[-1], full[len(shared) - 1]))
            if known is None:
                break
            shared.append(known)
        start = len(shared[1:]) * self._page
        if start == len(written) and any(
            isinstance(s, Prompt) and shared[-1] in s.pages for s in self._queued
        ):
            return None  # with nothing in the queue its samples would not wait for the pages
        wanted = -(-len(written) // self._page) - len(shared[1:])
        if not self._safe(wanted):
            return None
        self._users.update(shared[1:])
        pages = shared + self._take(wanted)
        for index in range(len(shared), len(full) + 1):
            self._content[pages[index]] = content = (pages[index - 1], full[index - 1])
            self._known[content] = pages[index]
        prompt = Prompt(pages=pages[1:], length=start, queue=written[start:], pending=tokens[-1])
        if prompt.queue:
            self._queued.append(prompt)
        self.open = True
        return prompt

    def insert(self, prompt: Prompt, *, seed: np.ndarray, budget: int) -> Slot | None:
        """Starts a sample of a prompt; None if there is no slot or no page for it now.

        Full pages of the prompt are shared; the last, where the sample will write, is copied.
        """
        live = self.residents
        if not self.free_slots or (live and (live + 1) * self._typical > self._page_count):
            return None
        length = prompt.length + len(prompt.queue)
        full, own = length // self._page, int(length % self._page > 0)
        if not self._safe(own, newcomer=full):
            return None
        self._users.update(prompt.pages[:full])
        slot = Slot(
            pages=prompt.pages[:full] + self._take(own),
            length=length,
            index=self._slots.index(None),
            serial=self._serial,
            seed=seed,
            pending=prompt.pending,
            budget=budget,
            prompt=prompt,
            shared=full,
        )
        self._serial += 1
        self._slots[slot.index] = slot
        if own:
            self._users[prompt.pages[full]] += 1  # until it is copied
        return slot

    def extend(self, slot: Slot, tokens: Sequence[int], budget: int) -> None:
        """Queues documents on top of a row that has stopped, and gives it its next turn."""
        slot.queue = [slot.pending, *tokens[:-1]]
        slot.pending, slot.budget = tokens[-1], budget
        slot.stop_state = slot.ban_state = 0
        self._queued.append(slot)

    def drop(self, prompt: Prompt) -> None:
        """No more samples of this prompt will be started; those that were hold its pages."""
        if prompt.queue and not self._samples(prompt):
            self._queued.remove(prompt)
        self._release(prompt.pages)
        self.open = False

    def release(self, slot: Slot) -> None:
        """The episode is over."""
        if slot.queue or slot.prompt:
            raise ValueError(f"slot {slot.index} was released while something is to be written")
        self._typical += (len(slot.pages) - self._typical) / _REMEMBERED
        self._release(slot.pages)
        self._slots[slot.index] = None

    # ------------------------------------------------------------------------- the next programs

    def ready(self) -> list[Slot]:
        """Slots that can decode, first come first."""
        found = [s for s in self._slots if s and s.budget > 0 and not s.queue and not s.prompt]
        return sorted(found, key=lambda s: s.serial)

    def blocks_wanted(self, rows: int, width: int) -> int:
        """Blocks to write so that `rows` more slots can decode, or until nothing is queued.

        What has to wait for pages does not count: nothing could be written.
        """
        blocks = 0
        for sequence in self._queued:
            if rows <= 0:
                break
            if self._fits(sequence, sequence.length + len(sequence.queue)):
                blocks += -(-len(sequence.queue) // width)
                rows -= 1 if isinstance(sequence, Slot) else self._samples(sequence)
        return blocks

    def blocks_queued(self, width: int) -> int:
        """Blocks that have, or could be given, pages."""
        return sum(
            -(-len(s.queue) // width)
            for s in self._queued
            if self._fits(s, s.length + len(s.queue))
        )

    def blocks(self, count: int, width: int) -> list[Block]:
        """Takes up to `count` blocks of at most `width` tokens off the queue, in order."""
        taken: list[Block] = []
        kept: deque[Tokens] = deque()
        while self._queued and len(taken) < count:
            sequence = self._queued.popleft()
            end = sequence.length + len(sequence.queue)
            if not self._grow(sequence, end):
                kept.append(sequence)
                continue
            while sequence.queue and len(taken) < count:
                tokens, sequence.queue = sequence.queue[:width], sequence.queue[width:]
                taken.append(Block(pages=sequence.pages, start=sequence.length, tokens=tokens))
                sequence.length += len(tokens)
            if sequence.queue:
                kept.append(sequence)
        self._queued = kept + self._queued
        return taken

    def copies(self) -> list[tuple[int, int]]:
        """The (page, copy of it) pairs of new samples whose prompt is written by now."""
        pairs: list[tuple[int, int]] = []
        for slot in self._slots:
            if slot and slot.prompt and not slot.prompt.queue:
                if len(slot.pages) > slot.shared:
                    source = slot.prompt.pages[slot.shared]
                    pairs.append((source, slot.pages[slot.shared]))
                    # The copies run before anything that could write to the page anew.
                    self._release([source])
                slot.prompt = None
        return pairs

    def decoding(self, rows: int, chunk: int) -> list[Slot]:
        """The slots of the next chunk, each with pages for it, shortest first.

        Sequences of like length stand together, because the cache is read by groups.
        """
        chosen = []
        for slot in self.ready():
            if len(chosen) == rows:
                break
            if self._grow(slot, slot.length + min(chunk, slot.budget)):
                chosen.append(slot)
        return sorted(chosen, key=lambda s: s.length)

    # ----------------------------------------------------------------------------------- pages

    def _samples(self, prompt: Tokens) -> int:
        return sum(s is not None and s.prompt is prompt for s in self._slots)

    def _fits(self, sequence: Tokens, length: int) -> bool:
        """Whether there is room for `length` tokens, or pages for it can be had now."""
        missing = -(-length // self._page) - len(sequence.pages)
        return missing <= 0 or self._safe(missing, sequence)

    def _grow(self, sequence: Tokens, length: int) -> bool:
        """Makes room for `length` tokens; False if the pages have to wait."""
        if not self._fits(sequence, length):
            return False
        sequence.pages += self._take(-(-length // self._page) - len(sequence.pages))
        return True

    def _safe(
        self, wanted: int, taker: Tokens | None = None, *, newcomer: int | None = None
    ) -> bool:
        """Whether everybody could still finish after `wanted` pages are given to `taker`.

        `newcomer` is a slot about to start, with so many shared pages.
        """
        free = len(self._free) - wanted
        if free < 0 or free >= self._limit:
            return free >= 0
        # (pages still to come, pages given back at the end) of every episode.
        claims = []
        for slot in self._slots:
            if slot is not None:
                given = wanted if slot is taker else 0
                held = len(slot.pages) + given
                claims.append((self._limit - held, held - slot.shared))
        if newcomer is not None:
            claims.append((self._limit - newcomer - wanted, wanted))
        if all(need <= free for need, _ in claims):
            return True
        for need, own in sorted(claims):
            if need > free:
                return False
            free += own
        return True

    def _take(self, count: int) -> list[int]:
        pages = [self._free.pop() for _ in range(count)]
        self._users.update(pages)
        return pages

    def _release(self, pages: Sequence[int]) -> None:
        for page in pages:
            self._users[page] -= 1
            if not self._users[page]:
                del self._users[page]
                self._free.append(page)
                if page in self._content:
                    del self._known[self._content.pop(page)]
