"""Workload B by the loop that everyone writes, on transformers' `generate`.

    python transformers_loop.py --model FOLDER --episodes SCRIPTS.jsonl --batch 16 --threads 2

A batch of texts, padded on the left, is continued until its longest turn is over; documents are
appended to the texts, which are tokenised and prefilled again from the beginning. Each row keeps
the tokens its script asks for, the others in the batch go on. `run START COUNT BATCH` plays a part
of the episodes in batches of another size. Chosen for this loop's good: its attention by torch's
fused kernel and its dynamic cache, both quicker here than what else transformers offers.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

# Read when torch is loaded. With threads that spin while they wait, a step takes six to ten times
# as long as soon as another program wants a core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from protocol import serve
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast


class Loop:
    """Model, tokenizer and what was counted while episodes were played."""

    def __init__(self, folder: Path):
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, padding_side="left")
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        # Whatever is not said in a call is taken from here: nothing may end a turn early.
        self.model.generation_config = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=None,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        self.counts = dict.fromkeys(("tokens", "prefilled", "prefilled_padded", "context"), 0)

    def play(self, episodes: list[dict[str, Any]]) -> None:
        """Plays one batch to its end."""
        texts = [episode["prompt"] for episode in episodes]
        turns = len(episodes[0]["lengths"])
        for turn in range(turns):
            lengths = [episode["lengths"][turn] for episode in episodes]
            inputs = self.tokenizer(
                texts, return_tensors="pt", padding=True, add_special_tokens=False
            )
            # The rows' stops are known beforehand, so the longest of them is the batch's.
            longest = max(lengths)
            written = self.model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=longest,
            )
            width = inputs["input_ids"].shape[1]
            assert written.shape[1] == width + longest, "a turn has ended early"
            new = [row[width : width + n] for row, n in zip(written, lengths, strict=True)]
            for row, text in enumerate(self.tokenizer.batch_decode(new)):
                texts[row] += text
                if turn < turns - 1:
                    texts[row] += episodes[row]["observations"][turn]
            real = int(inputs["attention_mask"].sum())
            self.counts["tokens"] += sum(lengths)
            self.counts["prefilled"] += real
            self.counts["prefilled_padded"] += inputs["input_ids"].numel()
            if turn == turns - 1:
                self.counts["context"] += real + sum(lengths)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--episodes", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    episodes = [json.loads(line) for line in args.episodes.read_text("utf-8").splitlines()]
    loop = Loop(args.model)

    def run(
        start: str = "0", count: str = str(len(episodes)), batch: str = str(args.batch)
    ) -> dict[str, Any]:
        loop.counts = dict.fromkeys(loop.counts, 0)
        chosen, size = episodes[int(start) : int(start) + int(count)], int(batch)
        begin = time.perf_counter()
        with torch.inference_mode():
            for first in range(0, len(chosen), size):
                loop.play(chosen[first : first + size])
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "episodes": len(chosen), **loop.counts}

    few = [{**episode, "lengths": [2] * len(episode["lengths"])} for episode in episodes[:2]]
    with torch.inference_mode():
        loop.play(few)
    serve({"ready": "transformers", "torch": torch.__version__}, {"run": run})


if __name__ == "__main__":
    main()
