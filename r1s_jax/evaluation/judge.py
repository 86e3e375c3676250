"""ACC_L: a model behind an OpenAI-compatible endpoint says whether an answer is right.

The wording is ours (`prompts.JUDGE_SYSTEM`), so shares compare with the published ones as one judge
with another; `Judgement.agreement` says how often both say the same where a released file is
judged again.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from r1s_jax.evaluation.asking import Failures, Progress, in_threads, stop_if_refused
from r1s_jax.evaluation.prompts import JUDGE_REMINDER, JUDGE_SYSTEM, judge_prompt
from r1s_jax.evaluation.records import Record
from r1s_jax.protocol.tags import THINK_CLOSE
from r1s_jax.remote.cache import DiskCache
from r1s_jax.remote.chat import Chat
from r1s_jax.remote.http import RemoteError
from r1s_jax.types import UserError, require_least

_VERDICT = re.compile(r"[\W_]*(true|false)[\W_]*", re.IGNORECASE)
_TOKEN_CHARACTERS = 3.5  # on the safe side for English
_MESSAGE_TOKENS = 5  # around each of the two messages, and for the reply
_LONGEST_REPLY = 200  # characters of an unreadable one that it is shown again

_Key = tuple[str, tuple[str, ...], str]  # question, answers, prediction


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """How a judge is asked."""

    concurrency: int = 8  # requests at a time
    max_tokens: int = 8  # of a reply; a model that thinks first needs more
    token_limit: int = 1_000_000  # estimated tokens above which nothing is sent
    prompt_price: float = 0.0  # money for a million tokens; 0: not known
    completion_price: float = 0.0

    def __post_init__(self) -> None:
        least = {"concurrency": 1, "max_tokens": 1, "token_limit": 0}
        require_least("judge", self, least | {"prompt_price": 0, "completion_price": 0})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judgement:
    """Judged records and what it took.

    Attributes:
        records: as given, with `judged` and `judge` set; None where there is no verdict.
        unreadable: records whose reply was neither True nor False, twice.
        failures: reasons why records got no reply, with how many.
        requests: answered in this call; what the cache held is not among them.
        agreement: share of records with the released verdict, of the `compared` that have both.
    """

    records: tuple[Record, ...]
    unreadable: int
    failures: Mapping[str, int]
    requests: int
    prompt_tokens: int
    completion_tokens: int
    agreement: float | None
    compared: int

    @property
    def facts(self) -> dict[str, Any]:
        """What belongs below a table of results."""
        facts: dict[str, Any] = {
            "judge's tokens": f"{self.prompt_tokens:,} in, {self.completion_tokens:,} out "
            f"({self.requests} requests)"
        }
        if self.unreadable:
            facts["verdicts that could not be read"] = self.unreadable
        if self.failures:
            facts["requests to the judge that failed"] = dict(self.failures)
        if self.agreement is not None:
            facts["agreement with the released verdicts"] = (
                f"{self.agreement:.1%} of {self.compared}"
            )
        return facts


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Reply:
    verdict: bool | None = None
    fault: RemoteError | None = None
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


def judge_records(
    records: Sequence[Record],
    chat: Chat,
    *,
    config: JudgeConfig | None = None,
    cache: DiskCache | None = None,
    note: Callable[[str], None] = print,
    progress: Progress | None = None,
) -> Judgement:
    """Asks for a verdict on every record; equal answers to equal questions are asked about once.

    A record without an answer is wrong, unasked. Verdicts are kept in `cache` as they come, so
    that a call after a kill asks only for the rest. The estimated cost is noted before anything is
    sent. A reply that cannot be read is asked for once more; then, and where a request fails, the
    record has no verdict.

    Args:
        chat: the judge; asked at temperature 0.
        note: takes the line with the estimate.
        progress: called after each reply.

    Raises:
        UserError: the estimate is above `config.token_limit`, the endpoint refuses (a wrong key,
            model or address), or every request fails and nothing is known from before.
    """
    config = config or JudgeConfig()
    keys = [_key(record) for record in records]
    wanted = list(dict.fromkeys(key for key in keys if key is not None))
    replies: dict[_Key, _Reply] = {}
    for key in wanted:
        kept = cache.get(_cache_key(chat, key)) if cache is not None else None
        if isinstance(kept, bool):
            replies[key] = _Reply(verdict=kept)
    unknown = [key for key in wanted if key not in replies]
    _estimate(chat, config, unknown, len(replies), note)

    def ask(key: _Key) -> _Reply:
        reply = _ask(chat, config, key)
        if cache is not None and reply.verdict is not None:
            cache.put(_cache_key(chat, key), reply.verdict)
        return reply

    for done, (i, reply) in enumerate(in_threads(ask, unknown, threads=config.concurrency), 1):
        replies[unknown[i]] = reply
        if progress is not None:
            progress(done, len(unknown))

    faults = [reply.fault for reply in replies.values() if reply.fault is not None]
    if faults and len(faults) == len(replies):
        raise UserError(f"no answer from the judge: {faults[0]}")
    none = _Reply(verdict=False)
    verdicts = [none if key is None else replies[key] for key in keys]
    judged = tuple(
        dataclasses.replace(record, judged=reply.verdict, judge=chat.config.model)
        for record, reply in zip(records, verdicts, strict=True)
    )
    failures = Failures()
    for reply in verdicts:
        if reply.fault is not None:
            failures.add(str(reply.fault.status), str(reply.fault))
    both = [r.judged == r.released for r in judged if None not in (r.judged, r.released)]
    return Judgement(
        records=judged,
        unreadable=sum(r.verdict is None and r.fault is None for r in verdicts),
        failures=failures.as_dict(),
        requests=sum(r.requests for r in replies.values()),
        prompt_tokens=sum(r.prompt_tokens for r in replies.values()),
        completion_tokens=sum(r.completion_tokens for r in replies.values()),
        agreement=sum(both) / len(both) if both else None,
        compared=len(both),
    )


def read_verdict(reply: str) -> bool | None:
    """True or False where the reply is that word (thoughts before it do not count), else None."""
    match = _VERDICT.fullmatch(reply.rpartition(THINK_CLOSE)[2])
    return match[1].lower() == "true" if match else None


def _key(record: Record) -> _Key | None:
    if record.prediction is None or not record.prediction.strip():
        return None
    return record.question, record.answers, record.prediction.strip()


def _cache_key(chat: Chat, key: _Key) -> str:
    about = (chat.config.base_url, chat.config.model, chat.config.api)
    return DiskCache.key("verdict", *about, JUDGE_SYSTEM, judge_prompt(*key))


def _ask(chat: Chat, config: JudgeConfig, key: _Key) -> _Reply:
    messages = [
        {"role": "system", "content": JUDGE_SYSTEM},
        {"role": "user", "content": judge_prompt(*key)},
    ]
    total = _Reply()
    for _ in range(2):
        text = "\n\n".join(m["content"] for m in messages) + "\n\n"
        prompt = messages if chat.config.api == "chat" else text
        try:
            completion = chat.complete(prompt, max_tokens=config.max_tokens)
        except RemoteError as error:
            stop_if_refused(error)
            return dataclasses.replace(total, fault=error)
        paid = not completion.cached
        total = _Reply(
            verdict=read_verdict(completion.text),
            requests=total.requests + paid,
            prompt_tokens=total.prompt_tokens + paid * completion.prompt_tokens,
            completion_tokens=total.completion_tokens + paid * completion.completion_tokens,
        )
        if total.verdict is not None:
            break
        # Asked again as it was, a greedy model would say the same.
        said = completion.text[:_LONGEST_REPLY] or "…"
        messages += [
            {"role": "assistant", "content": said},
            {"role": "user", "content": JUDGE_REMINDER},
        ]
    return total


def _estimate(
    chat: Chat,
    config: JudgeConfig,
    unknown: Sequence[_Key],
    cached: int,
    note: Callable[[str], None],
) -> None:
    """Notes what the requests will cost; UserError where that is too much."""
    texts = (len(JUDGE_SYSTEM) + len(judge_prompt(*key)) for key in unknown)
    prompt = sum(round(length / _TOKEN_CHARACTERS) + 2 * _MESSAGE_TOKENS for length in texts)
    completion = len(unknown) * min(config.max_tokens, _MESSAGE_TOKENS)
    money = (prompt * config.prompt_price + completion * config.completion_price) / 1e6
    price = f", about {money:.2f} in money" if money else ""
    note(
        f"judge {chat.config.model}: {len(unknown)} answers to judge, {cached} known already; "
        f"about {prompt:,} tokens in and {completion:,} out{price}"
    )
    if prompt + completion > config.token_limit:
        raise UserError(
            f"judging {len(unknown)} answers needs about {prompt + completion:,} tokens, "
            f"judge.token_limit = {config.token_limit:,}: raise it to send them"
        )
