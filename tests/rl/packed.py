"""The library's way from rewards to gradients, as `Learner.update` goes it (test_update), no model.

Takes the episodes of `reference`, and gives what it found back by episode.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import launch
from r1s_jax.rl.advantages import advantages, has_contrast, kl_returns, token_advantages
from r1s_jax.rl.algorithm import AlgorithmConfig
from r1s_jax.rl.batching import Packed, empty_batch, minibatches, pack, token_weights
from r1s_jax.rl.losses import policy_loss, sum_names
from r1s_jax.types import Question, StopReason, TokenSource, Trajectory
from tests.rl import reference
from tests.rl.reference import Episode

PRESETS = sorted(path.stem for path in (launch.CONFIGS / "algorithms").glob("*.gin"))


def preset(name: str) -> AlgorithmConfig:
    text = f'from __gin__ import dynamic_registration\ninclude "algorithms/{name}.gin"\n'
    return launch.load_text(text, name, top=AlgorithmConfig).value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Played:
    """One update by the library: what it made of a minibatch, gathered back by episode."""

    numbers: list[int]
    advantages: list[np.ndarray]
    weights: list[float]
    update: reference.Update


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Shape of a micro-batch, and whether `policy_loss` runs as one program or op by op."""

    rows: int = 3
    row_tokens: int = 20
    jit: bool = False


def play(
    config: AlgorithmConfig,
    scenarios: Mapping[str, Sequence[Episode]],
    dtype: str,
    layout: Layout = Layout(),
) -> dict[str, list[Played]]:
    """The way of `Learner.update` from rewards to gradients, without a model, two updates each.

    The micro-batches of all scenarios are computed in one go, which is what takes time.
    """
    prepared = {k: list(_prepare(config, v, layout)) for k, v in scenarios.items()}
    inputs = [x for updates in prepared.values() for *_, micros in updates for x in micros]
    results = iter(_losses(config, inputs, dtype, layout))
    played: dict[str, list[Played]] = {}
    for name, updates in prepared.items():
        played[name] = []
        for numbers, packed, advantage, weight, micros in updates:
            values, sums, by_logprob, by_entropy = zip(
                *(next(results) for _ in micros), strict=True
            )
            update = reference.Update(
                value=float(np.sum(values)),
                by_logprob=packed.gather(by_logprob),
                by_entropy=packed.gather(by_entropy),
                sums={k: float(sum(s[k] for s in sums)) for k in sums[0]},
            )
            each = Played(
                numbers=numbers,
                advantages=[np.float64(a) for a in packed.gather(advantage)],
                weights=[float(w[0]) for w in packed.gather(weight)],
                update=update,
            )
            played[name].append(each)
    return played


def _prepare(
    config: AlgorithmConfig, episodes: Sequence[Episode], layout: Layout
) -> Iterator[tuple[list[int], Packed, list[np.ndarray], list[np.ndarray], list[dict]]]:
    """Each update: its episodes, their places, advantages and weights, inputs of the loss."""
    rewards_N = np.array([e.reward for e in episodes])
    groups_N = np.array([e.group for e in episodes])
    kept_N = np.ones(len(episodes), bool)
    if config.drop_zero_variance:
        kept_N &= has_contrast(rewards_N, groups_N)
    if config.drop_void_turns:
        kept_N &= ~np.array([e.void for e in episodes])
    kept = np.flatnonzero(kept_N).tolist()
    every = [trajectory(e, i) for i, e in enumerate(episodes)]
    if config.kl_in_reward:
        returns: list[np.ndarray | None] = [None] * len(episodes)
        masks: list[np.ndarray | None] = [None] * len(episodes)
        for i in kept:
            e = episodes[i]
            returns[i], masks[i] = kl_returns(e.old, e.ref, e.mask, config.kl_weight), e.mask
        found = token_advantages(rewards_N, groups_N, returns, masks, estimator=config.estimator)
        chosen = [found[i] for i in kept]
    else:
        counts_N = np.array([t.sampled_count for t in every])
        chosen = advantages(
            rewards_N, groups_N, counts_N, estimator=config.estimator, kept_N=kept_N
        )[kept_N]
    for part in minibatches(len(kept), 2):
        numbers = kept[part]
        packed = pack(
            [every[i] for i in numbers], rows=layout.rows, row_tokens=layout.row_tokens, pad_id=0
        )
        counts_M = np.array([every[i].sampled_count for i in numbers])
        weights_M = token_weights(counts_M, config.aggregation, config.length_norm)
        advantage, weight = packed.scatter(chosen[part]), packed.scatter(weights_M)
        tokens = {
            k: laid(packed, [getattr(episodes[i], k) for i in numbers])
            for k in ("new", "entropy", "old", "ref")
        }
        micros = [
            {
                **{k: arrays[j] for k, arrays in tokens.items()},
                "drawn": batch.drawn_logprobs_BT,
                "advantages": advantage[j],
                "weights": weight[j],
                "mask": batch.mask_BT,
                "segments": batch.segments_BT,
            }
            for j, batch in enumerate(packed.batches)
        ]
        yield numbers, packed, advantage, weight, micros


def _losses(
    config: AlgorithmConfig, inputs: Sequence[dict[str, np.ndarray]], dtype: str, layout: Layout
) -> list[tuple[Any, dict[str, Any], np.ndarray, np.ndarray]]:
    """Value, sums and the two gradients of every micro-batch."""

    def loss(new: jax.Array, entropy: jax.Array, x: dict[str, jax.Array]) -> Any:
        in_loss = config.needs_reference and not config.kl_in_reward
        return policy_loss(
            config, new, entropy, x["old"], x["drawn"], x["ref"] if in_loss else None,
            x["advantages"], x["weights"], x["mask"], x["segments"],
        )  # fmt: skip

    def run(x: dict[str, jax.Array]) -> Any:
        gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        return jax.vmap(gradient)(x["new"], x["entropy"], x)

    # Filled up to one number for all, or every operation would be compiled anew; what is filled
    # in is padding alone.
    whole = 40
    assert len(inputs) <= whole
    empty = empty_batch(layout.rows, layout.row_tokens, pad_id=0)
    numbers = ("new", "entropy", "old", "ref", "drawn", "advantages", "weights")
    padding = dict.fromkeys(numbers, np.full(empty.tokens_BT.shape, np.nan))
    padding |= {"mask": empty.mask_BT, "segments": empty.segments_BT}
    inputs = [*inputs, *[padding] * (whole - len(inputs))]
    with jax.enable_x64(dtype == "float64"):
        stacked = {k: np.stack([x[k] for x in inputs]) for k in padding}
        cast = {k: v.astype(dtype) if v.dtype.kind == "f" else v for k, v in stacked.items()}
        arrays = {k: jnp.asarray(v) for k, v in cast.items()}
        (values, sums), gradients = jax.device_get((jax.jit(run) if layout.jit else run)(arrays))
    assert values.dtype == dtype
    assert set(sums) == set(sum_names(config))
    for gradient in gradients:
        assert not gradient[~stacked["mask"]].any()  # NaN would count as something
    return [
        (values[i], {k: v[i] for k, v in sums.items()}, gradients[0][i], gradients[1][i])
        for i in range(whole)
    ]


def trajectory(episode: Episode, number: int) -> Trajectory:
    sources = np.where(episode.mask, TokenSource.SAMPLED, TokenSource.OBSERVATION)
    return Trajectory(
        question=Question(id=str(episode.group), text="?", answers=("a",)),
        attempt=0,
        sample=number,
        weights_version=0,
        token_ids_T=np.arange(1, 1 + len(sources), dtype=np.int32),
        sources_T=sources.astype(np.int8),
        logprobs_T=episode.drawn.astype(np.float32),
        drawn_logprobs_T=episode.drawn.astype(np.float32),
        segments=(),
        searches=(),
        stop_reason=StopReason.ANSWER,
    )


def laid(packed: Packed, values: Sequence[np.ndarray]) -> list[np.ndarray]:
    """`Packed.scatter`, but in float64 and with NaN where no episode is."""
    arrays = [np.full(b.tokens_BT.shape, np.nan) for b in packed.batches]
    for place, value in zip(packed.places, values, strict=True):
        arrays[place.batch][place.row, place.columns] = value
    return arrays
