"""A published model, SmolLM2-135M-Instruct, through our loader, forward pass and engine."""

import functools

import jax
import numpy as np
import pytest
import torch
import transformers

from r1s_jax.engine.engine import Engine
from r1s_jax.engine.sampling import SamplingConfig
from r1s_jax.engine.state import EngineConfig
from r1s_jax.models import hf
from r1s_jax.models.families import read_config
from r1s_jax.protocol.tokenizer import Tokenizer
from r1s_jax.sharding import MeshConfig, make_mesh
from tests import real, tiny
from tests.turns import play_turn

QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "Why is the sky blue?",
    "Translate 'good morning' into Spanish.",
    "What is 12 times 12?",
    "Who wrote Hamlet?",
    "Write one sentence about the sea.",
    "How many legs has a spider, and how many an ant?",
)
NEW = 64


@pytest.fixture(scope="module")
def smol():
    """(config, tokenizer, params, prompts) of ours, and transformers' model."""
    folder = real.smollm2()
    config = read_config(folder)
    tokenizer = Tokenizer.load(folder, vocab_size=config.vocab_size)
    ask = lambda text: tokenizer.chat_text([{"role": "user", "content": text}])  # noqa: E731
    prompts = [tokenizer.encode_template(ask(text), "", "") for text in QUESTIONS]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    params = hf.load_params(folder, config, make_mesh(MeshConfig()))
    return config, tokenizer, params, prompts, theirs


def test_logits(smol):
    """transformers' logits to 1e-3 at every position of eight prompts."""
    config, _, params, prompts, theirs = smol
    tokens = np.zeros((len(prompts), max(map(len, prompts))), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    run = jax.jit(functools.partial(tiny.full_logits, config, scan=True))
    got = np.asarray(run(params, tokens))
    largest = 0.0
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            expected = theirs(torch.tensor([prompt])).logits[0].numpy()
        assert np.abs(expected).max() > 5
        largest = max(largest, float(np.abs(got[row, : len(prompt)] - expected).max()))
    print(f"largest difference of logits {largest:.1e}")
    assert largest < 1e-3


@pytest.mark.slow
def test_greedy_text(smol):
    """The same 64 greedy tokens as transformers on each of eight prompts, from the KV cache."""
    config, tokenizer, params, prompts, theirs = smol
    engine = Engine(
        config,
        EngineConfig(rows=8, context=128),
        mesh=make_mesh(MeshConfig()),
        token_bytes=tokenizer.token_bytes,
        stop_strings=(),
        eos_ids=tokenizer.eos_ids,
    )
    engine.set_weights(params, 0)
    written = [t for t, *_ in play_turn(engine, prompts, SamplingConfig(temperature=0.0), NEW)]
    for prompt, got in zip(prompts, written, strict=True):
        given = torch.tensor([prompt])
        expected = theirs.generate(
            given,
            attention_mask=torch.ones_like(given),
            do_sample=False,
            max_new_tokens=NEW,
            pad_token_id=tokenizer.pad_id,
        )[0, len(prompt) :].tolist()
        assert got == expected, tokenizer.decode(got)
    assert "Paris" in tokenizer.decode(written[0])
    assert sum(map(len, written)) > 4 * NEW
