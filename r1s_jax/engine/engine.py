"""The sampler as the host sees it: slots, four verbs, and every program compiled up front."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from r1s_jax.engine.automaton import StopAutomaton
from r1s_jax.engine.compiled import Programs
from r1s_jax.engine.lane import Lane, Prompt, Slot
from r1s_jax.engine.packing import pack_blocks, pack_copies, pack_rows
from r1s_jax.engine.plan import device_memory, plan_memory
from r1s_jax.engine.programs import Stop, StopTables
from r1s_jax.engine.sampling import SamplingConfig
from r1s_jax.engine.state import Chunk, EngineConfig
from r1s_jax.models.decoder import DecoderConfig, Params
from r1s_jax.sharding import check_divisible, lane_mesh, replicated

# A chunk ends early once one row in so many has stopped and others could take over; twice as many
# are kept ready beside those that decode.
LEAVING = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptRef:
    """A prompt in a lane's pages, from which samples are started."""

    lane: int
    prompt: Prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written:
    """What one slot wrote in a chunk; log-probs under the full and under the drawn-from softmax."""

    slot: int
    tokens: np.ndarray
    logprobs: np.ndarray
    drawn_logprobs: np.ndarray
    stop: Stop


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """What a call of `decode_chunk` did.

    steps: decode steps; extended: calls of `extend`. busy, searching: whether any host still has
    episodes, or queries that are out.
    """

    written: tuple[Written, ...]
    steps: int
    extended: int
    busy: bool
    searching: bool


@dataclasses.dataclass(kw_only=True)
class Work:
    """What this host's lanes did since `take_work` was called last."""

    sampled_tokens: int = 0
    row_steps: int = 0  # rows times decode steps, empty rows included
    extended_tokens: int = 0
    extended_places: int = 0  # the same with padding


class Engine:
    """Holds weights and pages on the device. The host keeps text and bookkeeping elsewhere.

    Every program has one fixed row count, so a row's numbers do not depend on its companions.
    With several hosts each one speaks for its own lanes only, and all of them call
    `decode_chunk` in lock-step.
    """

    def __init__(
        self,
        model: DecoderConfig,
        config: EngineConfig,
        *,
        mesh: Mesh,
        token_bytes: Sequence[bytes],
        stop_strings: Sequence[str],
        eos_ids: Sequence[int],
        dtype: Any = jnp.float32,
        reserved_bytes: int = 0,
        scale_ids: Sequence[int] = (),
    ):
        """`reserved_bytes`: what the learner keeps on every device beside the engine.

        `scale_ids`: tokens of a typical text, on which a cache of integers is scaled.

        Raises UserError where the shapes do not fit each other or the memory.
        """
        if len(token_bytes) != model.vocab_size:  # a table that is too short would be read clamped
            raise ValueError(
                f"token_bytes has {len(token_bytes)} entries, vocab_size = {model.vocab_size}"
            )
        mesh = lane_mesh(mesh, config.tensor)
        check_divisible(mesh, "engine.rows", (config.rows,), ("rows",))
        check_divisible(mesh, "engine.extend_rows", (config.extend_rows,), ("rows",))
        heads = model.num_key_value_heads
        check_divisible(mesh, "num_key_value_heads", (heads,), ("kv_heads",))
        if config.int8_cache and not scale_ids:
            raise ValueError("engine.int8_cache needs a text to be scaled on: scale_ids")
        self.model, self.config, self.mesh = model, config, mesh
        self._scale_ids = np.array(scale_ids, np.int32)
        mebibytes = device_memory(mesh.local_devices[0]) >> 20
        # Shapes follow from it, so all hosts take the least of theirs.
        self.plan = plan_memory(
            model,
            config,
            mesh,
            dtype,
            limit_bytes=int(self._all_hosts((mebibytes,)).min()) << 20,
            reserved_bytes=reserved_bytes,
        )
        self.weights_version = -1
        self._work = Work()
        # An end of sequence is no text: a ban on `<|` must not reach `<|im_end|>`.
        ends = set(eos_ids)
        self._free_bytes = [b"" if i in ends else b for i, b in enumerate(token_bytes)]
        self._stops = StopAutomaton.build(stop_strings, token_bytes)
        self._eos_ids = np.array(list(eos_ids) or [-1], np.int32)
        self._tables: dict[tuple[str, ...], StopTables] = {}
        self._params: Params | None = None
        self._programs = Programs(model, config, self.plan, mesh, dtype)
        self._pages = self._programs.empty_pages()
        self.reset()

    # ------------------------------------------------------------------------------- the verbs

    def prefill(self, tokens: Sequence[int]) -> PromptRef | None:
        """Queues a prompt in the lane with most free slots.

        None while every lane has to wait: for slots, for pages, or for the prompt that it holds
        to be dropped. Raises ValueError for a prompt that fills the context.
        """
        if not 0 < len(tokens) <= self.config.longest_prompt:
            raise ValueError(
                f"a prompt of {len(tokens)} tokens, engine.context = {self.config.context}"
            )
        for lane in sorted(range(len(self._lanes)), key=lambda i: -self._lanes[i].free_slots):
            prompt = self._lanes[lane].prefill(tokens)
            if prompt is not None:
                return PromptRef(lane=lane, prompt=prompt)
        return None

    def insert(self, prompt: PromptRef, *, seed: np.ndarray, budget: int) -> int | None:
        """Starts a sample of a prompt with its key and its first turn's budget of tokens.

        Returns its slot; None while nothing has room.
        """
        slot = self._lanes[prompt.lane].insert(prompt.prompt, seed=seed, budget=budget)
        return None if slot is None else prompt.lane * self.plan.slots + slot.index

    def extend(self, slot: int, tokens: Sequence[int], *, budget: int) -> None:
        """Queues documents on top of a stopped slot, which then goes on with a new budget."""
        lane, index = divmod(slot, self.plan.slots)
        self._lanes[lane].extend(self._lanes[lane].slot(index), tokens, budget)

    def release(self, slot: int) -> None:
        """Frees the slot of an episode that is over."""
        lane, index = divmod(slot, self.plan.slots)
        self._lanes[lane].release(self._lanes[lane].slot(index))

    def drop(self, prompt: PromptRef) -> None:
        """Frees a prompt of which all samples are started."""
        self._lanes[prompt.lane].drop(prompt.prompt)

    def decode_chunk(
        self, sampling: SamplingConfig, *, busy: bool = True, searching: bool = False
    ) -> Step:
        """Decodes up to `chunk` tokens for every row, then writes what is queued, while the host
        already reads the tokens.

        `busy`: this host has episodes left; `searching`: some of them wait for documents. What
        runs follows from one row of numbers per host, so it is the same everywhere.
        """
        lanes, rows = self._lanes, self.plan.rows
        copies = [lane.copies() for lane in lanes]
        chosen = [lane.decoding(rows, self.config.chunk) for lane in lanes]
        here = (
            max(len(pairs) for pairs in copies),
            sum(len(slots) for slots in chosen),
            sum(lane.residents for lane in lanes),
            max(map(self._extends_wanted, lanes, chosen)),
            int(busy),
            int(searching),
        )
        table = self._all_hosts(here)
        for first in range(0, int(table[:, 0].max()), rows):
            self._run_copy([pairs[first : first + rows] for pairs in copies])
        active, residents = int(table[:, 1].sum()), int(table[:, 2].sum())
        # Rows that stop are replaced sooner if somebody may take their place.
        leave = active - max(1, active // LEAVING) if residents > active else 0
        chunk = self._run_decode(sampling, chosen, leave) if active else None
        extended = int(table[:, 3].max())
        for _ in range(extended):
            self._run_extend()
        written, steps = ((), 0) if chunk is None else self._read(chunk, chosen)
        return Step(
            written=written,
            steps=steps,
            extended=extended,
            busy=bool(table[:, 4].any()),
            searching=bool(table[:, 5].any()),
        )

    # ------------------------------------------------------------------------------- the rest

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return self._stops.stop_strings

    def match_end(self, turn_bytes: bytes) -> tuple[int, int] | None:
        """(index of the stop string, its end in bytes) of a turn's bytes, if one is complete."""
        return self._stops.match_end(turn_bytes)

    @property
    def idle(self) -> bool:
        """Every slot and page of this host is free."""
        return all(lane.idle for lane in self._lanes)

    @property
    def work(self) -> Work:
        """What was done since `take_work` was called last."""
        return dataclasses.replace(self._work)

    def take_work(self) -> Work:
        """What was done since this was called last."""
        done, self._work = self._work, Work()
        return done

    def reset(self) -> None:
        """Forgets every episode, for a caller who could not play his to their end."""
        if any(pool.is_deleted() for pool in self._pages):  # a program was interrupted
            self._pages = self._programs.empty_pages()
        owners = [lane[0].process_index for lane in self.mesh.devices.reshape(self.plan.lanes, -1)]
        self._lanes = [
            Lane(
                slots=self.plan.slots,
                pages=self.plan.pages,
                page=self.config.page,
                pages_per_episode=self.config.pages_per_episode,
            )
            for _ in range(owners.count(jax.process_index()))
        ]

    def set_weights(self, params: Params, version: int) -> None:
        """Takes the learner's parameters in the engine's dtype and layout; slots must be idle.

        KV in the cache belongs to the old weights, so the caller drains its episodes before.
        """
        if not self.idle:
            raise ValueError("new weights while episodes are in the cache: drain them first")
        self._params = None  # the old copy goes before the new one comes
        placed = self._programs.place(params)
        if self.config.int8_cache:
            placed |= {"cache_scales": self._programs.measure(placed, self._scale_ids)}
        self._params = placed
        self.weights_version = version

    def warm_up(self, samplings: Sequence[SamplingConfig]) -> None:
        """Compiles every program, so that steady state compiles nothing."""
        self.decode_chunk(samplings[0], busy=False)  # nothing runs but what the hosts tell
        self._run_copy([[] for _ in self._lanes])
        self._run_extend()
        for sampling in samplings:
            self._read(self._run_decode(sampling, [[] for _ in self._lanes], 0), [])

    def _extends_wanted(self, lane: Lane, chosen: Sequence[Slot]) -> int:
        """Calls of `extend` this lane would like before the next chunk.

        The fewer rows are ready the more, so that a long document does not stall those that
        decode; only full calls while no row is empty.
        """
        rows, width = self.plan.rows, self.config.extend_tokens
        # Where too few are chosen, the others have no pages: they cannot decode either.
        ready = len(lane.ready()) if len(chosen) == rows else len(chosen)
        missing = rows + 2 * rows // LEAVING - ready
        if ready >= rows:
            return min(lane.blocks_queued(width) // self.plan.extend_rows, max(1, missing))
        calls = -(-lane.blocks_wanted(missing, width) // self.plan.extend_rows)
        return min(calls, missing) if ready else calls

    def _run_copy(self, pairs: Sequence[Sequence[tuple[int, int]]]) -> None:
        copies = map(self._put, pack_copies(pairs, self.plan.rows))
        self._pages = self._programs.copy(self._pages, *copies)

    def _run_extend(self) -> None:
        count, width = self.plan.extend_rows, self.config.extend_tokens
        blocks = [lane.blocks(count, width) for lane in self._lanes]
        packed = pack_blocks(blocks, count, width, self.plan.pages_per_episode)
        tokens, _, _, counts = packed
        self._work.extended_tokens += int(counts.sum())
        self._work.extended_places += tokens.size
        self._pages = self._programs.extend(self._weights, self._pages, *map(self._put, packed))

    def _run_decode(
        self, sampling: SamplingConfig, chosen: Sequence[Sequence[Slot]], leave: int
    ) -> Chunk:
        rows = pack_rows(chosen, self.plan.rows, self.plan.pages_per_episode)
        rows = jax.tree.map(self._put, rows)
        tables = self._stop_tables(sampling.banned)
        self._pages, chunk = self._programs.decode(
            sampling, self.config.chunk, self._weights, tables, self._pages, rows, np.int32(leave)
        )
        return chunk

    def _read(
        self, chunk: Chunk, chosen: Sequence[Sequence[Slot]]
    ) -> tuple[tuple[Written, ...], int]:
        """Waits for the chunk, and brings its slots to where it left them."""
        for array in jax.tree.leaves(chunk):
            array.copy_to_host_async()  # all are under way before the first is waited for
        steps = int(np.asarray(chunk.steps))
        got = jax.tree.map(self._local, dataclasses.replace(chunk, steps=None))
        written = []
        for lane, slots in enumerate(chosen):
            for row, slot in enumerate(slots, start=lane * self.plan.rows):
                count, stop = int(got.counts_R[row]), Stop(int(got.stops_R[row]))
                if not count:
                    continue
                tokens = got.tokens_RC[row, :count]
                slot.length += count
                slot.pending = int(tokens[-1])
                slot.budget = slot.budget - count if stop == Stop.RUNNING else 0
                slot.stop_state = int(got.stop_state_R[row])
                slot.ban_state = int(got.ban_state_R[row])
                written.append(
                    Written(
                        slot=lane * self.plan.slots + slot.index,
                        tokens=tokens,
                        logprobs=got.logprobs_RC[row, :count],
                        drawn_logprobs=got.drawn_logprobs_RC[row, :count],
                        stop=stop,
                    )
                )
        self._work.sampled_tokens += sum(len(w.tokens) for w in written)
        self._work.row_steps += steps * self.plan.rows * len(self._lanes)
        return tuple(written), steps

    @property
    def _weights(self) -> Params:
        if self._params is None:
            raise ValueError("the engine has no weights yet: call set_weights first")
        return self._params

    def _all_hosts(self, numbers: Sequence[int]) -> np.ndarray:
        """Every host's numbers, one row each [hosts n]."""
        row = np.array(numbers, np.int32)
        if jax.process_count() == 1:
            return row[None]
        return np.asarray(multihost_utils.process_allgather(row))

    def _put(self, mine: np.ndarray) -> Any:
        """This host's part of an array over all lanes, ready to be handed to a program."""
        if jax.process_count() == 1:
            return mine
        return jax.make_array_from_process_local_data(self._programs.rows, mine)

    def _local(self, array: jax.Array) -> np.ndarray:
        """This host's part of an array over all lanes."""
        if array.is_fully_addressable:
            return np.asarray(array)
        parts = {s.index[0].start or 0: s.data for s in array.addressable_shards}
        return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])

    def _stop_tables(self, banned: tuple[str, ...]) -> StopTables:
        if banned not in self._tables:
            ban = StopAutomaton.build(banned, self._free_bytes if banned else [b""])
            put = partial(jax.device_put, device=replicated(self.mesh))
            self._tables[banned] = StopTables(
                next_SV=put(self._stops.table.astype(np.int32)),
                accepting_S=put(self._stops.accepting),
                eos_ids=put(self._eos_ids),
                banned_next_SV=put(ban.table.astype(np.int32)),
                banned_accepting_S=put(ban.accepting),
            )
        return self._tables[banned]
