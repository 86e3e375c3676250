"""The smallest policy that plays whole episodes, shared by the tests of models, engine and rollout.

A byte-level BPE with a handful of merges, and a decoder of two layers whose weights are random but
for a few features that make it write the protocol: after `<|` it likes `begin` or `end`, after
those `_of_`, and so on. So it queries, answers, invents documents, and now and then just stops.
"""

import dataclasses
import functools

import jax
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from r1s_jax.engine.engine import Engine
from r1s_jax.engine.sampling import SamplingConfig
from r1s_jax.engine.state import EngineConfig
from r1s_jax.models.attention import causal_attend
from r1s_jax.models.decoder import DecoderConfig, bind, init_params
from r1s_jax.protocol.prompts import BasePrompt
from r1s_jax.protocol.tokenizer import Tokenizer
from r1s_jax.rollout.episode import STOP_STRINGS
from r1s_jax.sharding import MeshConfig, make_mesh
from r1s_jax.types import Document, Question

WORDS = (
    *("<|", "x<|", "|>", "|>\n", ">\n", "</"),
    *("begin", "end", "query", "answer", "_of_", "documents"),
)
EOS, IM_END = "<|endoftext|>", "<|im_end|>"
# (after one of these, one of those becomes likely), each a feature of its own.
CHAIN = (
    (("<|",), {"begin": 4.4, "end": 2.4}),
    (("x<|",), {"end": 4.0}),
    (("begin", "end"), {"_of_": 4.0}),
    (("_of_",), {"query": 4.4, "documents": 2.7}),
    (("query", "documents"), {"|>": 3.5, "|>\n": 3.5}),
    (("|>", "|>\n"), {"x<|": 2.8}),
    (("</",), {"answer": 4.0}),
    (("answer",), {">": 3.5, ">\n": 3.5}),
)
ALWAYS = {"<|": 4.0, "x<|": 2.0, "</": 1.5, EOS: 1.5}

# 312 is no multiple of the sampler's blocks of 32, and holds ids that no text has.
MODEL = DecoderConfig(
    vocab_size=312,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    attention_bias=True,
    max_position_embeddings=256,
)
CONFIG = EngineConfig(rows=4, chunk=6, context=176, page=16, extend_rows=4, extend_tokens=12)
SAMPLED = SamplingConfig()
# Greedy, and it can neither ask nor name documents: the controls of an evaluation.
BANNED = SamplingConfig(temperature=0.0, banned=("_query|>", "_documents"))
PROMPT = BasePrompt(template="{question}\n<think>")
DOCUMENTS = tuple(Document(id=f"d{i}", title=f"T{i}", text="ab" * (3 * i + 1)) for i in range(3))


def question(name: str, text: str = "") -> Question:
    return Question(id=name, text=text or name, answers=("x",))


QUESTIONS = tuple(
    question(name, text)
    for name, text in {"a": "", "b": "bb?", "c": "a longer one", "d": "", "e": ""}.items()
)


def full_logits(model, params, tokens_BT, *, scan=False):
    """Logits [B, T, V] of one full forward pass; rows are padded on the right, if at all."""
    decoder = bind(model, params)
    positions = jax.numpy.broadcast_to(jax.numpy.arange(tokens_BT.shape[1]), tokens_BT.shape)
    attend = causal_attend(tokens_BT.shape[1])
    return decoder.unembed(decoder(tokens_BT, positions, attend, scan=scan)[0])


@functools.cache
def fast_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, every beginning of each of WORDS, and two added tokens."""
    spell = {b: c for c, b in _alphabet().items()}
    vocab = {c: i for i, c in enumerate(_alphabet())}
    merges = []
    for word in WORDS:
        text = "".join(spell[b] for b in word.encode())
        for end in range(2, len(text) + 1):
            if text[:end] not in vocab:
                vocab[text[:end]] = len(vocab)
                merges.append((text[: end - 1], text[end - 1]))
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([EOS, IM_END])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, pad_token=EOS)


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer(fast_tokenizer(), vocab_size=MODEL.vocab_size)


def token_id(text: str) -> int:
    """The id whose bytes are `text`."""
    return tokenizer().token_bytes.index(text.encode())


@functools.cache
def params():
    """Weights of the policy, on the default device."""
    tree = jax.tree.map(np.array, init_params(MODEL, 0))
    features = len(CHAIN) + 1
    rng = np.random.default_rng(0)
    shape = tree["embedding"].shape
    tree["embedding"] = rng.normal(0, 0.5, shape).astype(np.float32)
    tree["lm_head"] = rng.normal(0, 0.25, shape).astype(np.float32)
    for name in ("q_bias", "k_bias", "v_bias"):
        bias = tree["layers"][name]
        tree["layers"][name] = rng.normal(0, 0.3, bias.shape).astype(np.float32)
    for name in ("o_kernel", "down_kernel"):
        tree["layers"][name] *= 2  # texts that depend on what is in the cache, from the first layer
        tree["layers"][name][..., :features] = 0
    for table in ("embedding", "lm_head"):
        tree[table][:, :features] = 0
    tree["embedding"][:, 0] = 1
    for text, weight in ALWAYS.items():
        tree["lm_head"][token_id(text), 0] = weight
    for feature, (before, after) in enumerate(CHAIN, start=1):
        for text in before:
            tree["embedding"][token_id(text), feature] = 3
        for text, weight in after.items():
            tree["lm_head"][token_id(text), feature] = weight
    return jax.tree.map(jax.numpy.asarray, tree)


def new_engine(
    *, mesh: MeshConfig | None = None, stop_strings=STOP_STRINGS, scale_ids=(), **changes
) -> Engine:
    """An engine with the policy's weights; `changes` are fields of EngineConfig."""
    engine = Engine(
        MODEL,
        dataclasses.replace(CONFIG, **changes),
        mesh=make_mesh(mesh or MeshConfig()),
        token_bytes=tokenizer().token_bytes,
        stop_strings=stop_strings,
        eos_ids=tokenizer().eos_ids,
        scale_ids=scale_ids,
    )
    engine.set_weights(params(), 7)
    return engine


@functools.cache
def engine() -> Engine:
    """The engine most tests use; each leaves its slots idle."""
    return new_engine()


def _alphabet() -> dict[str, int]:
    from r1s_jax.protocol.tokenizer import byte_alphabet

    return byte_alphabet()
