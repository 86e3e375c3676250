from r1s_jax.protocol.observation import render_documents
from r1s_jax.protocol.parse import judge_format
from r1s_jax.protocol.tags import COUNTED_TAGS, PROTOCOL_TAGS
from r1s_jax.types import Document, Segment, TokenSource


def doc(title, text):
    return Document(id="1", title=title, text=text)


def test_exact_text():
    text = render_documents([doc("Zürich", "A city.\n\nBig."), doc("Bern", "x")], PROTOCOL_TAGS)
    assert text == (
        "<|begin_of_documents|>\n(1)Title: Zürich Text: A city. Big.\n(2)Title: Bern Text: x\n"
        "<|end_of_documents|>\n\n"
    )


def test_nothing_found_keeps_the_seven_counts_equal():
    text = render_documents([], PROTOCOL_TAGS)
    sampled = Segment(source=TokenSource.SAMPLED, text="<|begin_of_query|> a <|end_of_query|>")
    verdict = judge_format([sampled, Segment(source=TokenSource.OBSERVATION, text=text)])
    assert verdict.tag_counts == (1,) * 7 and verdict.searched


def test_no_document_speaks_the_protocol(any_tokenizer):
    controls = any_tokenizer.control_strings
    clean = render_documents([doc("a", "b")] * 2, controls)
    for c in controls:
        for cut in range(1, len(c) + 1):
            # A tag whole, begun at a document's end, or split between title and text.
            docs = [doc(c[:cut], c[cut:] + " " + c[:cut]), doc(c[cut:] or "a", f"x\n{c}")]
            text = render_documents(docs, controls)
            for tag in {*COUNTED_TAGS, *PROTOCOL_TAGS, *any_tokenizer.added_tokens}:
                assert text.count(tag) == clean.count(tag)
            assert text.count("\n") == clean.count("\n")
            names = {i for i, b in enumerate(any_tokenizer.token_bytes)
                     if b in {t.encode() for t in any_tokenizer.added_tokens}}  # fmt: skip
            assert not names & set(any_tokenizer.encode(text))
