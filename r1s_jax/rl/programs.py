"""What the learner runs on the mesh: programs of one shape each, and where their arrays lie.

They can be traced without an array in memory (`abstract_*`), which is how a slice that nobody has
is checked.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float

from r1s_jax.models.decoder import DecoderConfig, Params, abstract_params
from r1s_jax.models.logprobs import token_logprobs
from r1s_jax.models.lora import abstract_adapters, init_adapters, merged, with_adapters
from r1s_jax.rl.batching import Batch, empty_batch
from r1s_jax.rl.config import LearnerConfig
from r1s_jax.rl.losses import policy_loss
from r1s_jax.sharding import check_divisible, named_sharding, replicated


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnerState:
    """What is trained, in f32, and the optimiser's state; one pytree, checkpointed whole."""

    params: Any  # the policy's parameters, or its adapters
    opt_state: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenValues:
    """What an update takes beside the tokens of a micro-batch; f32 [B, T] at the tokens' places."""

    advantages_BT: Any
    weights_BT: Any  # of the whole minibatch, see `batching.token_weights`
    old_BT: Any  # log-probs of the rollout's policy; anything where `fresh`
    ref_BT: Any  # of the reference, None where none enters the loss
    fresh: Any  # bool: the parameters still are the rollout's


class LearnerPrograms:
    """All that the learner computes, jitted with the layouts of the mesh.

    score(params, base, batch)        log-probs [B, T] of every token, split over rows
    accumulate(grads, params, base, batch, values)
                                      adds the gradient of a micro-batch; the old sum is donated
    apply(state, grads)               one optimizer step; the state is donated
    init(params)                      the optimiser's state at the start
    merge(params, base)               the whole policy
    whole(scores)                     the same numbers on every device, for the host to read
    copy(params), zeros(params)       as they say

    `params` are what is trained. With adapters `base` is the rest, in `compute_dtype`, else None.
    """

    def __init__(
        self, model: DecoderConfig, config: LearnerConfig, mesh: Mesh, *, temperature: float
    ):
        """Raises UserError where a parameter does not divide over the mesh."""
        self.model, self.config, self.mesh, self.temperature = model, config, mesh, temperature
        whole_policy, policy_axes = abstract_params(model, jnp.dtype(self._base_dtype))
        abstract, axes = whole_policy, policy_axes
        if config.lora is not None:
            abstract, axes = abstract_adapters(model, config.lora)
        is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
        jax.tree.map(
            lambda names, p: check_divisible(mesh, "parameter", p.shape, names),
            policy_axes,
            whole_policy,
            is_leaf=is_axes,
        )
        layout, policy_layout = (
            jax.tree.map(lambda names: named_sharding(mesh, names), each, is_leaf=is_axes)
            for each in (axes, policy_axes)
        )
        optimizer = make_optimizer(config)
        opt_layout = optax.tree_map_params(
            optimizer,
            lambda _, sharding: sharding,
            jax.eval_shape(optimizer.init, abstract),
            layout,
            transform_non_params=lambda _: replicated(mesh),
        )
        self._abstract, self._abstract_policy = abstract, whole_policy
        self.policy_layout = policy_layout
        self.layout = LearnerState(params=layout, opt_state=opt_layout)
        self.rows = named_sharding(mesh, ("rows",))
        whole = replicated(mesh)
        self.init = jax.jit(optimizer.init, out_shardings=opt_layout)
        self.copy = jax.jit(partial(jax.tree.map, jnp.copy), out_shardings=layout)
        self.zeros = jax.jit(partial(jax.tree.map, jnp.zeros_like), out_shardings=layout)
        self.merge = jax.jit(self._merge, out_shardings=policy_layout)
        # XLA for TPUs would cut matmuls up to overlap them with their gathers, and go through HBM
        # with every partial sum; asynchronous gathers overlap as well (benchmarks/scale.md).
        tpu = mesh.devices.flat[0].platform == "tpu"
        options = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"} if tpu else None
        self.score = jax.jit(self._score, out_shardings=self.rows, compiler_options=options)
        self.whole = jax.jit(jnp.copy, out_shardings=whole)
        self.accumulate = jax.jit(
            self._accumulate,
            donate_argnums=0,
            out_shardings=(layout, whole),
            compiler_options=options,
        )
        self.apply = jax.jit(
            partial(_apply, optimizer), donate_argnums=0, out_shardings=(self.layout, whole)
        )

    def begin(self, policy: Params, seed: int) -> tuple[Params, Params | None]:
        """(params, base) at the start: copies of what is given, which others may hold."""
        if self.config.lora is None:
            return self.copy(jax.device_put(policy, self.policy_layout)), None
        cast = jax.jit(
            partial(jax.tree.map, lambda p: jnp.array(p, self._base_dtype)),
            out_shardings=self.policy_layout,
        )
        adapters = jax.jit(
            partial(init_adapters, self.model, self.config.lora, seed=seed),
            out_shardings=self.layout.params,
        )
        return adapters(), cast(policy)

    def abstract_params(self) -> Params:
        """Shapes and layouts of what is trained, and of a gradient."""
        return jax.tree.map(_placed, self._abstract, self.layout.params)

    def abstract_base(self) -> Params | None:
        """Shapes and layouts of the parameters beside the adapters."""
        if self.config.lora is None:
            return None
        return jax.tree.map(_placed, self._abstract_policy, self.policy_layout)

    def abstract_state(self) -> LearnerState:
        """Shapes and layouts of parameters and optimiser state."""
        state = LearnerState(
            params=self._abstract,
            opt_state=jax.eval_shape(make_optimizer(self.config).init, self._abstract),
        )
        return jax.tree.map(_placed, state, self.layout)

    def abstract_batch(self) -> Batch:
        """Shapes and layouts of a micro-batch."""
        batch = empty_batch(self.config.rows, self.config.row_tokens, pad_id=0)
        return jax.tree.map(lambda x: _placed(x, self.rows), batch)

    def abstract_values(self) -> jax.ShapeDtypeStruct:
        """Shape and layout of one f32 number a token."""
        batch = self.abstract_batch()
        return jax.ShapeDtypeStruct(batch.tokens_BT.shape, jnp.float32, sharding=self.rows)

    @property
    def _base_dtype(self) -> str:
        """What is trained has f32 masters; what is not is kept as it is computed with."""
        return "float32" if self.config.lora is None else self.config.compute_dtype

    def _merge(self, params: Params, base: Params | None) -> Params:
        if base is None or self.config.lora is None:
            return params
        return merged(base, params, self.config.lora)

    def _logprobs(
        self, params: Params, base: Params | None, batch: Batch, **options: Any
    ) -> tuple[Array, Array]:
        if base is not None and self.config.lora is not None:
            params = with_adapters(base, params, self.config.lora)
        return token_logprobs(
            self.model,
            params,
            batch.tokens_BT,
            positions_BT=batch.positions_BT,
            segments_BT=batch.segments_BT,
            mesh=self.mesh,
            temperature=self.temperature,
            dtype=self.config.compute_dtype,
            scan=self.config.scan_layers,
            **options,
        )

    def _score(self, params: Params, base: Params | None, batch: Batch) -> Float[Array, "B T"]:
        return self._logprobs(params, base, batch)[0]

    def _accumulate(
        self,
        grads: Params,
        params: Params,
        base: Params | None,
        batch: Batch,
        values: TokenValues,
    ) -> tuple[Params, dict[str, Array]]:
        """Adds a micro-batch's gradient, and returns its sums over tokens (see `policy_loss`)."""
        algorithm = self.config.algorithm

        def loss_of(params: Params) -> tuple[Array, dict[str, Array]]:
            logprobs, entropy = self._logprobs(
                params,
                base,
                batch,
                remat=self.config.remat,
                entropy_gradient=algorithm.entropy_weight > 0,
            )
            old = jnp.where(values.fresh, jax.lax.stop_gradient(logprobs), values.old_BT)
            loss, sums = policy_loss(
                algorithm,
                logprobs,
                entropy,
                old,
                batch.drawn_logprobs_BT,
                values.ref_BT,
                values.advantages_BT,
                values.weights_BT,
                batch.mask_BT,
                batch.segments_BT,
            )
            rewarded = batch.mask_BT & (values.advantages_BT > 0)
            sums["logprob_gap"] = _masked_sum(
                jnp.abs(old - batch.sampler_logprobs_BT), batch.mask_BT
            )
            sums["rewarded_logprob"] = _masked_sum(old, rewarded)
            sums["rewarded"] = rewarded.sum()
            return loss, {**sums, "policy_loss": loss}

        (_, sums), new = jax.value_and_grad(loss_of, has_aux=True)(params)
        return jax.tree.map(jnp.add, grads, new), sums


def make_optimizer(config: LearnerConfig) -> optax.GradientTransformation:
    """AdamW after clipping by global norm, at a constant rate."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            config.learning_rate,
            b1=config.adam_b1,
            b2=config.adam_b2,
            weight_decay=config.weight_decay,
            mu_dtype=config.first_moment_dtype,
        ),
    )


def _apply(
    optimizer: optax.GradientTransformation, state: LearnerState, grads: Params
) -> tuple[LearnerState, dict[str, Array]]:
    """One optimizer step; a gradient that is not finite leaves the state as it was."""
    norm = optax.global_norm(grads)
    finite = jnp.isfinite(norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    new = LearnerState(params=optax.apply_updates(state.params, updates), opt_state=opt_state)
    state = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state)
    return state, {"grad_norm": norm, "skipped": ~finite}


def _masked_sum(values_BT: Array, mask_BT: Array) -> Array:
    return jax.lax.stop_gradient(jnp.where(mask_BT, values_BT, 0.0).sum())


def _placed(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
