"""What the workloads of benchmarks/rollout.py consist of: models, scripts of episodes, retrievers.

A script says all about an episode that both sides have to share: its prompt, how many tokens each
turn samples, and the documents that follow the turn. Questions, queries, passages and, for
workload B, the lengths too are those of the released transcripts; they are read from
`../shared/data/r1_searcher`, beside the project. Everything is the same on every machine.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from r1s_jax.protocol.observation import render_documents
from r1s_jax.protocol.parse import extract_query
from r1s_jax.protocol.prompts import BasePrompt, Prompt, tiny_prompt
from r1s_jax.protocol.tags import BEGIN_DOCUMENTS, END_DOCUMENTS
from r1s_jax.protocol.tokenizer import Tokenizer
from r1s_jax.types import Document, RetrievalFailure, UserError

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "r1_searcher"
TRANSCRIPTS = ("released_hotpotqa_qwen.jsonl", "released_hotpotqa_llama.jsonl")
PASSAGES = "passages.jsonl"
DOCUMENTS, SEARCHES = 3, 3

# Workload A. Two key/value heads, as the small Qwen2.5 models have: the fewer, the less a cache
# that is read in full costs.
SMALL_QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 2000,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "torch_dtype": "float32",
}
A_ROWS, A_PROMPT, A_NEW, A_CACHE = 16, 32, 128, 1024

# Workload C: turn lengths are log-normal, rounded up and clipped.
C_MEDIAN, C_PERCENTILE_99, C_LONGEST = 32, 400, 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
    """`length` sampled tokens, then a query and what it brings, as text and as tokens."""

    length: int
    query: str
    documents: tuple[Document, ...]
    observation: str
    observation_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Script:
    """One sample of one question; after the turns come `answer_length` more sampled tokens."""

    question_id: str
    question: str
    sample: int
    prompt_ids: tuple[int, ...]
    turns: tuple[Turn, ...]
    answer_length: int

    @property
    def sampled(self) -> int:
        """Tokens the policy writes."""
        return sum(turn.length for turn in self.turns) + self.answer_length

    @property
    def context(self) -> int:
        """Tokens of the finished episode, prompt and documents included."""
        documents = sum(len(turn.observation_ids) for turn in self.turns)
        return len(self.prompt_ids) + documents + self.sampled


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transcripts:
    """What the released transcripts hold.

    searches: of every question the distinct queries with their passages, in order.
    turns: of every transcript the sampled text of each turn, the answer's last.
    """

    searches: dict[str, dict[str, tuple[Document, ...]]]
    turns: tuple[tuple[str, ...], ...]

    @classmethod
    def read(cls, folder: Path = DATA) -> Transcripts:
        """Raises UserError where a file is not there."""
        passages = {}
        for row in _rows(folder / PASSAGES):
            document = Document(id=row["id"], title=row["title"], text=row["text"])
            passages[_letters(document.contents)] = document
        searches: dict[str, dict[str, tuple[Document, ...]]] = {}
        turns = []
        block = re.compile(
            rf"{re.escape(BEGIN_DOCUMENTS)}\n(.*?){re.escape(END_DOCUMENTS)}\s*", re.S
        )
        for row in (row for name in TRANSCRIPTS for row in _rows(folder / name)):
            written = block.split(row["gen_text_store"])
            turns.append(tuple(written[::2]))
            of_question = searches.setdefault(row["question"], {})
            for turn, shown in zip(written[::2], written[1::2], strict=False):
                texts = re.split(r'(?m)^\(\d+\)(?="?Title: )', shown)[1:]
                found = [passages.get(_letters(text)) for text in texts]
                known = tuple(document for document in found if document is not None)
                if query := extract_query(turn):
                    of_question.setdefault(query, known)
        return cls(searches=searches, turns=tuple(turns))


def search_episodes(
    tokenizer: Tokenizer, transcripts: Transcripts, *, questions: int = 32, samples: int = 4
) -> list[Script]:
    """Workload B, in the order of questions and samples.

    The first questions with enough distinct queries. A sample asks three of them, in their order,
    and shows the first three passages of each; its lengths are those of one transcript that
    searched as often, in the tokens of this tokenizer: its first turns and its answer.
    """
    rng = np.random.default_rng(4)
    lengths = [
        [len(ids) for ids in tokenizer.encode_batch([*turns[:SEARCHES], turns[-1]])]
        for turns in transcripts.turns
        if len(turns) > SEARCHES and all(turns)
    ]
    scripts = []
    for number, (question, found) in enumerate(_searchable(transcripts, questions)):
        queries = [query for query, documents in found.items() if len(documents) >= DOCUMENTS]
        for sample in range(samples):
            asked = sorted(rng.choice(len(queries), SEARCHES, replace=False))
            drawn = lengths[rng.integers(len(lengths))]
            searches = [(queries[i], found[queries[i]][:DOCUMENTS]) for i in asked]
            script = _script(tokenizer, BasePrompt(), question, searches, drawn)
            scripts.append(
                dataclasses.replace(script, question_id=f"hotpotqa_{number}", sample=sample)
            )
    return scripts


def ragged_episodes(
    tokenizer: Tokenizer, transcripts: Transcripts, *, episodes: int = 512, documents: int = 1
) -> list[Script]:
    """Workload C: one sample each of `episodes` questions, real queries and passages.

    One to four searches, equally likely. Every turn's length is drawn from a log-normal
    distribution with a median of 32 tokens and a 99th percentile of 400, cut at 512.
    """
    rng = np.random.default_rng(5)
    normal_99 = 2.3263478740408408
    spread = math.log(C_PERCENTILE_99 / C_MEDIAN) / normal_99
    pool = [
        (query, shown)
        for found in transcripts.searches.values()
        for query, shown in found.items()
        if len(shown) >= documents
    ]
    questions = list(transcripts.searches)
    scripts = []
    for number in range(episodes):
        count = int(rng.integers(1, 5))
        drawn = np.ceil(C_MEDIAN * np.exp(spread * rng.standard_normal(count + 1)))
        lengths = [int(x) for x in np.clip(drawn, 1, C_LONGEST)]
        chosen = [pool[i] for i in rng.choice(len(pool), count, replace=False)]
        searches = [(query, shown[:documents]) for query, shown in chosen]
        question = questions[number % len(questions)]
        script = _script(tokenizer, tiny_prompt(), question, searches, lengths)
        scripts.append(dataclasses.replace(script, question_id=f"ragged_{number}"))
    return scripts


class ScriptedRetriever:
    """Answers the scripts' queries with their documents, after a fixed delay per call."""

    def __init__(self, scripts: Iterable[Script], *, delay_seconds: float = 0.0):
        self._documents = {t.query: t.documents for script in scripts for t in script.turns}
        self._delay_seconds = delay_seconds

    def search(
        self, queries: Sequence[str], k: int
    ) -> list[tuple[Document, ...] | RetrievalFailure]:
        time.sleep(self._delay_seconds)
        unknown = RetrievalFailure(reason="no script asks this")
        found = (self._documents.get(query) for query in queries)
        return [unknown if documents is None else documents[:k] for documents in found]


def prompts_a() -> np.ndarray:
    """[16, 32] token ids of workload A."""
    return np.random.default_rng(6).integers(0, SMALL_QWEN2["vocab_size"], (A_ROWS, A_PROMPT))


def plain_scripts(prompts: np.ndarray, length: int) -> list[Script]:
    """Episodes of one turn without a search, one per prompt."""
    return [
        Script(
            question_id=f"plain_{i}",
            question="",
            sample=0,
            prompt_ids=tuple(row.tolist()),
            turns=(),
            answer_length=length,
        )
        for i, row in enumerate(prompts)
    ]


def write_small_qwen2(folder: Path, config: Mapping[str, object] = SMALL_QWEN2) -> Path:
    """Writes a Qwen2 with random f32 weights as a Hugging Face folder without tokenizer.

    The embedding is small and its norm's scale large, so that sampling is neither uniform nor
    settled: most of the probability lies on some hundred tokens.
    """
    from safetensors.numpy import save_file

    c, rng = config, np.random.default_rng(7)
    d, f = c["hidden_size"], c["intermediate_size"]
    kv = c["num_key_value_heads"] * d // c["num_attention_heads"]

    def normal(*shape: int, scale: float) -> np.ndarray:
        return rng.normal(0, scale, shape).astype(np.float32)

    tensors = {"model.embed_tokens.weight": normal(c["vocab_size"], d, scale=d**-0.5)}
    tensors["model.norm.weight"] = np.full(d, 2, np.float32)
    for i in range(c["num_hidden_layers"]):
        here = f"model.layers.{i}."
        for name, width in (("q", d), ("k", kv), ("v", kv)):
            tensors[f"{here}self_attn.{name}_proj.weight"] = normal(width, d, scale=d**-0.5)
            tensors[f"{here}self_attn.{name}_proj.bias"] = normal(width, scale=0.1)
        tensors[f"{here}self_attn.o_proj.weight"] = normal(d, d, scale=d**-0.5)
        for name in ("gate", "up"):
            tensors[f"{here}mlp.{name}_proj.weight"] = normal(f, d, scale=d**-0.5)
        tensors[f"{here}mlp.down_proj.weight"] = normal(d, f, scale=f**-0.5)
        for name in ("input", "post_attention"):
            tensors[f"{here}{name}_layernorm.weight"] = np.ones(d, np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(c))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_for_peer(path: Path, tokenizer: Tokenizer, scripts: Iterable[Script]) -> Path:
    """What a peer that works with text needs of the scripts, one JSON object a line."""
    with path.open("w", encoding="utf-8") as lines:
        for script in scripts:
            row = {
                "prompt": tokenizer.decode(script.prompt_ids),
                "lengths": [*(turn.length for turn in script.turns), script.answer_length],
                "observations": [turn.observation for turn in script.turns],
            }
            lines.write(json.dumps(row) + "\n")
    return path


def _script(
    tokenizer: Tokenizer,
    prompt: Prompt,
    question: str,
    searches: Sequence[tuple[str, tuple[Document, ...]]],
    lengths: Sequence[int],
) -> Script:
    turns = []
    for (query, documents), length in zip(searches, lengths[:-1], strict=True):
        text = render_documents(documents, tokenizer.control_strings)
        ids = tuple(tokenizer.encode(text))
        turns.append(
            Turn(
                length=length,
                query=query,
                documents=documents,
                observation=text,
                observation_ids=ids,
            )
        )
    return Script(
        question_id="",
        question=question,
        sample=0,
        prompt_ids=tuple(prompt.prompt_ids(tokenizer, question)),
        turns=tuple(turns),
        answer_length=lengths[-1],
    )


def _searchable(
    transcripts: Transcripts, count: int
) -> list[tuple[str, dict[str, tuple[Document, ...]]]]:
    """The first questions that were searched for with enough different queries."""
    enough = [
        (question, found)
        for question, found in transcripts.searches.items()
        if sum(len(documents) >= DOCUMENTS for documents in found.values()) >= SEARCHES
    ]
    if len(enough) < count:
        raise UserError(f"{DATA}: {len(enough)} questions have {SEARCHES} queries, {count} wanted")
    return enough[:count]


def _letters(text: str) -> str:
    """For comparing: the transcripts write some passages with the quotation marks of CSV."""
    return re.sub(r"\W+", "", text)


def _rows(path: Path) -> list[dict]:
    if not path.is_file():
        raise UserError(
            f"{path}: not there; workloads B and C are made of the transcripts that were released "
            "with R1-Searcher (repository RUCAIBox/R1-Searcher) and their passages: --data FOLDER"
        )
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
