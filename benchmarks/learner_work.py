"""What the workloads of benchmarks/learner.py consist of: models, episodes, counts of FLOPs."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int
from rollout_work import DATA, SMALL_QWEN2

from r1s_jax.models.decoder import DecoderConfig
from r1s_jax.protocol.prompts import BasePrompt
from r1s_jax.protocol.tags import BEGIN_DOCUMENTS, END_DOCUMENTS
from r1s_jax.protocol.tokenizer import Tokenizer
from r1s_jax.types import Question, StopReason, TokenSource, Trajectory, UserError

TRANSCRIPTS = "released_hotpotqa_qwen.jsonl"
SAMPLES = 4  # of a question

# As benchmarks/rollout.py's workload A, but for heads of 64 and a wider MLP.
LEARNER_QWEN2 = {**SMALL_QWEN2, "num_attention_heads": 4, "intermediate_size": 1024}

# Workload A: rows of one episode each, as the peer has it.
A_ROWS, A_TOKENS, A_PROMPT = 16, 512, 64


def small_qwen2(layers: int = 4, vocab_size: int = SMALL_QWEN2["vocab_size"]) -> DecoderConfig:
    """The model of workload A, or one like it."""
    c = LEARNER_QWEN2
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=c["hidden_size"],
        intermediate_size=c["intermediate_size"],
        num_hidden_layers=layers,
        num_attention_heads=c["num_attention_heads"],
        num_key_value_heads=c["num_key_value_heads"],
        head_dim=c["hidden_size"] // c["num_attention_heads"],
        rope_theta=c["rope_theta"],
        rms_norm_eps=c["rms_norm_eps"],
        tie_word_embeddings=c["tie_word_embeddings"],
        attention_bias=True,
    )


def matmul_params(model: DecoderConfig) -> tuple[int, int]:
    """Parameters that every token is multiplied by: the layers', and the vocabulary's."""
    d, h = model.hidden_size, model.head_dim
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    of_layer = 2 * d * heads * h + 2 * d * kv_heads * h + 3 * d * model.intermediate_size
    return model.num_hidden_layers * of_layer, d * model.vocab_size


def gradient_flops(
    model: DecoderConfig, lengths: Sequence[int], *, causal: bool = True
) -> dict[str, float]:
    """A gradient's FLOPs by part, nothing computed twice: `layers`, `vocabulary`, `attention`.

    6 per matmul parameter and token. Attention: 12 per layer, query head, its width, query and key
    of the same episode; with `causal` only for keys at or before the query, else for all.
    """
    layers, vocabulary = matmul_params(model)
    tokens = sum(lengths)
    pairs = sum(n * (n + 1) // 2 if causal else n * n for n in lengths)
    width = model.num_attention_heads * model.head_dim
    return {
        "layers": 6.0 * layers * tokens,
        "vocabulary": 6.0 * vocabulary * tokens,
        "attention": 12.0 * model.num_hidden_layers * width * pairs,
    }


def make_trajectory(
    number: int, token_ids_T: Int[np.ndarray, " T"], sampled_T: Bool[np.ndarray, " T"]
) -> Trajectory:
    """Episode `number` of a rollout of SAMPLES a question; log-probs of the sampler unknown: 0."""
    zeros_T = np.zeros(len(token_ids_T), np.float32)
    return Trajectory(
        question=Question(id=str(number // SAMPLES), text="?", answers=("a",)),
        attempt=0,
        sample=number % SAMPLES,
        weights_version=0,
        token_ids_T=token_ids_T.astype(np.int32),
        sources_T=np.where(sampled_T, TokenSource.SAMPLED, TokenSource.PROMPT).astype(np.int8),
        logprobs_T=zeros_T,
        drawn_logprobs_T=zeros_T,
        segments=(),
        searches=(),
        stop_reason=StopReason.ANSWER,
    )


def full_rows(model: DecoderConfig, rows: int, tokens: int, prompt: int) -> list[Trajectory]:
    """Episodes of `tokens` random tokens, all behind the prompt sampled."""
    ids = np.random.default_rng(8).integers(0, model.vocab_size, (rows, tokens))
    return [make_trajectory(i, row, np.arange(tokens) >= prompt) for i, row in enumerate(ids)]


def coin_rewards(count: int) -> tuple[Float[np.ndarray, " N"], Int[np.ndarray, " N"]]:
    """Rewards 0 or 1, both in every question, and the questions' numbers."""
    numbers = np.arange(count)
    first = numbers % SAMPLES <= (numbers // SAMPLES) % (SAMPLES - 1)
    return first.astype(np.float64), numbers // SAMPLES


def transcript_masks(tokenizer: Tokenizer, folder: Path = DATA) -> list[Bool[np.ndarray, " T"]]:
    """Of every released transcript of the Qwen2.5 policy: which tokens it sampled, prompt first.

    The text is cut where documents begin and end, and each part tokenised by itself. Raises
    UserError where the file is not there.
    """
    path = folder / TRANSCRIPTS
    if not path.is_file():
        raise UserError(f"{path}: not there; see benchmarks/rollout_work.py, or --data FOLDER")
    block = re.compile(rf"({re.escape(BEGIN_DOCUMENTS)}.*?{re.escape(END_DOCUMENTS)}\s*)", re.S)
    masks = []
    for line in path.read_text("utf-8").splitlines():
        row = json.loads(line)
        parts = block.split(row["gen_text_store"])
        lengths = [len(ids) for ids in tokenizer.encode_batch(parts)]
        prompt = len(BasePrompt().prompt_ids(tokenizer, row["question"]))
        # Sampled text and documents in turn.
        sampled = [i % 2 == 0 for i in range(len(parts))]
        masks.append(np.repeat([False, *sampled], [prompt, *lengths]))
    return masks


def drawn_episodes(
    model: DecoderConfig, masks: Sequence[Bool[np.ndarray, " T"]], count: int, seed: int
) -> list[Trajectory]:
    """`count` different ones of the masks, with random tokens."""
    rng = np.random.default_rng(seed)
    chosen = [masks[i] for i in rng.permutation(len(masks))[:count]]
    return [
        make_trajectory(i, rng.integers(0, model.vocab_size, len(mask_T)), mask_T)
        for i, mask_T in enumerate(chosen)
    ]
