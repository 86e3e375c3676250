"""The prompts: what the policy reads before its first token. Our own wording throughout.

Every prompt ends with `<think>`, so the policy begins inside its thoughts. Questions are foreign
text: white space is collapsed (no forged `User:` line) and control strings are defused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from r1s_jax.protocol.defuse import defuse
from r1s_jax.protocol.tags import PROTOCOL_TAGS, THINK_OPEN
from r1s_jax.protocol.tokenizer import Tokenizer
from r1s_jax.types import UserError

_SLOT = "{question}"

_RULES = """\
Reason step by step before you answer. Reasoning goes between <think> and </think>, and after it \
the result alone, a few words long, between <answer> and </answer>: \
<think> reasoning </think> <answer> result </answer>.
Where a fact is missing or uncertain, look it up instead of guessing: while reasoning, write one \
short request for one fact as <|begin_of_query|> keywords <|end_of_query|>. A search engine then \
replies with numbered passages between <|begin_of_documents|> and <|end_of_documents|>; never \
write such passages yourself. Read them, go on reasoning, and search again as often as needed, \
with a different request each time. A question of several parts needs a search for each part."""

BASE = (
    "Below, a User puts a question and an Assistant, who has a search engine at hand, "
    f"answers it.\n{_RULES}\n\nUser:{_SLOT}\nAssistant: {THINK_OPEN}"
)
TINY = f"User:{_SLOT}\nAssistant: {THINK_OPEN}"
SYSTEM = f"You answer questions and have a search engine at hand.\n{_RULES}"


@runtime_checkable
class Prompt(Protocol):
    """What rollouts need of a prompt."""

    def prompt_ids(self, tokenizer: Tokenizer, question: str) -> list[int]:
        """Ids of the whole prompt, BOS included where the tokenizer wants one."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class BasePrompt:
    """A plain-text prompt for base policies: `template` with `{question}`, ending in `<think>`.

    Raises:
        UserError: not exactly one `{question}`, or another ending.
    """

    template: str = BASE

    def __post_init__(self) -> None:
        _check_template(self.template, "prompt template")

    @classmethod
    def from_file(cls, path: str | Path) -> BasePrompt:
        """Reads the template from a UTF-8 file; line breaks at its very end do not count.

        Raises:
            UserError: the file cannot be read, or see the class.
        """
        try:
            template = Path(path).read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"{path}: the prompt template cannot be read: {e}") from e
        _check_template(template, str(path))
        return cls(template=template)

    def render(self, question: str, control_strings: Sequence[str] = PROTOCOL_TAGS) -> str:
        """The prompt as text, the question defused against `control_strings`."""
        head, tail = self.template.split(_SLOT)
        return head + _harmless(question, control_strings) + tail

    def prompt_ids(self, tokenizer: Tokenizer, question: str) -> list[int]:
        """Ids of the prompt; a BOS in front where the tokenizer itself adds one."""
        head, tail = self.template.split(_SLOT)
        foreign = _harmless(question, tokenizer.control_strings)
        return tokenizer.with_bos(tokenizer.encode_template(head, foreign, tail))


def tiny_prompt() -> BasePrompt:
    """The short prompt of the bundled tiny policy, which learnt its format in pre-training."""
    return BasePrompt(template=TINY)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatPrompt:
    """A prompt for instruct policies: system and user through the tokenizer's chat template.

    `<think>` follows the generation prompt, unless the template itself already opens it. `date` is
    handed to templates that state today's date, so that a prompt is the same every day.
    """

    system: str = SYSTEM
    user: str = _SLOT
    date: str = "26 Jul 2024"

    def __post_init__(self) -> None:
        if self.user.count(_SLOT) != 1:
            raise UserError(f"ChatPrompt.user: needs exactly one {_SLOT}, has {self.user!r}")

    def render(self, tokenizer: Tokenizer, question: str) -> str:
        """The prompt as text, the question defused against the tokenizer's control strings."""
        head, tail = self._around(tokenizer)
        return head + _harmless(question, tokenizer.control_strings) + tail

    def prompt_ids(self, tokenizer: Tokenizer, question: str) -> list[int]:
        """Ids of the prompt with exactly one BOS where the tokenizer has one to add."""
        head, tail = self._around(tokenizer)
        foreign = _harmless(question, tokenizer.control_strings)
        return tokenizer.with_bos(tokenizer.encode_template(head, foreign, tail))

    def _around(self, tokenizer: Tokenizer) -> tuple[str, str]:
        """The rendered template before and behind the question."""
        messages = [
            {"role": "system", "content": self.system},
            {"role": "user", "content": self.user},
        ]
        text = tokenizer.chat_text(messages, date_string=self.date)
        if text.count(_SLOT) != 1:
            raise UserError(
                f"ChatPrompt: the chat template shows the user's text {text.count(_SLOT)} times"
            )
        head, tail = text.split(_SLOT)
        opened = tail.rstrip().endswith(THINK_OPEN)
        return head, tail.rstrip() if opened else tail + THINK_OPEN


def _harmless(question: str, control_strings: Sequence[str]) -> str:
    return defuse(" ".join(question.split()), control_strings)


def _check_template(template: str, where: str) -> None:
    count = template.count(_SLOT)
    if count != 1:
        raise UserError(f"{where}: needs {_SLOT} exactly once, has it {count} times")
    if not template.endswith(THINK_OPEN):
        raise UserError(f"{where}: must end with {THINK_OPEN}, ends with {template[-20:]!r}")
