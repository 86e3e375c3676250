"""Workload A of benchmarks/learner.py by tunix's own GRPO step; runs in tunix's environment.

    python tunix_grpo.py --folder WEIGHTS --batch BATCH.npz --optimizer OPTIMIZER.json

The trainer that its RL cluster builds for the actor, wired as its `GRPOLearner` wires it: the
registered `grpo` loss, `beta` 0, one iteration (the old log-probs are the new ones, detached),
and asked as its cluster asks it, by `train` with one example a batch. Its defaults otherwise: no
rematerialisation, all logits at a time, the entropy of all of them as a metric.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from protocol import serve
from tunix.rl import function_registry
from tunix.rl.grpo.grpo_learner import GRPOConfig, TrainExample
from tunix.rl.rl_cluster import RLTrainingConfig
from tunix.rl.trainer import Trainer
from tunix.sft.metrics_logger import MetricsLogger, MetricsLoggerOptions
from tunix_model import load_model


class Metrics:
    """Keeps what the trainer logs, so that it can be compared."""

    last: dict[str, float]

    def __init__(self):
        Metrics.last = {}

    def log_scalar(self, event: str, value: Any, **_: Any) -> None:
        Metrics.last[event.split("/")[-1]] = float(value)

    def close(self) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--batch", type=Path, required=True, help="arrays of a TrainExample, .npz")
    parser.add_argument("--optimizer", type=Path, required=True, help="AdamW's numbers, .json")
    args = parser.parse_args()
    config, model = load_model(args.folder)
    pad_id, eos_id = config.vocab_size, config.vocab_size + 1  # no token of the batch
    algorithm = GRPOConfig(num_generations=4, num_iterations=1, beta=0.0)
    algorithm.temperature = 1.0
    numbers = json.loads(args.optimizer.read_text())
    clip = optax.clip_by_global_norm(numbers.pop("clip_norm"))
    optimizer = optax.chain(clip, optax.adamw(**numbers))
    options = MetricsLoggerOptions(
        log_dir=str(args.batch.parent), backend_kwargs={"custom_backend": [Metrics]}
    )
    trainer = Trainer(
        model,
        optimizer,
        RLTrainingConfig(actor_optimizer=optimizer, eval_every_n_steps=2**31),
        custom_checkpoint_metadata_fn=dict,
        metrics_logger=MetricsLogger(options),
    )
    trainer.is_managed_externally = True
    loss = function_registry.get_policy_loss_fn(algorithm.policy_loss_fn)
    trainer.with_loss_fn(
        lambda model, train_example, algo_config: loss(
            model, train_example, algo_config=algorithm, pad_id=pad_id, eos_id=eos_id
        ),
        has_aux=True,
    )
    trainer.with_gen_model_input_fn(lambda x: {"train_example": x, "algo_config": algorithm})
    trainer.with_rl_metrics_to_log({"kl": np.mean, "pg_clipfrac": np.mean, "entropy": np.mean})
    example = TrainExample(
        **dict(np.load(args.batch)), ref_per_token_logps=None, old_per_token_logps=None
    )
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))

    def run(count: str = "1") -> dict[str, Any]:
        begin = time.perf_counter()
        for _ in range(int(count)):
            with mesh:
                trainer.train([example])
            jax.block_until_ready(nnx.state(trainer.model))
        return {"seconds": time.perf_counter() - begin}

    # Metrics are written a step late: the second step writes those of the first.
    run("2")
    first = {name: Metrics.last[name] for name in ("grad_norm", "entropy")}
    run()
    serve({"ready": "tunix", "jax": jax.__version__, **first}, {"run": run})


if __name__ == "__main__":
    main()
