"""What is alive together in the phases of a run, by hand."""

import dataclasses

from r1s_jax.aot.phases import phases, table
from r1s_jax.aot.roofline import Chip, Cost, Program
from r1s_jax.engine.plan import Plan
from r1s_jax.rl.memory import LearnerBytes

GB = 10**9
CHIP = Chip(
    name="toy",
    hbm_bytes=30 * GB,
    bytes_per_second=1e9,
    flops_per_second=1e12,
    links_per_second=1e8,
)
LEARNER = LearnerBytes(
    policy=2 * GB, params=2 * GB, moments=4 * GB, base=0, reference=2 * GB, merged=0, working=9 * GB
)
PLAN = Plan(
    lanes=1,
    rows=1,
    slots=4,
    extend_rows=1,
    pages=10,
    pages_per_episode=2,
    cache_bytes=5 * GB,
    weight_bytes=3 * GB,
    limit_bytes=30 * GB,
)


def cost(name, arguments, results, temporaries, alive):
    return Cost(
        program=Program(name=name, traced=None, alive_bytes=alive * GB),
        argument_bytes=arguments * GB,
        result_bytes=results * GB,
        temporary_bytes=temporaries * GB,
    )


COSTS = {
    "rollout": [cost("extend", 8, 0, 1, alive=8), cost("decode", 8, 0, 2, alive=8)],
    "push": [cost("reshard", 2, 3, 1, alive=5)],
    "score": [cost("score", 2, 0, 4, alive=2)],
    "gradient": [cost("gradient", 4, 0, 6, alive=2)],
    "optimizer step": [cost("step", 8, 0, 0, alive=6)],
}


def test_what_is_alive_together():
    """The learner keeps 8 GB, 2 of them a reference; the engine 3 of weights and 5 of cache."""
    totals = {phase.name: phase.total // GB for phase in phases(LEARNER, PLAN, COSTS)}
    assert totals == {
        "start": 8 + 5 + 2,  # and the policy that was read
        "resume": 8 + 5,  # the state that was made goes before the saved one comes
        "push": 16 + 1,
        "rollout": 16 + 2,
        "score": 16 + 4,
        "gradient": 16 + 2 + 6,  # the sum of gradients is an argument that comes and goes
        "optimizer step": 16 + 2,
        "save": 16,
    }
    without = {phase.name: phase.total // GB for phase in phases(LEARNER, PLAN, {})}
    assert without["gradient"] == without["save"] == 16


def test_adapters():
    """The base lies beside them, is not read again, and merged with them goes to the engine."""
    learner = dataclasses.replace(LEARNER, params=0, moments=0, reference=0, base=GB, merged=GB)
    assert (learner.kept, learner.peak) == (GB, GB + learner.working)
    totals = {phase.name: phase.total // GB for phase in phases(learner, PLAN, {})}
    assert (totals["start"], totals["resume"]) == (1 + 5 + 2, 1 + 5)
    assert (totals["push"], totals["rollout"]) == (1 + 8 + 1, 1 + 8)


def test_an_embedder_is_alone():
    alone = phases(LEARNER, PLAN, COSTS | {"embed": [cost("embedder", 1, 0, 2, alive=0)]})[-1]
    assert (alone.name, alone.total) == ("embed", 3 * GB)


def test_the_largest_stands_out_and_what_does_not_fit_is_named():
    found = phases(LEARNER, PLAN, COSTS)
    lines = table(found, CHIP).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[7] == (
        "| **gradient** | 8.00 | 3.00 | 5.00 | – | gradient | 8.00 | 6.00 | 24.00 | 80% |"
    )
    assert [line.startswith("| **") for line in lines].count(True) == 1
    assert not any(phase.culprit(CHIP) for phase in found)
    small = dataclasses.replace(CHIP, hbm_bytes=22 * GB)
    assert [line for phase in found if (line := phase.culprit(small))] == [
        "gradient does not fit: 24.00 GB (learner 8.00, weights 3.00, cache 5.00, gradient 8.00), "
        "most of it learner, on a toy chip with 22.00 GB"
    ]
