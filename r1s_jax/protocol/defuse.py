"""Foreign text is data: makes documents, questions and queries unable to speak the protocol.

One move only: a space is put behind the first character of every place where a control string
starts (`<|end_of_query|>` becomes `< |end_of_query|>`). Nothing is ever removed, so two halves
cannot fall together; all starts are found at once, overlapping ones included, and the search is
repeated until none is left, for control strings that hold spaces themselves. Hence, by
construction, the result holds no control string, and a second pass changes nothing.

What cannot be broken by a space inside (control strings of one character or of white space only)
is left alone; that such text never becomes a control *token* is seen to by `Tokenizer.encode`,
which does not know the added tokens.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence


def defuse(text: str, control_strings: Sequence[str]) -> str:
    """Returns `text` without any of the control strings; text that holds none comes back as is.

    Matching ignores letter case and the white space around a control string (added tokens may
    swallow it). An end of the text that begins a control string (`… <|end_of_doc`) is broken as
    well, so that whatever the text is put in front of cannot complete it; only for control strings
    that start with a letter or digit this is left out, as every other word ends like that.
    """
    starts, heads, longest = _compile(tuple(control_strings))
    while True:
        broken = starts.sub(r"\g<0> ", text) if starts else text
        broken = _break_end(broken, heads, longest)
        if broken == text:
            return text
        text = broken


def _break_end(text: str, heads: frozenset[str], longest: int) -> str:
    """Breaks the longest end of `text` that is the head of a control string; the loop goes on."""
    for start in range(max(0, len(text) - longest), len(text)):
        if text[start:].casefold() in heads:
            return f"{text[: start + 1]} {text[start + 1 :]}"
    return text


@functools.lru_cache(maxsize=32)
def _compile(
    control_strings: tuple[str, ...],
) -> tuple[re.Pattern[str] | None, frozenset[str], int]:
    """(pattern of every occurrence's first character, case-folded heads, longest length)."""
    names = sorted({s.strip() for s in control_strings if len(s.strip()) > 1})
    if not names:
        return None, frozenset(), 0
    # The look-ahead finds overlapping occurrences; the class in front lets plain text pass quickly.
    first = "".join(sorted({re.escape(s[0]) for s in names}))
    body = "|".join(re.escape(s) for s in names)
    pattern = re.compile(f"(?=[{first}])(?={body}).", re.IGNORECASE | re.DOTALL)
    heads = {s[:n].casefold() for s in names if not s[0].isalnum() for n in range(1, len(s))}
    return pattern, frozenset(heads), max(map(len, names))
