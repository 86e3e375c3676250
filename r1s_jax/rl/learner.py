"""The learner: parameters and optimiser sharded over the mesh, one policy-gradient update.

    score(batches)                 log-probs of the rollout weights (old and reference)
    update(trajectories, rewards)  advantages -> minibatches -> micro-batches -> AdamW

Departure from the recipe's code: the micro-batches of one minibatch are padded to their own
bucket and their gradients added, which changes the order of a sum and nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float

from r1s_jax.models.decoder import DecoderConfig, Params, Remat, abstract_params
from r1s_jax.models.logprobs import token_logprobs
from r1s_jax.rl.advantages import advantages, estimator_by_name, has_contrast, token_advantages
from r1s_jax.rl.batching import Batch, empty_batch, minibatches, pack, unpack
from r1s_jax.rl.losses import policy_loss, sequence_mean
from r1s_jax.sharding import check_divisible, named_sharding, replicated
from r1s_jax.types import Trajectory, UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """The recipe's defaults (Qwen2.5-7B)."""

    estimator: str = "reinforce_plus_plus_baseline"
    drop_zero_variance: bool = False  # leave out groups whose rewards are all equal
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coefficient: float = 0.0
    learning_rate: float = 2e-6
    adam_b1: float = 0.9
    adam_b2: float = 0.95
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    updates_per_rollout: int = 4
    rows: int = 16  # of a micro-batch
    length_buckets: tuple[int, ...] = (2048,)
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # parameters stay f32
    scan_layers: bool = True  # one layer is compiled, not all L of them
    remat: Remat = "full"


# What an update measures; all of it is unknown where nothing is left to learn from.
_DIAGNOSTICS = (
    "policy_loss",
    "clip_fraction",
    "ratio_mean",
    "approx_kl",
    "entropy",
    "grad_norm",
    "logprob_gap",
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnerState:
    """f32 parameters and the optimiser's state; one pytree, checkpointed whole."""

    params: Any
    opt_state: Any


class Learner:
    """Owns the learner's state on the mesh. Everything it computes with is jitted once."""

    def __init__(
        self,
        model: DecoderConfig,
        config: LearnerConfig,
        *,
        mesh: Mesh,
        params: Params,
        temperature: float,
        pad_id: int,
    ):
        """`params` become the start and, with a KL weight, the frozen reference."""
        estimator_by_name(config.estimator)
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        if config.rows % shards:
            raise UserError(
                f"learner.rows = {config.rows} does not divide over data*fsdp = {shards} devices"
            )
        self.config, self.mesh = config, mesh
        self._pad_id = pad_id
        abstract, axes = abstract_params(model)
        is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
        jax.tree.map(
            lambda names, p: check_divisible(mesh, "parameter", p.shape, names),
            axes,
            abstract,
            is_leaf=is_axes,
        )
        layout = jax.tree.map(lambda names: named_sharding(mesh, names), axes, is_leaf=is_axes)
        self._optimizer = make_optimizer(config)
        opt_layout = optax.tree_map_params(
            self._optimizer,
            lambda _, sharding: sharding,
            jax.eval_shape(self._optimizer.init, abstract),
            layout,
            transform_non_params=lambda _: replicated(mesh),
        )
        self._layout = LearnerState(params=layout, opt_state=opt_layout)
        self._init = jax.jit(self._optimizer.init, out_shardings=opt_layout)
        self._copy = jax.jit(partial(jax.tree.map, jnp.copy), out_shardings=layout)
        params = jax.device_put(params, layout)
        self.reference = params if config.kl_coefficient > 0.0 else None
        # The update donates its input: a start that others hold (or the reference) is copied.
        self.state = LearnerState(params=self._copy(params), opt_state=self._init(params))
        self._zeros = jax.jit(partial(jax.tree.map, jnp.zeros_like), out_shardings=layout)
        score = partial(_score, model, config, temperature)
        self._score = jax.jit(score, out_shardings=named_sharding(mesh, ("rows", None)))
        self._accumulate = jax.jit(
            partial(_accumulate, model, config, temperature),
            donate_argnums=0,
            out_shardings=(layout, replicated(mesh)),
        )
        self._apply = jax.jit(
            partial(_apply, self._optimizer),
            donate_argnums=0,
            out_shardings=(self._layout, replicated(mesh)),
        )

    def checkpoint(self) -> dict[str, Any]:
        """All arrays a resumed run needs: the state and, with a KL weight, the reference."""
        arrays: dict[str, Any] = {"state": self.state}
        return arrays if self.reference is None else {**arrays, "reference": self.reference}

    def abstract_checkpoint(self) -> dict[str, Any]:
        """Shapes and shardings of `checkpoint()`."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            self.checkpoint(),
        )

    def restore(self, arrays: dict[str, Any]) -> None:
        """Takes what `checkpoint()` gave."""
        self.state = arrays["state"]
        self.reference = arrays.get("reference")

    def begin_stage(self) -> None:
        """A fresh optimiser, and the present parameters as the reference where there is one."""
        params = self.state.params
        del self.state  # the old moments go before the new ones come
        self.state = LearnerState(params=params, opt_state=self._init(params))
        if self.reference is not None:
            self.reference = self._copy(params)

    def warm_up(self) -> None:
        """Compiles every program for every bucket on empty batches; the state is unchanged."""
        grads = self._zeros(self.state.params)
        for bucket in self.config.length_buckets:
            arrays = self._put(empty_batch(self.config.rows, bucket, self._pad_id))
            old = self._score(self.state.params, arrays.tokens_BT)
            weights = self._put_rows(np.zeros((self.config.rows, bucket), np.float32))
            grads, _ = self._accumulate(grads, self.state.params, arrays, old, weights, 1.0)
        # A gradient that is not finite changes nothing: no second state is needed for this.
        spoil = jax.jit(
            partial(jax.tree.map, lambda g: g * jnp.nan),
            donate_argnums=0,
            out_shardings=self._layout.params,
        )
        self.state, _ = self._apply(self.state, spoil(grads))

    def update(
        self,
        trajectories: Sequence[Trajectory],
        rewards_N: Float[np.ndarray, " N"],
        group_ids_N: np.ndarray,
    ) -> dict[str, float]:
        """One rollout's worth of optimizer updates; episodes in (question, sample) order.

        Returns metrics averaged over the updates. `logprob_gap` is the mean |learner − sampler|
        over sampled tokens, taken before the first update. An update with a gradient that is
        not finite is skipped and counted in `skipped_updates`. `learned_episodes` is how many
        were not left out (`drop_zero_variance`); without any nothing is updated, and what is then
        unknown is NaN.
        """
        config = self.config
        if config.drop_zero_variance:
            kept_N = has_contrast(rewards_N, group_ids_N)
            trajectories = [t for t, kept in zip(trajectories, kept_N, strict=True) if kept]
            rewards_N, group_ids_N = rewards_N[kept_N], group_ids_N[kept_N]
        if not trajectories:
            unknown = (*_DIAGNOSTICS, *(() if self.reference is None else ("kl_ref",)))
            return {
                **dict.fromkeys(unknown, np.nan),
                "learned_episodes": 0.0,
                "skipped_updates": 0.0,
            }
        counts_N = np.array([t.sampled_count for t in trajectories])
        scalars_N = advantages(rewards_N, group_ids_N, counts_N, estimator=config.estimator)
        slices = minibatches(len(trajectories), config.updates_per_rollout)
        packed = [
            pack(
                trajectories[part],
                scalars_N[part],
                rows=config.rows,
                length_buckets=config.length_buckets,
                pad_id=self._pad_id,
            )
            for part in slices
        ]
        placed = [[self._put(batch) for batch in batches] for batches in packed]
        old = [self._scores(self.state.params, batches) for batches in placed]
        weights, kl = self._token_weights(packed, placed, old, slices, rewards_N, group_ids_N)
        gaps = [
            _gap(batch, np.asarray(o))
            for batches, olds in zip(packed, old, strict=True)
            for batch, o in zip(batches, olds, strict=True)
        ]
        results = []
        for part, batches, olds, weight in zip(slices, placed, old, weights, strict=True):
            total = float(part.stop - part.start)
            grads = self._zeros(self.state.params)
            auxes = []
            for batch, o, w in zip(batches, olds, weight, strict=True):
                grads, aux = self._accumulate(grads, self.state.params, batch, o, w, total)
                auxes.append(aux)
            self.state, norms = self._apply(self.state, grads)
            results.append((auxes, norms))
        results = jax.device_get(results)
        sums = [
            {**norms, **{k: float(sum(a[k] for a in auxes)) for k in auxes[0]}}
            for auxes, norms in results
        ]
        metrics = {k: float(np.mean([s[k] for s in sums])) for k in sums[0]}
        metrics["learned_episodes"] = float(len(trajectories))
        metrics["skipped_updates"] = float(sum(s["skipped_updates"] for s in sums))
        metrics["logprob_gap"] = float(sum(g for g, _ in gaps) / max(sum(n for _, n in gaps), 1))
        return metrics | kl

    def _scores(self, params: Params, batches: Sequence[Batch]) -> list[Array]:
        return [self._score(params, batch.tokens_BT) for batch in batches]

    def _token_weights(
        self,
        packed: list[list[Batch]],
        placed: list[list[Batch]],
        old: list[list[Array]],
        slices: list[slice],
        rewards_N: np.ndarray,
        group_ids_N: np.ndarray,
    ) -> tuple[list[list[Array]], dict[str, float]]:
        """Advantages per token of every micro-batch; with a KL weight the reference enters.

        The second result is then `kl_ref`, the mean of k1 over sampled tokens.
        """
        if self.reference is None:
            plain = [
                [
                    self._put_rows(
                        np.repeat(batch.advantages_B[:, None], batch.tokens_BT.shape[1], axis=1)
                    )
                    for batch in batches
                ]
                for batches in packed
            ]
            return plain, {}
        ref = [self._scores(self.reference, batches) for batches in placed]

        def whole(values: list[list[Any]]) -> np.ndarray:
            parts = [
                unpack(batches, value, part.stop - part.start)
                for batches, value, part in zip(packed, values, slices, strict=True)
            ]
            width = max(p.shape[1] for p in parts)
            return np.concatenate([np.pad(p, ((0, 0), (0, width - p.shape[1]))) for p in parts])

        mask_NT = whole([[b.mask_BT for b in batches] for batches in packed])
        old_NT, ref_NT = whole(old), whole(ref)
        advantages_NT = token_advantages(
            rewards_N,
            group_ids_N,
            mask_NT,
            old_NT,
            ref_NT,
            kl_coefficient=self.config.kl_coefficient,
            estimator=self.config.estimator,
        )
        weights = [
            [
                self._put_rows(advantages_NT[part][batch.episode_B, : batch.tokens_BT.shape[1]])
                for batch in batches
            ]
            for part, batches in zip(slices, packed, strict=True)
        ]
        return weights, {"kl_ref": float((old_NT - ref_NT)[mask_NT].mean())}

    def _put_rows(self, values: np.ndarray) -> Array:
        return jax.device_put(values, named_sharding(self.mesh, ("rows",)))

    def _put(self, batch: Batch) -> Batch:
        return jax.tree.map(self._put_rows, batch)


def make_optimizer(config: LearnerConfig) -> optax.GradientTransformation:
    """AdamW after clipping by global norm, at a constant rate."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            config.learning_rate,
            b1=config.adam_b1,
            b2=config.adam_b2,
            weight_decay=config.weight_decay,
        ),
    )


def _score(
    model: DecoderConfig,
    config: LearnerConfig,
    temperature: float,
    params: Params,
    tokens_BT: Array,
) -> Float[Array, "B T"]:
    return token_logprobs(
        model,
        params,
        tokens_BT,
        temperature=temperature,
        dtype=config.compute_dtype,
        scan=config.scan_layers,
    )[0]


def _accumulate(
    model: DecoderConfig,
    config: LearnerConfig,
    temperature: float,
    grads: Params,
    params: Params,
    batch: Batch,
    old_BT: Array,
    advantages_BT: Array,
    total: Array,
) -> tuple[Params, dict[str, Array]]:
    """Adds a micro-batch's gradient; index 0, which nothing predicts, is left out."""

    def loss_of(params: Params) -> tuple[Array, dict[str, Array]]:
        logprobs, entropy = token_logprobs(
            model,
            params,
            batch.tokens_BT,
            temperature=temperature,
            dtype=config.compute_dtype,
            scan=config.scan_layers,
            remat=config.remat,
        )
        mask = batch.mask_BT[:, 1:]
        loss, aux = policy_loss(
            logprobs[:, 1:],
            old_BT[:, 1:],
            advantages_BT[:, 1:],
            mask,
            total_sequences=total,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
        )
        aux["entropy"] = sequence_mean(entropy[:, 1:], mask, total)
        aux["policy_loss"] = loss
        return loss, aux

    (_, aux), new = jax.value_and_grad(loss_of, has_aux=True)(params)
    return jax.tree.map(jnp.add, grads, new), aux


def _apply(
    optimizer: optax.GradientTransformation, state: LearnerState, grads: Params
) -> tuple[LearnerState, dict[str, Array]]:
    """One optimizer step; a gradient that is not finite leaves the state as it was."""
    norm = optax.global_norm(grads)
    finite = jnp.isfinite(norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    new = LearnerState(params=optax.apply_updates(state.params, updates), opt_state=opt_state)
    state = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state)
    return state, {"grad_norm": norm, "skipped_updates": (~finite).astype(jnp.float32)}


def _gap(batch: Batch, learner_BT: np.ndarray) -> tuple[float, int]:
    """Sum of |learner − sampler| over sampled tokens, and their number."""
    differences = np.abs(learner_BT - batch.sampler_logprobs_BT)[batch.mask_BT]
    return float(differences.sum(dtype=np.float64)), int(batch.mask_BT.sum())
