"""The learner: parameters and optimiser sharded over the mesh, policy-gradient updates.

    update(trajectories, rewards)   advantages -> minibatches -> packed rows -> AdamW

On several hosts all call the same verbs with the same trajectories; each puts on its devices what
belongs there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Bool, Float, Int

from r1s_jax.models.decoder import DecoderConfig, Params
from r1s_jax.rl.advantages import advantages, has_contrast, kl_returns, token_advantages
from r1s_jax.rl.batching import Batch, Packed, empty_batch, minibatches, pack, token_weights
from r1s_jax.rl.config import LearnerConfig
from r1s_jax.rl.losses import sum_names
from r1s_jax.rl.programs import LearnerPrograms, LearnerState, TokenValues
from r1s_jax.rl.shaping import has_void_turn
from r1s_jax.sharding import replicated
from r1s_jax.types import Trajectory, UserError


class Learner:
    """Owns the learner's state on the mesh. Everything it computes with is compiled once."""

    def __init__(
        self,
        model: DecoderConfig,
        config: LearnerConfig,
        *,
        mesh: Mesh,
        params: Params,
        temperature: float,
        pad_id: int,
        seed: int = 0,
    ):
        """`params` become the start and, with a KL weight, the frozen reference.

        `seed` is that of adapters, where they are what is trained.
        """
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        if config.rows % shards:
            raise UserError(
                f"learner.rows = {config.rows} does not divide over data*fsdp = {shards} devices"
            )
        self.config, self.mesh, self._pad_id = config, mesh, pad_id
        self._programs = LearnerPrograms(model, config, mesh, temperature=temperature)
        trained, self._base = self._programs.begin(params, seed)
        self.state = LearnerState(params=trained, opt_state=self._programs.init(trained))
        # The update donates its input, so the reference is a copy.
        wanted = config.algorithm.needs_reference
        self.reference = self._programs.copy(trained) if wanted else None

    def policy(self) -> Params:
        """The whole policy's parameters, to be read before the next update."""
        if self._base is None:
            return self.state.params
        return self._programs.merge(self.state.params, self._base)

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

    def release(self) -> None:
        """Lets go of the state, so that there is room for the one that `restore` brings."""
        del self.state, self.reference

    def restore(self, arrays: dict[str, Any]) -> None:
        """Takes what `checkpoint()` gave."""
        self.state = arrays["state"]
        self.reference = arrays.get("reference")

    def begin_stage(self) -> None:
        """A fresh optimiser, and the present parameters as the reference where there is one."""
        params = self.state.params
        del self.state  # the old moments go before the new ones come
        self.state = LearnerState(params=params, opt_state=self._programs.init(params))
        if self.reference is not None:
            self.reference = self._programs.copy(params)

    def warm_up(self) -> None:
        """Compiles every program on an empty batch; the state is unchanged."""
        programs = self._programs
        grads = programs.zeros(self.state.params)
        empty = empty_batch(self.config.rows, self.config.row_tokens, self._pad_id)
        batch, zeros = self._put(empty), np.zeros(empty.tokens_BT.shape, np.float32)
        scored = programs.score(self.state.params, self._base, batch)
        if self.config.algorithm.kl_in_reward:
            programs.whole(scored)
        values = self._values(zeros, zeros, scored, scored, fresh=True)
        grads, _ = programs.accumulate(grads, self.state.params, self._base, batch, values)
        self.policy()
        # A gradient that is not finite changes nothing: no second state is needed for this.
        spoil = jax.jit(
            lambda grads: jax.tree.map(lambda g: g * jnp.nan, grads),
            donate_argnums=0,
            out_shardings=programs.layout.params,
        )
        self.state, _ = programs.apply(self.state, spoil(grads))

    def update(
        self,
        trajectories: Sequence[Trajectory],
        rewards_N: Float[np.ndarray, " N"],
        group_ids_N: Int[np.ndarray, " N"],
    ) -> dict[str, float]:
        """One rollout's worth of optimizer updates; episodes in (question, sample) order.

        Returns means over the sampled tokens of all updates, see `policy_loss`, and of the updates
        themselves: `policy_loss`, `grad_norm`. `logprob_gap` is the mean |learner − sampler| at
        the rollout's weights, `rewarded_logprob` the mean log-prob of tokens with an advantage
        above 0. An update with a gradient that is not finite is skipped; `skipped_updates` counts
        them, and `skipped_at_end` those that no other followed. `learned_episodes` is how many
        were not left out; without any nothing is updated. What is unknown is NaN.
        """
        algorithm = self.config.algorithm
        kept_N = self._kept(trajectories, rewards_N, group_ids_N)
        kept = [t for t, keep in zip(trajectories, kept_N, strict=True) if keep]
        metrics = dict.fromkeys(self._metric_names(), np.nan)
        metrics |= {"learned_episodes": float(len(kept)), "updates": 0.0, "skipped_updates": 0.0}
        if not kept:
            return metrics
        config, programs = self.config, self._programs
        slices = minibatches(len(kept), config.updates_per_rollout)
        packed = [
            pack(kept[part], rows=config.rows, row_tokens=config.row_tokens, pad_id=self._pad_id)
            for part in slices
        ]
        placed = [[self._put(batch) for batch in p.batches] for p in packed]

        # ---- log-probs at the rollout's weights; the first update has them with its gradient
        def scores(params: Params, parts: Sequence[Sequence[Batch]]) -> list[list[Array]]:
            return [[programs.score(params, self._base, b) for b in batches] for batches in parts]

        first = 0 if algorithm.kl_in_reward else 1
        old = [[]] * first + scores(self.state.params, placed[first:])
        ref = [] if self.reference is None else scores(self.reference, placed)

        # ---- advantages, one number or one array an episode
        if algorithm.kl_in_reward:
            chosen, metrics["kl_ref"] = self._with_kl(
                packed, old, ref, rewards_N, group_ids_N, kept_N
            )
        else:
            counts_N = np.array([t.sampled_count for t in trajectories])
            scalars_N = advantages(
                rewards_N, group_ids_N, counts_N, estimator=algorithm.estimator, kept_N=kept_N
            )
            chosen = list(scalars_N[kept_N])

        # ---- updates
        sums: list[dict[str, Array]] = []
        steps: list[dict[str, Array]] = []
        for i, (part, p) in enumerate(zip(slices, packed, strict=True)):
            counts_M = np.array([t.sampled_count for t in kept[part]])
            weights_M = token_weights(counts_M, algorithm.aggregation, algorithm.length_norm)
            advantage, weight = p.scatter(chosen[part]), p.scatter(weights_M)
            grads = programs.zeros(self.state.params)
            for j, batch in enumerate(placed[i]):
                values = self._values(
                    advantage[j],
                    weight[j],
                    old[i][j] if i > 0 else weight[j],  # any numbers, where it is fresh
                    ref[i][j] if ref else None,
                    fresh=i == 0,
                )
                grads, found = programs.accumulate(
                    grads, self.state.params, self._base, batch, values
                )
                sums.append(found)
            self.state, step = programs.apply(self.state, grads)
            steps.append(step)
        return metrics | _means(jax.device_get(sums), jax.device_get(steps), packed)

    def _metric_names(self) -> list[str]:
        names = [*sum_names(self.config.algorithm), "policy_loss", "grad_norm", "logprob_gap"]
        names += ["rewarded_logprob", "packed_share", "skipped_at_end"]
        return names + ["kl_ref"] * self.config.algorithm.kl_in_reward

    def _kept(
        self,
        trajectories: Sequence[Trajectory],
        rewards_N: Float[np.ndarray, " N"],
        group_ids_N: Int[np.ndarray, " N"],
    ) -> Bool[np.ndarray, " N"]:
        """Which episodes are learned from."""
        algorithm = self.config.algorithm
        kept_N = np.ones(len(trajectories), bool)
        if algorithm.drop_zero_variance:
            kept_N &= has_contrast(rewards_N, group_ids_N)
        if algorithm.drop_void_turns:
            kept_N &= ~np.array([has_void_turn(t) for t in trajectories], bool)
        return kept_N

    def _with_kl(
        self,
        packed: Sequence[Packed],
        old: Sequence[Sequence[Array]],
        ref: Sequence[Sequence[Array]],
        rewards_N: np.ndarray,
        group_ids_N: np.ndarray,
        kept_N: np.ndarray,
    ) -> tuple[list[np.ndarray], float]:
        """Token-wise advantages of the kept episodes, and the mean of k1 over their tokens."""
        returns: list[np.ndarray | None] = [None] * len(kept_N)
        masks: list[np.ndarray | None] = [None] * len(kept_N)
        total, count, places = 0.0, 0, iter(np.flatnonzero(kept_N))
        for p, olds, refs in zip(packed, old, ref, strict=True):
            olds, refs = ([self._programs.whole(x) for x in each] for each in (olds, refs))
            parts = (p.gather(olds), p.gather(refs), p.gather([b.mask_BT for b in p.batches]))
            for old_T, ref_T, mask_T in zip(*parts, strict=True):
                place = next(places)
                weight = self.config.algorithm.kl_weight
                returns[place] = kl_returns(old_T, ref_T, mask_T, weight)
                masks[place] = mask_T
                total += float((old_T - ref_T)[mask_T].sum(dtype=np.float64))
                count += int(mask_T.sum())
        chosen = token_advantages(
            rewards_N, group_ids_N, returns, masks, estimator=self.config.algorithm.estimator
        )
        return [c for c in chosen if c is not None], total / max(count, 1)

    def _values(
        self, advantages_BT: Any, weights_BT: Any, old_BT: Any, ref_BT: Any, *, fresh: bool
    ) -> TokenValues:
        algorithm, by_row = self.config.algorithm, self._programs.rows
        in_loss = algorithm.needs_reference and not algorithm.kl_in_reward
        return TokenValues(
            advantages_BT=_put(advantages_BT, by_row),
            weights_BT=_put(weights_BT, by_row),
            old_BT=_put(old_BT, by_row),
            ref_BT=_put(ref_BT, by_row) if in_loss else None,
            fresh=_put(np.array(fresh), replicated(self.mesh)),
        )

    def _put(self, batch: Batch) -> Batch:
        return jax.tree.map(lambda x: _put(x, self._programs.rows), batch)


def _put(values: Any, sharding: NamedSharding) -> Array:
    """Onto the mesh; every host holds all of `values` and places its own part."""
    if isinstance(values, jax.Array):  # is there already
        return values
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def _means(
    sums: Sequence[Mapping[str, Any]],
    steps: Sequence[Mapping[str, Any]],
    packed: Sequence[Packed],
) -> dict[str, float]:
    """Sums of micro-batches and results of updates -> metrics."""
    total = {k: float(sum(float(s[k]) for s in sums)) for k in sums[0]}
    tokens = sum(int(b.mask_BT.sum()) for p in packed for b in p.batches)
    laid = sum(b.tokens_BT.size for p in packed for b in p.batches)
    filled = sum(int((b.segments_BT > 0).sum()) for p in packed for b in p.batches)
    rewarded, loss = total.pop("rewarded"), total.pop("policy_loss")
    skipped = [bool(s["skipped"]) for s in steps]
    metrics = {k: v / max(tokens, 1) for k, v in total.items()}
    metrics["policy_loss"] = loss / len(steps)
    metrics["grad_norm"] = float(np.mean([float(s["grad_norm"]) for s in steps]))
    metrics["updates"], metrics["skipped_updates"] = float(len(skipped)), float(sum(skipped))
    metrics["skipped_at_end"] = float([*skipped[::-1], False].index(False))
    metrics["packed_share"] = filled / laid
    metrics["rewarded_logprob"] = total["rewarded_logprob"] / rewarded if rewarded else np.nan
    return metrics
