"""Workload A by tunix's own sampler; runs in tunix's environment, where r1s_jax need not be.

    python tunix_sampler.py --folder WEIGHTS --prompts IDS.npy --new 128 --cache 1024

Its fast path: f32, one jitted prefill and one jitted loop over all steps with the cache donated,
temperature 1 without top-p or top-k, prompts of one length and so without padding. Ids outside
the vocabulary stand for padding and for the end of a text, so that every row writes all its
tokens.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from protocol import serve
from tunix.generate.sampler import CacheConfig, Sampler
from tunix_model import load_model


class Ids:
    """A tokenizer whose text is the ids, written in digits."""

    def __init__(self, vocab_size: int):
        self._vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> None:
        return None

    def pad_id(self) -> int:
        return self._vocab_size

    def eos_id(self) -> int:
        return self._vocab_size + 1


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="[rows, length] ids, .npy")
    parser.add_argument("--new", type=int, required=True)
    parser.add_argument("--cache", type=int, required=True)
    args = parser.parse_args()
    config, model = load_model(args.folder)
    cache = CacheConfig(
        cache_size=args.cache,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )
    sampler = Sampler(model, Ids(config.vocab_size), cache)
    prompts = np.load(args.prompts)
    texts = [" ".join(map(str, row)) for row in prompts]
    seeds = itertools.count()

    def run() -> dict[str, Any]:
        begin = time.perf_counter()
        made = sampler(
            texts,
            args.new,
            max_prompt_length=prompts.shape[1],
            temperature=1.0,
            top_p=1.0,
            seed=next(seeds),
            return_logprobs=True,  # training needs them; they cost nothing measurable
        )
        seconds = time.perf_counter() - begin
        tokens = sum(len(ids) for ids in made.tokens)
        assert tokens == len(texts) * args.new, f"{tokens} tokens were written"
        return {
            "seconds": seconds,
            "tokens": tokens,
            "episodes": len(texts),
            "prefilled": prompts.size,
            "prefilled_padded": prompts.size,
            "context": prompts.size + tokens,
        }

    for _ in range(3):
        run()
    serve({"ready": "tunix", "jax": jax.__version__}, {"run": run})


if __name__ == "__main__":
    main()
