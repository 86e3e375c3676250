"""One episode as a state machine without I/O.

The engine's tokens go in with `write`, documents with `observe`; what comes out is what the loop
has to do next. Ids are kept exactly as sampled, each with its source and its log-probability
from the moment it exists; only document text is ever tokenised here.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Sequence

import numpy as np

from r1s_jax.engine.programs import Stop
from r1s_jax.protocol.observation import render_documents
from r1s_jax.protocol.parse import extract_query
from r1s_jax.protocol.tags import ANSWER_CLOSE, END_QUERY
from r1s_jax.protocol.tokenizer import Tokenizer
from r1s_jax.types import (
    Document,
    Question,
    RetrievalFailure,
    Search,
    Segment,
    StopReason,
    TokenSource,
    Trajectory,
)

STOP_STRINGS = (END_QUERY, ANSWER_CLOSE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpisodeLimits:
    """The recipe's rollout limits."""

    documents: int = 3  # passages per search
    max_searches: int = 8
    answered_searches: int | None = None  # later ones bring nothing (a control)
    max_new_tokens: int = 512  # per turn
    context: int = 384  # tokens of the whole episode


class Need(enum.Enum):
    """What an episode waits for."""

    TOKENS = "tokens"
    DOCUMENTS = "documents"
    NOTHING = "nothing"  # it is over


class Episode:
    """Prompt, turns and documents of one sample of one question."""

    def __init__(
        self,
        question: Question,
        *,
        attempt: int,
        sample: int,
        prompt_ids: Sequence[int],
        tokenizer: Tokenizer,
        limits: EpisodeLimits,
        match_end: Callable[[bytes], tuple[int, int] | None],
        weights_version: int,
        opening: str = "",
    ):
        """`opening` is text of the first turn that the prompt ids already hold (forced search)."""
        self.question, self.attempt, self.sample = question, attempt, sample
        self.need = Need.TOKENS
        self.query = ""
        self.stop_reason: StopReason | None = None
        self._tokenizer, self._limits, self._match_end = tokenizer, limits, match_end
        self._weights_version = weights_version
        self._ids = list(prompt_ids)
        self._sources = [TokenSource.PROMPT] * len(prompt_ids)
        self._logprobs = [0.0] * len(prompt_ids)
        self._drawn_logprobs = [0.0] * len(prompt_ids)
        self._turn: list[int] = []
        self._opening = opening.encode()
        self._segments: list[Segment] = []
        self._searches: list[Search] = []

    @property
    def budget(self) -> int:
        """Tokens the next turn may have."""
        return min(self._limits.max_new_tokens, self._limits.context - len(self._ids))

    @property
    def documents(self) -> int:
        """Passages that its query may bring."""
        answered = self._limits.answered_searches
        return (
            0
            if answered is not None and len(self._searches) >= answered
            else (self._limits.documents)
        )

    @property
    def text(self) -> str:
        """The response so far, the unfinished turn included."""
        open_turn = (self._opening + self._tokenizer.decode_bytes(self._turn)).decode(
            errors="replace"
        )
        done = "".join(s.text for s in self._segments)
        return done + (open_turn if self.need == Need.TOKENS else "")

    def write(
        self,
        tokens: Sequence[int] | np.ndarray,
        logprobs: Sequence[float] | np.ndarray,
        drawn_logprobs: Sequence[float] | np.ndarray,
        stop: Stop,
    ) -> None:
        """Takes what the engine sampled; afterwards `need` says what is next."""
        self._append(tokens, TokenSource.SAMPLED, logprobs, drawn_logprobs)
        self._turn += [int(t) for t in tokens]
        if stop == Stop.RUNNING:
            return
        # The end-of-sequence token is no text.
        turn_ids = self._turn[:-1] if stop == Stop.EOS else self._turn
        turn_bytes = self._tokenizer.decode_bytes(turn_ids)
        # Searched for where the engine does: in what was sampled, not in the opening.
        match = self._match_end(turn_bytes) if stop == Stop.STRING else None
        turn_bytes = self._opening + turn_bytes[: match[1] if match else None]
        turn = turn_bytes.decode(errors="replace")
        self._segments.append(Segment(source=TokenSource.SAMPLED, text=turn))
        length, self._turn, self._opening = len(self._turn), [], b""
        if match and STOP_STRINGS[match[0]] == END_QUERY:
            self._ask(extract_query(turn))
        elif match:
            self._end(StopReason.ANSWER)
        elif stop == Stop.EOS:
            self._end(StopReason.EOS)
        else:
            full = length < self._limits.max_new_tokens
            self._end(StopReason.CONTEXT_FULL if full else StopReason.TURN_LENGTH)

    def observe(self, outcome: tuple[Document, ...] | RetrievalFailure) -> list[int]:
        """Takes the answer to `query`; returns the ids to append, [] if the episode is over."""
        if isinstance(outcome, RetrievalFailure):
            self._end(StopReason.RETRIEVAL_FAILED)
            return []
        self._searches.append(Search(query=self.query, documents=outcome))
        block = render_documents(outcome, self._tokenizer.control_strings)
        # JSON can hold halves of surrogate pairs, which no tokenizer takes.
        block = block.encode(errors="replace").decode()
        ids = self._tokenizer.encode(block)
        if len(self._ids) + len(ids) >= self._limits.context:
            self._end(StopReason.CONTEXT_FULL)
            return []
        self._segments.append(Segment(source=TokenSource.OBSERVATION, text=block))
        nothing = [0.0] * len(ids)
        self._append(ids, TokenSource.OBSERVATION, nothing, nothing)
        self.need = Need.TOKENS
        return ids

    def trajectory(self) -> Trajectory:
        """The finished episode. Raises ValueError while it is still going on."""
        if self.stop_reason is None:
            raise ValueError(f"the episode of {self.question.id!r} still needs {self.need.value}")
        return Trajectory(
            question=self.question,
            attempt=self.attempt,
            sample=self.sample,
            weights_version=self._weights_version,
            token_ids_T=np.array(self._ids, np.int32),
            sources_T=np.array(self._sources, np.int8),
            logprobs_T=np.array(self._logprobs, np.float32),
            drawn_logprobs_T=np.array(self._drawn_logprobs, np.float32),
            segments=tuple(self._segments),
            searches=tuple(self._searches),
            stop_reason=self.stop_reason,
        )

    def _append(
        self,
        ids: Sequence[int] | np.ndarray,
        source: TokenSource,
        logprobs: Sequence[float] | np.ndarray,
        drawn_logprobs: Sequence[float] | np.ndarray,
    ) -> None:
        self._ids += [int(i) for i in ids]
        self._sources += [source] * len(ids)
        self._logprobs += [float(x) for x in logprobs]
        self._drawn_logprobs += [float(x) for x in drawn_logprobs]

    def _ask(self, query: str) -> None:
        if not query:
            self._end(StopReason.EMPTY_QUERY)
        elif len(self._searches) >= self._limits.max_searches:
            self._end(StopReason.MAX_SEARCHES)
        else:
            self.query, self.need = query, Need.DOCUMENTS

    def _end(self, reason: StopReason) -> None:
        self.stop_reason, self.need = reason, Need.NOTHING
