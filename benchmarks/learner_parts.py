"""Where an update's time goes, for benchmarks/learner.py: part by part, gradient included."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from calibrate import matmul_rate
from jax import Array
from jaxtyping import Float
from learner_work import gradient_flops, matmul_params
from report import Table, spread

from r1s_jax.models.decoder import DecoderConfig, init_params
from r1s_jax.models.packed import packed_attend
from r1s_jax.rl.batching import Batch, pack
from r1s_jax.rl.config import LearnerConfig
from r1s_jax.rl.programs import LearnerPrograms, LearnerState, TokenValues
from r1s_jax.sharding import MeshConfig, make_mesh
from r1s_jax.types import Trajectory

NO_VOCABULARY = 128  # tokens of a vocabulary that costs next to nothing


@dataclasses.dataclass(kw_only=True)
class Gradients:
    """Gradients of given micro-batches by the learner's own programs, and optimizer steps."""

    programs: LearnerPrograms
    params: Any
    state: LearnerState

    @classmethod
    def make(cls, model: DecoderConfig, config: LearnerConfig) -> Gradients:
        programs = LearnerPrograms(model, config, make_mesh(MeshConfig()), temperature=1.0)
        params, _ = programs.begin(init_params(model, 0), 0)
        copy, _ = programs.begin(params, 0)
        state = LearnerState(params=copy, opt_state=programs.init(copy))
        return cls(programs=programs, params=params, state=state)

    def gradient(self, batches: Sequence[Batch]) -> Any:
        """Their summed gradient, of advantages all 1 at weights that do not matter."""
        grads = self.programs.zeros(self.params)
        for batch in batches:
            ones = jnp.ones(batch.tokens_BT.shape, jnp.float32)
            values = TokenValues(
                advantages_BT=ones,
                weights_BT=ones / ones.size,
                old_BT=ones,
                ref_BT=None,
                fresh=jnp.array(True),
            )
            grads, _ = self.programs.accumulate(grads, self.params, None, batch, values)
        return grads

    def apply(self, grads: Any) -> LearnerState:
        """One optimizer step."""
        self.state, _ = self.programs.apply(self.state, grads)
        return self.state


def seconds_of(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, taking turns, after one turn that may compile."""
    for run in runs.values():
        jax.block_until_ready(run())
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            begin = time.perf_counter()
            jax.block_until_ready(run())
            taken[name].append(time.perf_counter() - begin)
    return taken


def attention_gradient(model: DecoderConfig, rows: int, tokens: int) -> Callable[[], Any]:
    """One layer's attention of full rows, forward and backward."""
    attend = packed_attend(jnp.ones((rows, tokens), jnp.int32), make_mesh(MeshConfig()))
    shapes = [
        (rows, tokens, heads, model.head_dim)
        for heads in (model.num_attention_heads, *[model.num_key_value_heads] * 2)
    ]
    q, k, v = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
    program = jax.jit(jax.grad(lambda qkv: (attend(0, None, *qkv)[0] ** 2).sum() / 2))
    return lambda: program((q, k, v))


def matmul_gradient(model: DecoderConfig, tokens: int) -> Callable[[], Any]:
    """The products of one layer's kernels: with the input, and the two of the backward pass."""
    d, f = model.hidden_size, model.intermediate_size
    q, kv = (n * model.head_dim for n in (model.num_attention_heads, model.num_key_value_heads))
    shapes = [(d, q), (d, kv), (d, kv), (q, d), (d, f), (d, f), (f, d)]
    assert sum(a * b for a, b in shapes) * model.num_hidden_layers == matmul_params(model)[0]

    @jax.jit
    def products(
        x: Float[Array, "N a"], w: Float[Array, "a b"], dy: Float[Array, "N b"]
    ) -> tuple[Array, Array, Array]:
        return x @ w, dy @ w.T, x.T @ dy

    inputs = {n: jax.random.normal(jax.random.key(n), (tokens, n)) for n in {d, f, q, kv}}
    kernels = [jax.random.normal(jax.random.key(0), shape) for shape in shapes]

    def run() -> None:
        for w in kernels:  # never two at a time, as in a model
            jax.block_until_ready(products(inputs[w.shape[0]], w, inputs[w.shape[1]]))

    return run


def parts_table(
    model: DecoderConfig,
    config: LearnerConfig,
    update: Callable[[], Any],
    trajectories: Sequence[Trajectory],
    rounds: int,
) -> Table:
    """An update of full rows taken apart by leaving parts out and by running them alone."""
    small = dataclasses.replace(model, vocab_size=NO_VOCABULARY)
    whole, without = (Gradients.make(m, config) for m in (model, small))
    batches = pack(trajectories, rows=config.rows, row_tokens=config.row_tokens, pad_id=0).batches
    few = [
        dataclasses.replace(batch, tokens_BT=np.asarray(batch.tokens_BT) % NO_VOCABULARY)
        for batch in batches
    ]
    on_device, few = ([jax.tree.map(jnp.asarray, b) for b in each] for each in (batches, few))
    zero = whole.programs.zeros(whole.params)
    attention = attention_gradient(model, config.rows, config.row_tokens)
    products = matmul_gradient(model, config.rows * config.row_tokens)
    before = matmul_rate(20)
    taken = seconds_of(
        {
            "update": update,
            "gradient": lambda: whole.gradient(on_device),
            "small": lambda: without.gradient(few),
            "apply": lambda: whole.apply(zero),
            "attention": attention,
            "products": products,
        },
        rounds,
    )
    rate = (before + matmul_rate(20)) / 2
    flops = gradient_flops(model, [config.row_tokens] * config.rows * len(batches))
    times = model.num_hidden_layers * len(batches)
    s = {name: statistics.median(values) for name, values in taken.items()}
    vocabulary_flops = flops["vocabulary"] * (1 - NO_VOCABULARY / model.vocab_size)
    rest = s["small"] - times * (s["attention"] + s["products"])
    parts = [
        ("attention, alone", times * s["attention"], flops["attention"]),
        ("the layers' matmuls, alone", times * s["products"], flops["layers"]),
        ("vocabulary, by difference", s["gradient"] - s["small"], vocabulary_flops),
        ("element-wise and what passes between, the rest", rest, 0.0),
        ("optimizer step, alone", s["apply"], 0.0),
        ("host: rewards to rows, the rest", s["update"] - s["gradient"] - s["apply"], 0.0),
        ("**the update**", s["update"], sum(flops.values())),
    ]
    rows = []
    for name, seconds, count in parts:
        speed = count / seconds / 1e9
        rows.append(
            [name, f"{seconds * 1000:.0f}", f"{seconds / s['update']:.0%}"]
            + ([f"{count / 1e9:.1f}", f"{speed / rate:.0%}"] if count else ["", ""])
        )
    return Table(
        title="A: where an update's time goes",
        text=(
            f"Medians of {rounds} turns; the machine made {rate:.0f} GFLOP/s before and after. "
            "Attention and matmuls run by themselves, forward and backward, one layer and "
            "micro-batch at a time; "
            f"the vocabulary is what the gradient takes longer than with {NO_VOCABULARY} tokens. "
            f"Seconds of whole updates: {spread(taken['update'])}."
        ),
        header=["part", "ms", "share", "GFLOP (causal)", "of the machine's rate"],
        rows=rows,
    )
