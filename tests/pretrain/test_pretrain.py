"""The base's lessons, their batches, and the step that learns from them."""

import dataclasses

import jax
import numpy as np
import pytest

from r1s_jax.data.atlas import load_world
from r1s_jax.models.decoder import init_params
from r1s_jax.pretrain.loop import (
    PretrainConfig,
    encode_lessons,
    make_optimizer,
    micro_batches,
    pretrain,
    train_tokenizer,
)
from r1s_jax.pretrain.text import Habits, TranscriptWriter
from r1s_jax.protocol.tags import ANSWER_CLOSE, ANSWER_OPEN, BEGIN_QUERY
from r1s_jax.protocol.tokenizer import Tokenizer
from r1s_jax.types import TokenSource

CONFIG = PretrainConfig(
    vocab_size=300,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    lessons=5,
    rows=2,
    length_buckets=(64, 512),
    steps=12,
    warmup_steps=2,
)


@pytest.fixture(scope="module")
def world():
    return load_world()


@pytest.fixture(scope="module")
def tokenizer(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    writer = TranscriptWriter(world, documents=2, seed=3)
    texts = ("".join(s.text for s in writer.draw()) for _ in range(50))
    train_tokenizer(texts, CONFIG.vocab_size, folder)
    return Tokenizer.load(folder)


def texts(world, count, seed=0, **habits):
    writer = TranscriptWriter(world, documents=2, seed=seed, habits=Habits(**habits))
    return [writer.draw() for _ in range(count)]


def test_the_seed_decides_the_lessons(world):
    assert texts(world, 5) == texts(world, 5)
    assert texts(world, 5) != texts(world, 5, seed=1)


def test_only_base_countries_are_named(world):
    """Nothing of the countries that are trained or evaluated on can be learnt beforehand."""
    told = "\n".join(s.text for text in texts(world, 400, made_up=0.0) for s in text)
    named = dict.fromkeys(("base", "train", "eval"), 0)
    for code, split in world.split.items():
        answer = f"{ANSWER_OPEN} {world.countries[code].name}{ANSWER_CLOSE}"
        named[split] += answer in told
    assert named["base"] > 20 and named["train"] == named["eval"] == 0, named


def test_searching_is_a_minority_habit(world):
    transcripts = texts(world, 600, exercise=0.0)
    searching = [t for t in transcripts if any(BEGIN_QUERY in s.text for s in t)]
    assert 0.17 < len(searching) / len(transcripts) < 0.27  # Habits.search is 0.22
    assert all(any(s.source == TokenSource.OBSERVATION for s in t) for t in searching)


def test_documents_are_read_and_not_learnt(world, tokenizer):
    text = next(t for t in texts(world, 50, exercise=0.0, search=1.0) if len(t) >= 3)
    (lesson,) = encode_lessons(tokenizer, [text])
    assert tokenizer.decode(lesson.ids[:-1]) == "".join(s.text for s in text)
    assert lesson.ids[-1] == tokenizer.eos_ids[0]
    learnt = [i for i, counted in zip(lesson.ids, lesson.counted, strict=True) if counted]
    kept = "".join(s.text for s in text if s.source != TokenSource.OBSERVATION)
    assert tokenizer.decode(learnt[:-1]) == kept


def test_batches_hold_every_lesson_once(world, tokenizer):
    lessons = encode_lessons(tokenizer, texts(world, CONFIG.lessons))
    batches = list(micro_batches(CONFIG, lessons))
    assert [b.shape[1] in CONFIG.length_buckets for b, _ in batches] == [True] * 3
    rows = [
        (tokens[counted].tolist())
        for batch in batches
        for tokens, counted in zip(*batch, strict=True)
        if counted.any()
    ]
    wanted = [
        [i for i, c in zip(x.ids[1:512], x.counted[1:512], strict=True) if c] for x in lessons
    ]
    assert sorted(rows) == sorted(wanted)  # the first token is predicted by nothing


@pytest.mark.slow
def test_muon_takes_the_matrices_and_adam_the_rest():
    """Muon's updates of a layer's matrix are orthogonal, whatever the gradient's scale."""
    params = init_params(CONFIG.decoder, 0)
    optimizer = make_optimizer(dataclasses.replace(CONFIG, weight_decay=0.0))
    state = optimizer.init(params)
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda p: rng.choice([-1.0, 1.0], p.shape).astype(np.float32), params)
    for _ in range(3):  # the schedule begins at 0
        updates, state = optimizer.update(grads, state, params)
    for update in updates["layers"]["q_kernel"]:
        singular = np.linalg.svd(update, compute_uv=False)
        assert singular.max() / singular.min() < 2.5  # the gradient's own: over 15
    moved = np.abs(updates["embedding"])
    np.testing.assert_allclose(moved, moved.max(), rtol=1e-3)  # Adam on a constant gradient


@pytest.mark.slow
def test_the_loss_falls_and_the_seed_decides_the_weights(world, tokenizer):
    def run():
        writer = TranscriptWriter(world, documents=2, seed=0)
        seen = []
        params = pretrain(
            CONFIG,
            lambda n: encode_lessons(tokenizer, [writer.draw() for _ in range(n)]),
            lambda step, figures, _: seen.append((step, figures["loss"])),
            every=6,
        )
        return params, seen

    params, seen = run()
    (_, early), (last, late) = seen
    assert last == CONFIG.steps and early < np.log(CONFIG.vocab_size) + 0.5 and late < early - 0.3
    again, _ = run()
    jax.tree.map(np.testing.assert_array_equal, params, again)
