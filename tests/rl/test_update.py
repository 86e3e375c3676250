"""`Learner.update` as a whole: gradients, moments and parameters after each of two updates.

The gradient by every log-prob and entropy is `reference`'s, in float64; a plain forward pass of
whole rows, one episode each, carries it back to the parameters, and AdamW is written out.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1s_jax.models.decoder import init_params
from r1s_jax.rl.algorithm import AlgorithmConfig
from r1s_jax.types import Segment, TokenSource, Trajectory
from tests import tiny
from tests.rl import reference
from tests.rl.reference import Episode
from tests.rl.test_learner import CONFIG, GROUPS, MODEL, REWARDS, episodes, learner, watch

VOID = 4  # the episode with a turn that neither asks nor answers
CONFIGS = {
    "k1 in the reward": AlgorithmConfig(
        kl="k1",
        kl_weight=0.3,
        importance_cap=1.2,
        sequence_band=(0.5, 2.0),
        llds_weight=0.2,
        entropy_weight=0.05,
        drop_void_turns=True,
    ),
    "k3 in the loss": AlgorithmConfig(
        estimator="grpo",
        ratio="sequence",
        aggregation="token_mean",
        clip_low=0.01,
        clip_high=0.02,
        kl="k3",
        kl_weight=0.3,
        importance_cap=1.5,
        drop_zero_variance=True,
    ),
}


@jax.jit
def forward(params, ids_NT):
    """Log-prob and entropy of every token but the first, which has 0: plain log-softmax."""
    logits = tiny.full_logits(MODEL, params, ids_NT)[:, :-1]
    logprobs = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(logprobs, ids_NT[:, 1:, None], axis=-1)[..., 0]
    entropy = -(jnp.exp(logprobs) * logprobs).sum(-1)
    return tuple(jnp.pad(x, ((0, 0), (1, 0))) for x in (chosen, entropy))


@jax.jit
@jax.grad
def carried_back(params, ids_NT, by_logprob_NT, by_entropy_NT):
    logprobs, entropy = forward(params, ids_NT)
    return (logprobs * by_logprob_NT + entropy * by_entropy_NT).sum()


def padded(arrays) -> np.ndarray:
    """[N, T] of arrays of several lengths, zeros on the right, where no causal row looks."""
    longest = max(map(len, arrays))
    return np.stack([np.pad(a, (0, longest - len(a))) for a in arrays])


def played(params) -> list[Trajectory]:
    """Sampler's log-probs off by a little, what it drew from off by more, and a void turn."""
    rng, made = np.random.default_rng(1), episodes()
    own, _ = forward(params, padded([t.token_ids_T for t in made]))
    for i, t in enumerate(made):
        exact = np.asarray(own[i, : len(t.token_ids_T)])
        made[i] = dataclasses.replace(
            t,
            logprobs_T=exact + rng.normal(0, 0.05, len(exact)).astype(np.float32),
            drawn_logprobs_T=exact + np.float32((0.1, -0.3, 0.9)[i % 3]),
            segments=(Segment(source=TokenSource.SAMPLED, text="hm"),) if i == VOID else (),
        )
    return made


def as_reference(trajectories, old, new, entropy, ref) -> list[Episode]:
    made = []
    for i, t in enumerate(trajectories):
        length = slice(0, len(t.token_ids_T))
        tokens = {"old": old, "new": new, "entropy": entropy, "ref": ref}
        made.append(
            Episode(
                reward=float(REWARDS[i]),
                group=int(GROUPS[i]),
                mask=t.sources_T == TokenSource.SAMPLED,
                drawn=np.float64(t.drawn_logprobs_T),
                void=i == VOID,
                **{k: np.float64(v[i, length]) for k, v in tokens.items()},
            )
        )
    return made


def moments(before, grads):
    """(norm, both moments) by formula."""
    grads = [np.float64(g) for g in jax.tree.leaves(grads)]
    norm = math.sqrt(sum((g**2).sum() for g in grads))
    grads = [g * min(1.0, CONFIG.clip_norm / norm) for g in grads]
    b1, b2 = CONFIG.adam_b1, CONFIG.adam_b2
    old = jax.tree.map(np.float64, before.opt_state[1][0])
    mu = [b1 * m + (1 - b1) * g for m, g in zip(jax.tree.leaves(old.mu), grads, strict=True)]
    nu = [b2 * n + (1 - b2) * g**2 for n, g in zip(jax.tree.leaves(old.nu), grads, strict=True)]
    return norm, mu, nu


def stepped(before, after, count):
    """The parameters that AdamW makes of the moments that were found."""
    b1, b2 = CONFIG.adam_b1, CONFIG.adam_b2
    found = before.params, after.opt_state[1][0].mu, after.opt_state[1][0].nu
    return [
        p - CONFIG.learning_rate * (m / (1 - b1**count)) / (np.sqrt(n / (1 - b2**count)) + 1e-8)
        for p, m, n in zip(*(map(np.float64, jax.tree.leaves(x)) for x in found), strict=True)
    ]


def assert_near(got, expected, share):
    """Leaf by leaf, within a share of the leaf's largest number."""
    for x, y in zip(jax.tree.leaves(got), expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=share * np.abs(y).max())


@pytest.mark.parametrize("name", CONFIGS)
def test_both_updates(name):
    config, params, other = CONFIGS[name], init_params(MODEL, 0), init_params(MODEL, 1)
    trajectories = played(params)
    one = learner(params, algorithm=config, rows=2)  # two or three micro-batches an update
    one.restore({**one.checkpoint(), "reference": other})
    states = watch(one, lambda state: jax.tree.map(np.array, state))
    metrics = one.update(trajectories, REWARDS, GROUPS)

    ids_NT = padded([t.token_ids_T for t in trajectories])
    (old, _), (ref, _) = forward(params, ids_NT), forward(other, ids_NT)
    start = as_reference(trajectories, old, old, old, ref)
    advantages = reference.advantages(config, start)
    assert len(advantages) == metrics["learned_episodes"] == (9 if config.drop_void_turns else 8)
    totals, losses, norms = {}, [], []
    for numbers, (before, after) in zip(
        np.array_split(list(advantages), 2), itertools.pairwise(states), strict=True
    ):
        new, entropy = forward(before.params, ids_NT)
        now = as_reference(trajectories, old, new, entropy, ref)
        minibatch = [now[i] for i in numbers]
        expected = reference.update(
            config,
            minibatch,
            [advantages[i] for i in numbers],
            reference.weights(config, minibatch),
        )
        by_logprob, by_entropy = (np.zeros(ids_NT.shape, np.float32) for _ in range(2))
        for i, *each in zip(numbers, expected.by_logprob, expected.by_entropy, strict=True):
            by_logprob[i, : len(each[0])], by_entropy[i, : len(each[1])] = each
        grads = carried_back(before.params, ids_NT, by_logprob, by_entropy)
        norm, mu, nu = moments(before, grads)
        assert_near(after.opt_state[1][0].mu, mu, 2e-5)
        assert_near(after.opt_state[1][0].nu, nu, 4e-5)
        assert_near(after.params, stepped(before, after, count=len(losses) + 1), 1e-5)
        losses.append(expected.value)
        norms.append(norm)
        totals = {k: totals.get(k, 0.0) + v for k, v in expected.sums.items()}

    sampled = [(i, t) for i in advantages for t in start[i].sampled]
    totals["logprob_gap"] = sum(
        abs(start[i].old[t] - trajectories[i].logprobs_T[t]) for i, t in sampled
    )
    if config.kl == "k1":
        totals["kl_ref"] = sum(start[i].old[t] - start[i].ref[t] for i, t in sampled)
        assert 0 < totals["sequence_masked"] < len(sampled) and totals["llds"] > 0
    assert 0 < totals["clip_fraction"] < len(sampled)
    for key, total in totals.items():
        assert metrics[key] == pytest.approx(total / len(sampled), abs=1e-5), key
    assert metrics["policy_loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert metrics["grad_norm"] == pytest.approx(np.mean(norms), rel=1e-5)
