import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from r1s_jax.protocol.tokenizer import Tokenizer, byte_alphabet
from r1s_jax.types import UserError

TEXTS = ("", "User:Which?\nAssistant: ", " Zürich\t北京\r\n\n🎉 >\n\n", "\x00\x7f\u00a0\u2028 a")


def test_round_trip_and_agreement_with_the_backend(any_tokenizer):
    for text in TEXTS:
        ids = any_tokenizer.encode(text)
        assert any_tokenizer.decode(ids) == text
        assert any_tokenizer.decode_bytes(np.array(ids, np.int32)) == text.encode()
        assert ids == any_tokenizer._control.encode(text, add_special_tokens=False).ids
        # The library's own decoder agrees.
        assert any_tokenizer._control.decode(ids, skip_special_tokens=False) == text


def test_byte_alphabet_is_a_bijection_known_at_its_corners():
    table = byte_alphabet()
    assert sorted(table.values()) == list(range(256))
    assert (table["Ġ"], table["Ċ"], table["A"], table["Ń"]) == (0x20, 0x0A, 0x41, 0xAD)


def test_text_never_becomes_an_added_token(any_tokenizer):
    for token in any_tokenizer.added_tokens:
        text = f"a {token} b{token}"
        ids = any_tokenizer.encode(text)
        literal = [i for i, b in enumerate(any_tokenizer.token_bytes) if b == token.encode()]
        assert len(literal) == 1 and literal[0] not in ids
        assert any_tokenizer.decode(ids) == text
        assert any_tokenizer.decode(literal) == token


@pytest.mark.parametrize("ignore_merges", [False, True])  # True in Llama 3: whole words first
def test_not_even_where_added_tokens_are_part_of_the_bpe_vocabulary(train_fast, ignore_merges):
    added = ("<|im_end|>", "zz", "<answer>")
    tokenizer = Tokenizer(train_fast(added, in_vocab=True, ignore_merges=ignore_merges))
    assert set(tokenizer.added_tokens) == {"<|im_end|>", "zz", "<answer>"}
    ids = tokenizer.encode("<|im_end|>zz<answer> zz")
    assert not {0, 1, 2} & set(ids)
    assert tokenizer.decode(ids) == "<|im_end|>zz<answer> zz"


def test_bytes_that_the_vocabulary_cannot_spell(train_fast):
    """SmolLM2's lacks some control characters. Bug: it was refused, though no text needs them.

    They read as question marks: left out, the halves of a tag around one would fall together.
    """
    fast = train_fast()
    spec = json.loads(fast.backend_tokenizer.to_str())
    gone = {char for char, byte in byte_alphabet().items() if byte in (0x04, 0xF2, 0xFF)}
    kept = [t for t in spec["model"]["vocab"] if not gone & set(t)]
    spec["model"]["vocab"] = {t: i for i, t in enumerate(kept)}
    spec["model"]["merges"] = [m for m in spec["model"]["merges"] if not gone & set("".join(m))]
    spec["added_tokens"] = []
    backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert tokenizer.decode(tokenizer.encode("<|end_of\x04_query|> \U00080000 ü")) == (
        "<|end_of?_query|> ? ü"
    )
    assert tokenizer.encode_batch(["a\x04"]) == [tokenizer.encode("a?")]
    assert tokenizer.encode_template("User:", "\x04", "\n") == tokenizer.encode("User:?\n")


def test_half_a_character_decodes_to_the_replacement(qwen):
    ids = [qwen.token_bytes.index(bytes([b])) for b in "ü".encode()]
    assert qwen.decode(ids) == "ü"
    assert qwen.decode(ids[:1]) == "\ufffd"


def test_ids_outside_the_vocabulary_are_refused(qwen):
    for wrong in (-1, qwen.vocab_size):
        with pytest.raises(ValueError, match=f"{wrong} .*{qwen.vocab_size}"):
            qwen.decode_bytes([0, wrong])


def test_load_pads_the_vocabulary_and_gathers_the_eos_ids(tmp_path, train_fast, qwen):
    train_fast().save_pretrained(tmp_path)
    end, start = (qwen.token_bytes.index(t) for t in (b"<|im_end|>", b"<|endoftext|>"))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [start, end]}))
    size = qwen.vocab_size + 7
    loaded = Tokenizer.load(tmp_path, vocab_size=size)
    assert loaded.vocab_size == size == len(loaded.token_bytes)
    assert loaded.token_bytes[: qwen.vocab_size] == qwen.token_bytes
    assert set(loaded.token_bytes[qwen.vocab_size :]) == {b""}
    assert loaded.eos_ids == (end, start)
    assert loaded.pad_id == end and loaded.bos_id is None and not loaded.adds_bos
    assert loaded.added_tokens == qwen.added_tokens
    assert loaded.encode("Zürich <think>") == qwen.encode("Zürich <think>")
    with pytest.raises(UserError, match=f"{qwen.vocab_size} ids .* 5 rows"):
        Tokenizer.load(tmp_path, vocab_size=5)


def test_a_stored_length_limit_does_not_cut(train_fast):
    fast = train_fast()
    fast.backend_tokenizer.enable_truncation(3)
    fast.backend_tokenizer.enable_padding(length=50)
    tokenizer = Tokenizer(fast)
    assert tokenizer.decode(tokenizer.encode("one two three four")) == "one two three four"


def test_user_errors_are_one_line_naming_the_folder(tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text("{")
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder in (tmp_path / "nowhere", empty, broken):
        with pytest.raises(UserError) as e:
            Tokenizer.load(folder)
        assert str(folder) in str(e.value) and "\n" not in str(e.value)


def test_a_tokenizer_that_is_no_byte_level_bpe_is_refused():
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    chars = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    for backend in (words, chars):
        with pytest.raises(UserError, match="not a byte-level BPE"):
            Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_threads_get_the_same_ids(qwen):
    texts = [f"Zürich {i} 北京 <think>" for i in range(200)]
    expected = [qwen.encode(t) for t in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(qwen.encode, texts)) == expected


@pytest.mark.parametrize("eos", ['"a"', "[null]", "[[1]]", "1.5"])
def test_an_end_of_sequence_that_is_no_id(train_fast, tmp_path, eos):
    """Bug: a traceback."""
    train_fast().save_pretrained(str(tmp_path))
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {eos}}}')
    with pytest.raises(
        UserError, match=r"generation_config.json: eos_token_id = .*, must be an id"
    ):
        Tokenizer.load(tmp_path)
