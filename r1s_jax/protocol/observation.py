"""What the policy reads after a query: the retrieved documents in their wrapper."""

from __future__ import annotations

from collections.abc import Sequence

from r1s_jax.protocol.defuse import defuse
from r1s_jax.protocol.tags import BEGIN_DOCUMENTS, END_DOCUMENTS
from r1s_jax.types import Document

# Said in words, as "(1)": with an empty block the seven tag counts would differ through no fault
# of the policy's.
NOTHING_FOUND = "No document was found."


def render_documents(documents: Sequence[Document], control_strings: Sequence[str]) -> str:
    """The text appended after a query.

    `<|begin_of_documents|>\\n(1)Title: … Text: …\\n(2)…\\n<|end_of_documents|>\\n\\n`; white space
    within a document, line breaks included, is collapsed to single spaces, and its text is defused
    against `control_strings` (`Tokenizer.control_strings`).
    """
    lines = [_one_line(d.contents, control_strings) for d in documents] or [NOTHING_FOUND]
    numbered = "".join(f"({i}){line}\n" for i, line in enumerate(lines, start=1))
    return f"{BEGIN_DOCUMENTS}\n{numbered}{END_DOCUMENTS}\n\n"


def _one_line(text: str, control_strings: Sequence[str]) -> str:
    # Collapsed first: defusing is the last thing that happens to foreign text.
    return defuse(" ".join(text.split()), control_strings)
