"""Small byte-level BPE tokenizers, trained in memory, with the added tokens of the real ones."""

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from r1s_jax.protocol.tags import PROTOCOL_TAGS
from r1s_jax.protocol.tokenizer import Tokenizer

CORPUS = [
    "User:Which country is Zürich in?\nAssistant: <think> I look it up.\n\n",
    "<|begin_of_query|> Zürich <|end_of_query|><|begin_of_documents|>\n(1)Title: Zürich Text: a",
    "<|end_of_documents|>\n\n</think>\n\n<answer> Switzerland </answer> 北京 naïve café >\n\n",
] * 4

# As Qwen3 has them (<think> is single and not special), plus awkward ones.
QWEN_LIKE = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>")
CHAT = (
    "{{ bos_token or '' }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] |"
    " trim }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% endif %}{# {{ date_string }} #}"
)


def train(
    added=QWEN_LIKE,
    *,
    bos=None,
    in_vocab=False,
    normalized=False,
    ignore_merges=False,
    **token_options,
):
    """A PreTrainedTokenizerFast of about 400 ids; `in_vocab` puts the added ones into the BPE's."""
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(added) if in_vocab else [],
    )
    backend.train_from_iterator(CORPUS, trainer)
    if not in_vocab:
        backend.add_tokens(
            [
                tokenizers.AddedToken(
                    t,
                    special=t not in ("<think>", "</think>", "<tool_call>"),
                    normalized=normalized,
                    **token_options,
                )
                for t in added
            ]
        )
    if bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>" if "<|im_end|>" in added else None,
        bos_token=bos,
        chat_template=CHAT,
    )


@pytest.fixture(scope="session")
def qwen() -> Tokenizer:
    """No BOS, `<think>` single."""
    return Tokenizer(train())


@pytest.fixture(scope="session")
def llama() -> Tokenizer:
    """Adds a BOS itself, and its chat template writes one."""
    return Tokenizer(train(("<|begin_of_text|>", *QWEN_LIKE[:3]), bos="<|begin_of_text|>"))


@pytest.fixture(scope="session")
def awkward() -> Tokenizer:
    """Tokens that swallow white space, match normalised text, hold spaces, or are protocol tags."""
    added = ("[PAD]", "<s>", "<end of turn>", "madeupword0", "<|im_end|>", *PROTOCOL_TAGS)
    return Tokenizer(train(added, lstrip=True, rstrip=True, normalized=True))


@pytest.fixture(scope="session", params=["qwen", "llama", "awkward"])
def any_tokenizer(request) -> Tokenizer:
    """Each of the three in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def train_fast():
    """The builder itself."""
    return train
