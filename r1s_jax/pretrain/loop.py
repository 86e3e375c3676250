"""Pre-training of the tiny base policy: tokenizer, then plain next-token loss, then export."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Bool, Float, Int
from optax.contrib import MuonDimensionNumbers, muon

from r1s_jax.models.decoder import DecoderConfig, Params, init_params
from r1s_jax.models.logprobs import token_logprobs
from r1s_jax.protocol.tokenizer import Tokenizer
from r1s_jax.types import Segment, TokenSource

END_OF_TEXT = "<|endoftext|>"
CONTROL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>")

# Runs of letters (with one sign before them), single digits, runs of signs, white space: the
# classes of the byte-level tokenizers that the protocol's tags meet in practice.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """One optimizer step is `lessons` texts, sorted by length into micro-batches."""

    vocab_size: int = 1024
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    tokenizer_texts: int = 20_000
    lessons: int = 64
    rows: int = 8
    length_buckets: tuple[int, ...] = (48, 64, 128, 192, 224, 256, 288, 384)
    steps: int = 3000
    learning_rate: float = 3e-3  # of Adam: embeddings, norms, biases
    muon_learning_rate: float = 0.02  # of the layers' matrices
    warmup_steps: int = 100
    weight_decay: float = 0.01
    seed: int = 0

    @property
    def decoder(self) -> DecoderConfig:
        return DecoderConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            tie_word_embeddings=True,
            attention_bias=True,
            max_position_embeddings=2048,
        )


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Trains a byte-level BPE tokenizer and writes it as a Hugging Face folder."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lesson:
    """Token ids of a text, and which of them the loss counts: all but retrieved documents, so
    that the base does not learn to write documents itself."""

    ids: list[int]
    counted: list[bool]


def encode_lessons(tokenizer: Tokenizer, texts: Sequence[Sequence[Segment]]) -> list[Lesson]:
    """Each segment is tokenised by itself, as in a rollout; the end-of-text token closes it."""
    pieces = iter(tokenizer.encode_batch([s.text for text in texts for s in text]))
    lessons = []
    for text in texts:
        ids: list[int] = []
        counted: list[bool] = []
        for segment in text:
            piece = next(pieces)
            ids += piece
            counted += [segment.source != TokenSource.OBSERVATION] * len(piece)
        lessons.append(Lesson(ids=[*ids, tokenizer.eos_ids[0]], counted=[*counted, True]))
    return lessons


def micro_batches(
    config: PretrainConfig, lessons: Sequence[Lesson]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (tokens, counted), both [rows, T], longest first, each padded to its own bucket."""
    ordered = sorted(lessons, key=lambda lesson: len(lesson.ids), reverse=True)
    longest = config.length_buckets[-1]
    for start in range(0, len(ordered), config.rows):
        rows = ordered[start : start + config.rows]
        bucket = min(b for b in config.length_buckets if b >= min(len(rows[0].ids), longest))
        tokens = np.zeros((config.rows, bucket), np.int32)
        counted = np.zeros((config.rows, bucket), bool)
        for row, lesson in enumerate(rows):
            length = min(len(lesson.ids), bucket)
            tokens[row, :length] = lesson.ids[:length]
            counted[row, 1:length] = lesson.counted[1:length]  # nothing predicts the first
        yield tokens, counted


def next_token_loss(
    model: DecoderConfig,
    params: Params,
    tokens_BT: Int[Array, "B T"],
    counted_BT: Bool[Array, "B T"],
    total: Float[Array, ""],
) -> Float[Array, ""]:
    """Sum of −log p over the counted tokens, over `total`."""
    logprobs_BT, _ = token_logprobs(model, params, tokens_BT)
    return -jnp.where(counted_BT, logprobs_BT, 0.0).sum() / total


def make_optimizer(config: PretrainConfig) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) on the layers' matrices, Adam on the rest, after clipping."""

    def schedule(peak: float) -> optax.Schedule:
        return optax.warmup_cosine_decay_schedule(
            0.0, peak, config.warmup_steps, config.steps, 0.02 * peak
        )

    def matrices(params: Params) -> Any:
        """Which axes Muon multiplies: kernels are [L, in, out], orthogonalised per layer."""
        dims = MuonDimensionNumbers(reduction_axis=1, output_axis=2)
        return jax.tree.map_with_path(
            lambda path, _: dims if jax.tree_util.keystr(path[-1:]).endswith("kernel']") else None,
            params,
        )

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(
            schedule(config.muon_learning_rate),
            weight_decay=config.weight_decay,
            adam_b2=0.98,
            adam_learning_rate=schedule(config.learning_rate),
            muon_weight_dimension_numbers=matrices,  # type: ignore[arg-type]
        ),
    )


def pretrain(
    config: PretrainConfig,
    lessons: Callable[[int], Sequence[Lesson]],
    report: Callable[[int, dict[str, float], Params], None],
    *,
    every: int = 50,
) -> Params:
    """Trains from scratch and returns the parameters.

    `lessons(n)` draws the next n texts; `report` gets the step, its figures and the parameters
    every `every` steps.
    """
    model = config.decoder
    params = init_params(model, config.seed)
    optimizer = make_optimizer(config)
    opt_state = optimizer.init(params)

    @jax.jit
    def accumulate(grads: Params, loss: Array, params: Params, *batch: Any) -> tuple[Params, Array]:
        value, new = jax.value_and_grad(lambda p: next_token_loss(model, p, *batch))(params)
        return jax.tree.map(jnp.add, grads, new), loss + value

    @jax.jit
    def update(params: Params, opt_state: Any, grads: Params) -> tuple[Params, Any]:
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state  # type: ignore[return-value]

    zeros = jax.tree.map(jnp.zeros_like, params)
    start, losses = time.perf_counter(), []
    for step in range(1, config.steps + 1):
        batches = list(micro_batches(config, lessons(config.lessons)))
        total = np.float32(sum(counted.sum() for _, counted in batches))
        grads, loss = zeros, jnp.float32(0.0)
        for batch in batches:
            grads, loss = accumulate(grads, loss, params, *batch, total)
        params, opt_state = update(params, opt_state, grads)
        losses.append(loss)
        if step % every == 0 or step == config.steps:
            seconds = (time.perf_counter() - start) / step
            report(step, {"loss": float(np.mean(losses)), "seconds_per_step": seconds}, params)
            losses = []
    return params
