"""What lies on a chip together in each phase of a run, and whether it fits.

    start, resume    the policy is read, the learner's arrays are made (or read as well)
    push             the engine takes its weights, piece by piece
    rollout          prompts and documents are written, tokens sampled
    score            log-probs at the rollout's weights, and the reference's
    gradient         of a micro-batch, added to the sum of those before it
    optimizer step   the state is replaced in place
    save             arrays go to the host before the run goes on; nothing is made on the chip
    embed            an index is built: a process of its own

Learner and engine share the chips, and neither leaves while the other works: weights and cache stay
through the update, parameters and moments through the rollout. Arrays of a few MB (batches of an
update, their log-probs, the stop tables' copies) are not in the sums.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from r1s_jax.aot.roofline import Chip, Cost
from r1s_jax.engine.plan import Plan
from r1s_jax.rl.memory import LearnerBytes

EMBED = "embed"
_GB = 1e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """What is alive all through it, bytes by owner, and the programs that run in it."""

    name: str
    alive: Mapping[str, int]
    costs: Sequence[Cost] = ()

    @property
    def largest(self) -> Cost | None:
        """The program that takes most for itself."""
        return max(self.costs, key=lambda cost: cost.own_bytes, default=None)

    @property
    def total(self) -> int:
        """Bytes on a chip when that program runs."""
        own = 0 if self.largest is None else self.largest.own_bytes
        return sum(self.alive.values()) + own

    def culprit(self, chip: Chip) -> str:
        """One line if it does not fit the chip, else nothing."""
        if self.total <= chip.hbm_bytes:
            return ""
        parts = dict(self.alive)
        if self.largest is not None:
            parts[self.largest.program.name] = self.largest.own_bytes
        shown = ", ".join(f"{name} {size / _GB:.2f}" for name, size in parts.items() if size)
        return (
            f"{self.name} does not fit: {self.total / _GB:.2f} GB ({shown}), most of it "
            f"{max(parts, key=lambda name: parts[name])}, on a {chip.name} chip with "
            f"{chip.hbm_bytes / _GB:.2f} GB"
        )


def phases(learner: LearnerBytes, plan: Plan, costs: Mapping[str, Sequence[Cost]]) -> list[Phase]:
    """The phases of a run; `costs` are its compiled programs by phase."""
    kept, weights, cache = learner.kept, plan.weight_bytes, plan.cache_bytes

    def phase(name: str, kept: int, weights: int, also: int = 0) -> Phase:
        alive = {"learner": kept, "weights": weights, "cache": cache, "others": also}
        return Phase(name=name, alive=alive, costs=costs.get(name, ()))

    alone = [Phase(name=EMBED, alive={}, costs=costs[EMBED])] if EMBED in costs else []
    return [
        phase("start", kept, 0, learner.policy),  # from which the learner's own is copied
        phase("resume", kept, 0),  # the start's own has gone before
        phase("push", kept, weights, learner.merged),
        phase("rollout", kept, weights),
        phase("score", kept, weights),
        phase("gradient", kept, weights),
        phase("optimizer step", kept, weights),
        phase("save", kept, weights),
        *alone,
    ]


def table(found: Sequence[Phase], chip: Chip) -> str:
    """A Markdown table, a row per phase, the largest in bold."""
    owners = list(found[0].alive)
    lines = [
        f"| phase | {' | '.join(f'{owner} GB' for owner in owners)} | program | its own GB "
        "| of it temporary | total GB | of HBM |",
        "|---|" + "---:|" * len(owners) + "---|---:|---:|---:|---:|",
    ]
    most = max(phase.total for phase in found)
    for phase in found:
        cost = phase.largest
        own = ["–"] * 3
        if cost is not None:
            temporary = min(cost.temporary_bytes, cost.own_bytes)
            own = [cost.program.name, f"{cost.own_bytes / _GB:.2f}", f"{temporary / _GB:.2f}"]
        name = f"**{phase.name}**" if phase.total == most else phase.name
        cells = [
            name,
            *(f"{phase.alive[o] / _GB:.2f}" if phase.alive.get(o) else "–" for o in owners),
            *own,
            f"{phase.total / _GB:.2f}",
            f"{phase.total / chip.hbm_bytes:.0%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
