"""The fault guarded: a document opens a query, closes a block, gives an answer, ends the turn."""

import itertools
import random
import time

import pytest

from r1s_jax.protocol.defuse import defuse
from r1s_jax.protocol.tags import PROTOCOL_TAGS

QUERY = "<|end_of_query|>"


def assert_harmless(text, controls, tokenizer=None):
    low = text.lower()
    assert not [c for c in controls if c.strip().lower() in low], text
    if tokenizer is not None:
        added = {i for i, b in enumerate(tokenizer.token_bytes) if b.decode("utf-8", "ignore")
                 in tokenizer.added_tokens}  # fmt: skip
        assert not added & set(tokenizer.encode(text))
        # Even the tokenizer that does know the added tokens finds none.
        assert not added & set(tokenizer._control.encode(text, add_special_tokens=False).ids)


def test_every_added_token_and_tag_in_every_dress(any_tokenizer):
    controls = any_tokenizer.control_strings
    for c in controls:
        half = len(c) // 2
        for foreign in (
            c, c.upper(), c.title(), f"a {c} b", f" {c}\n", c + c, c[:half] + c + c[half:],
            c[0] + c, c[:-1] + c, f"{c[:half]}{c[:half]}{c}{c[half:]}{c[half:]}", f"\t{c}\u2003",
        ):  # fmt: skip
            safe = defuse(foreign, controls)
            assert_harmless(safe, controls, any_tokenizer)
            assert defuse(safe, controls) == safe
            # Only spaces were put in.
            assert safe.replace(" ", "") == foreign.replace(" ", "")


def test_visible_and_simple():
    assert defuse(f"x{QUERY}y", PROTOCOL_TAGS) == "x< |end_of_query|>y"
    nested = "<|end_of_<|end_of_query|>query|>"
    assert defuse(nested, PROTOCOL_TAGS) == "<|end_of_< |end_of_query|>query|>"


def test_ordinary_text_is_unchanged_bit_for_bit():
    for text in (
        "", "a < b and c <| d |> e", "<table><td>x</td></table>", "naïve café\r\n\u200b北京 🎉",
        "query|>, end_of_query, think>, e\u0301", "madeupword and its end: madeupword",
    ):  # fmt: skip
        assert defuse(text, (*PROTOCOL_TAGS, "madeupword0", "<s>", "\n", "#", "  ")) == text


@pytest.mark.parametrize("control", PROTOCOL_TAGS)
def test_nothing_can_be_finished_across_the_border(control):
    for cut in range(1, len(control)):
        safe = defuse("a document " + control[:cut], PROTOCOL_TAGS)
        assert control not in safe + control[cut:]


def test_brute_force_over_a_small_alphabet():
    """All 4-letter-alphabet texts up to length 7, control strings that overlap and hold spaces."""
    controls = ("<a", "a<", "<<", "< a", "<  a", "a <|", "<|a|<")
    for length in range(7):
        for letters in itertools.product("<a| ", repeat=length):
            text = "".join(letters)
            safe = defuse(text, controls)
            assert not any(c in safe for c in controls), (text, safe)
            assert defuse(safe, controls) == safe
            assert safe.replace(" ", "") == text.replace(" ", "")


def test_random_splices_of_tags(awkward):
    rng = random.Random(0)
    controls = awkward.control_strings
    pieces = [c[i:j] for c in controls for i in (0, 1, 3) for j in (-4, -1, None)] + [
        " ",
        "\n",
        "é",
    ]
    for _ in range(1500):
        safe = defuse("".join(rng.choices(pieces, k=rng.randint(1, 7))), controls)
        assert_harmless(safe, controls, awkward)
        assert defuse(safe, controls) == safe


def test_quick_with_the_many_reserved_tokens_of_llama():
    controls = (*PROTOCOL_TAGS, *(f"<|reserved_special_token_{i}|>" for i in range(256)))
    text = "Text with <b>some</b> markup and words. " * 50
    defuse(text, controls)
    begin = time.perf_counter()
    for _ in range(20):
        assert defuse(text, controls) == text
    assert time.perf_counter() - begin < 1.0  # 40,000 characters
