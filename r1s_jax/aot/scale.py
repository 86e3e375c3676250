"""How long a step takes by the roofline, and the smallest slice of a chip that a run fits.

What episodes look like is counted in the 500 released transcripts of the Qwen2.5-7B policy on
HotpotQA, with Qwen2.5's tokenizer and our prompt. Five passages come back from a search there; the
paper's training asks for three, so documents are rather too long here than too short.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from r1s_jax.aot.phases import EMBED, Phase, phases
from r1s_jax.aot.roofline import Cost
from r1s_jax.aot.slices import Slice, find_shape, on_slice
from r1s_jax.engine.plan import DoesNotFit, Plan
from r1s_jax.rl.memory import learner_bytes
from r1s_jax.run.config import RunConfig
from r1s_jax.sharding import MeshConfig
from r1s_jax.types import UserError

# Slices that can be had, by chip (Google Cloud's pages), up to where no policy here needs more.
SLICES = {
    "v5e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8"),
    "v6e": ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
}
HOST_CHIPS = 4  # of a slice of several hosts; a copy of the engine's weights stays on one
ROWS_PER_CHIP = (64, 32, 16, 8, 4)  # that decode at a time: the most that the cache has room for
PACKED = 0.95  # of a learner's row, what episodes fill
_GB = 1e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """Mean tokens of an episode. live: what a row has in the cache while it samples a token.

    longest: sampled tokens of the longest episode.
    """

    prompt: float
    sampled: float
    searches: float
    documents: float  # that one search brings
    live: int
    longest: int

    @property
    def episode(self) -> float:
        """Tokens that the learner sees."""
        return self.prompt + self.sampled + self.searches * self.documents

    def decode_steps(self, episodes: int, rows: int) -> float:
        """Until all are done, a row taking the next episode at once; the longest starts last.

        Within 15 % of what playing the transcripts' lengths through gives.
        """
        return self.sampled * max(episodes / rows, 1) + self.longest - self.sampled

    def blocks(self, episodes: int, questions: int, size: int) -> float:
        """Blocks of `size` tokens that are written: a prompt once a question, and all documents."""
        of = lambda tokens: tokens / size + 0.5  # noqa: E731 - the last is half full
        return questions * of(self.prompt) + episodes * self.searches * of(self.documents)


RELEASED = Workload(prompt=204, sampled=309, searches=2.11, documents=575, live=907, longest=579)


def step_of(here: Slice, costs: Mapping[str, Sequence[Cost]]) -> str:
    """What a training step takes, part by part, by the rooflines of its programs."""
    overlapped = step_seconds(here, costs, lambda cost: cost.seconds(here.chip))
    serial = step_seconds(here, costs, lambda cost: cost.serial_seconds(here.chip))
    config = here.config
    episodes = config.questions_per_step * config.samples_per_question
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in overlapped.items())
    return (
        f"A step of {episodes:,} episodes: {sum(overlapped.values()):.1f} s by the roofline "
        f"({parts}), {sum(serial.values()):.1f} s if chips wait while they talk to each other; "
        f"searches cost no time, {RELEASED.episode:,.0f} tokens an episode of which "
        f"{RELEASED.sampled:.0f} are sampled, rows {PACKED:.0%} full."
    )


def summary(
    here: Slice, plan: Plan, found: Sequence[Phase], costs: Mapping[str, Sequence[Cost]]
) -> str:
    """The slice in a row of a Markdown table, under its heading."""
    mesh, lanes, engine = here.mesh.shape, here.lanes.shape, here.config.engine
    episodes = here.config.questions_per_step * here.config.samples_per_question
    largest = max((p for p in found if p.name != EMBED), key=lambda phase: phase.total)
    overlapped = sum(step_seconds(here, costs, lambda c: c.seconds(here.chip)).values())
    serial = sum(step_seconds(here, costs, lambda c: c.serial_seconds(here.chip)).values())
    full = plan.lanes * ((plan.pages - 1) // plan.pages_per_episode)
    cells = {
        "policy": here.model,
        "slice": here.topology,
        "chips": f"{here.mesh.size}",
        "data x fsdp x tensor": " x ".join(str(mesh[axis]) for axis in mesh),
        "engine: copies x chips": f"{lanes['data']} x {lanes['tensor']}",
        "rows decoding": f"{engine.rows}",
        "cache: full episodes": f"{full}",
        "largest phase": largest.name,
        "its GB": f"{largest.total / _GB:.1f} of {here.chip.hbm_bytes / _GB:.1f}",
        "step s": f"{overlapped:.0f} to {serial:.0f}",
        "episodes/s": f"{episodes / serial:.0f} to {episodes / overlapped:.0f}",
    }
    lines = ["|".join(["", *(f" {key} " for key in cells), ""]), "|" + "---|" * len(cells)]
    return "\n".join([*lines, "|".join(["", *(f" {cell} " for cell in cells.values()), ""])])


def step_seconds(
    here: Slice, costs: Mapping[str, Sequence[Cost]], seconds: Callable[[Cost], float]
) -> dict[str, float]:
    """Seconds of a step's parts, given those of a run of each program."""
    config, engine, learner = here.config, here.config.engine, here.config.learner
    questions, algorithm = config.questions_per_step, learner.algorithm
    episodes = questions * config.samples_per_question
    extend, _, decode = costs["rollout"]
    calls = RELEASED.blocks(episodes, questions, engine.extend_tokens) / engine.extend_rows
    updates = learner.updates_per_rollout
    batches = math.ceil(minibatch_rows(config) / learner.rows)
    # The first update's log-probs come with its gradient, unless the reward needs them.
    scored = updates * (batches if algorithm.kl_in_reward else 0) or (updates - 1) * batches
    scored += updates * batches * algorithm.needs_reference
    (score,), (gradient,), (apply,) = (
        costs[name] for name in ("score", "gradient", "optimizer step")
    )
    return {
        "decode": RELEASED.decode_steps(episodes, engine.rows) * seconds(decode),
        "extend": calls * seconds(extend),
        "score": scored * seconds(score),
        "gradient": updates * batches * seconds(gradient),
        "optimizer": updates * seconds(apply),
        "push": sum(cost.program.runs * seconds(cost) for cost in costs["push"]),
    }


def minibatch_rows(config: RunConfig) -> float:
    """Rows of the learner that the episodes of one update fill."""
    episodes = config.questions_per_step * config.samples_per_question
    learner = config.learner
    tokens = episodes * RELEASED.episode / learner.updates_per_rollout
    return tokens / (PACKED * learner.row_tokens)


def smallest(config: RunConfig, chip: str, *, model: str | None = None) -> Slice:
    """The smallest slice of these chips with room for the run; nothing is compiled.

    Parameters are split over all chips if that fits (least is sent then), else tensor shards come
    in, which need less for activations. Raises UserError if there is no such chip or slice.
    """
    if chip not in SLICES:
        raise UserError(f"--topology {chip}: a slice (v5e:4x4) or one of {', '.join(SLICES)}")
    shape, name = find_shape(config, model)
    heads = shape.num_key_value_heads
    for size in SLICES[chip]:
        chips = math.prod(int(n) for n in size.split("x"))
        for tensor in (n for n in (1, 2, 4, 8) if chips % n == 0 and heads % n == 0):
            if chips // tensor >= 2 * minibatch_rows(config):
                continue  # half of the rows would be empty
            for rows in ROWS_PER_CHIP:
                wanted = fitted(config, chips, tensor, math.gcd(heads, HOST_CHIPS), rows)
                here = on_slice(wanted, f"{chip}:{size}", model=model, own_mesh=True)
                if has_room(here):
                    return here
    raise UserError(f"{name}: no slice of {chip} up to {size} has room")


def fitted(
    config: RunConfig, chips: int, tensor: int, engine_tensor: int, rows_per_chip: int
) -> RunConfig:
    """The run on so many chips: one row of a micro-batch per shard of the parameters."""
    shards = chips // tensor
    lanes = chips // engine_tensor
    episodes = config.questions_per_step * config.samples_per_question
    rows = min(rows_per_chip * chips, -(-episodes // lanes) * lanes)
    return dataclasses.replace(
        config,
        mesh=MeshConfig(fsdp=shards, tensor=tensor),
        engine=dataclasses.replace(
            config.engine, rows=rows, extend_rows=chips, tensor=engine_tensor
        ),
        learner=dataclasses.replace(config.learner, rows=shards),
    )


def has_room(here: Slice) -> bool:
    """Whether all phases fit by the estimate, and the cache holds an episode for every row."""
    try:
        plan = here.plan()
    except DoesNotFit:
        return False
    learner = learner_bytes(here.shape, here.config.learner, here.mesh)
    most = max(phase.total for phase in phases(learner, plan, {}))
    return most <= here.chip.hbm_bytes and holds_rows(plan, here.config)


def holds_rows(plan: Plan, config: RunConfig) -> bool:
    """Whether a lane's rows can all decode, their episodes as long as the mean in the end."""
    return (plan.pages - 1) * config.engine.page >= plan.rows * RELEASED.episode
