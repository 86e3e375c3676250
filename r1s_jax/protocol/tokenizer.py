"""A byte-level BPE tokenizer whose `encode` cannot produce a control token.

A thin, thread-safe reading of a Hugging Face fast tokenizer (Qwen2/2.5/3, Llama 3.x, GPT-2 kind).
It holds two copies: one that does not know the added tokens at all, for all text (so no document
can spell one, by construction), and one that does, for templates that we write ourselves.
"""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

from r1s_jax.protocol.tags import PROTOCOL_TAGS
from r1s_jax.types import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_HOW_TO = "put the checkpoint's tokenizer.json and tokenizer_config.json into that folder"


# Bytes that every vocabulary has to spell; SmolLM2's for one lacks some control characters.
_NEEDED = frozenset(range(0x20, 0x7F)) | {0x0A}


class Tokenizer:
    """Text to ids and back. All methods may be called from several threads.

    Attributes:
        token_bytes: the bytes of every id; an added token's are its literal text, those of ids
            between the tokenizer's and the model's padded vocabulary are b"".
        vocab_size: number of ids, `len(token_bytes)`.
        eos_ids: ids that end an episode (the tokenizer's and generation_config.json's).
        pad_id: the padding id (the first eos id, else 0, where the tokenizer names none).
        bos_id: the beginning-of-sequence id, None where the tokenizer names none.
        adds_bos: whether the tokenizer's own encoding of a text begins with `bos_id`.
        added_tokens: literal texts of the added tokens, by id.
        control_strings: protocol tags and added tokens: what `defuse` has to break.
    """

    def __init__(
        self,
        fast: Any,
        *,
        vocab_size: int | None = None,
        eos_ids: Sequence[int] = (),
        name: str = "",
    ) -> None:
        """Wraps a loaded `PreTrainedTokenizerFast`; `load` is the usual way.

        Raises:
            UserError: not a byte-level BPE, or more ids than the model's `vocab_size`.
        """
        from tokenizers import Tokenizer as Backend

        name = name or str(getattr(fast, "name_or_path", "") or "tokenizer")
        spec = json.loads(fast.backend_tokenizer.to_str())
        if spec["model"].get("type") != "BPE":
            raise UserError(f"{name}: not a byte-level BPE but {spec['model'].get('type')}")
        # A length limit or padding stored in the file would silently cut or fill every text.
        spec["truncation"] = spec["padding"] = None
        self._control: Backend = Backend.from_str(json.dumps(spec))
        self._fast = fast
        added = {i: t.content for i, t in self._control.get_added_tokens_decoder().items()}
        self._plain: Backend = Backend.from_str(json.dumps(_without_added(spec, added.values())))
        self._added_ids = frozenset(added)
        self.added_tokens: tuple[str, ...] = tuple(added[i] for i in sorted(added))
        self.control_strings: tuple[str, ...] = tuple(
            dict.fromkeys((*PROTOCOL_TAGS, *self.added_tokens))
        )
        self.token_bytes: tuple[bytes, ...] = _token_bytes(self._control, added, vocab_size, name)
        self.vocab_size: int = len(self.token_bytes)
        single = {b[0] for b in self.token_bytes if len(b) == 1}
        self._unspelt = bytes(b for b in range(256) if b not in single)
        own_eos = [] if fast.eos_token_id is None else [int(fast.eos_token_id)]
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys((*own_eos, *eos_ids)))
        self.bos_id: int | None = fast.bos_token_id
        self.pad_id: int = (
            fast.pad_token_id if fast.pad_token_id is not None else (*self.eos_ids, 0)[0]
        )
        first = self._control.encode("", add_special_tokens=True).ids[:1]
        self.adds_bos: bool = self.bos_id is not None and first == [self.bos_id]

    @classmethod
    def load(cls, path: str | Path, *, vocab_size: int | None = None) -> Tokenizer:
        """Reads the tokenizer of a checkpoint folder; nothing is ever downloaded.

        Args:
            path: folder with tokenizer.json (or vocab.json and merges.txt).
            vocab_size: rows of the model's embedding, where padded beyond the tokenizer's ids.

        Raises:
            UserError: the folder or its tokenizer files are missing or unreadable, or see __init__.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise UserError(f"{folder}: no such tokenizer folder; fetch the model and {_HOW_TO}")
        has_json = (folder / "tokenizer.json").is_file()
        if not has_json and not all((folder / n).is_file() for n in ("vocab.json", "merges.txt")):
            raise UserError(f"{folder}: holds no tokenizer.json; fetch the model and {_HOW_TO}")
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        # tokenizer.json is taken word for word; the Auto class may rebuild it by the model's name.
        loader: Any = PreTrainedTokenizerFast if has_json else AutoTokenizer
        try:
            fast = loader.from_pretrained(str(folder), local_files_only=True)
        except Exception as e:  # the library raises bare Exceptions for a broken file
            reason = " ".join(str(e).split())[:200]
            raise UserError(f"{folder}: the tokenizer cannot be read: {reason}") from e
        eos_ids = _generation_eos(folder / "generation_config.json")
        return cls(fast, vocab_size=vocab_size, eos_ids=eos_ids, name=str(folder))

    def encode(self, text: str) -> list[int]:
        """Ids of `text` as plain text: no special tokens added, none recognised in it.

        A character with a byte that the vocabulary cannot spell reads as a question mark: left
        out, as the backend would, it might let its neighbours fall together into a tag.
        """
        return self._plain.encode(self._spelt(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, in parallel."""
        spelt = [self._spelt(text) for text in texts]
        encodings = self._plain.encode_batch(spelt, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _spelt(self, text: str) -> str:
        raw = text.encode()
        if len(raw.translate(None, self._unspelt)) == len(raw):
            return text
        return "".join(
            c if c.encode().translate(None, self._unspelt) == c.encode() else "?" for c in text
        )

    def encode_template(self, head: str, foreign: str, tail: str) -> list[int]:
        """Ids of `head + foreign + tail` in which only head and tail, our own, may hold controls.

        Text around `foreign` is tokenised together with it, up to the nearest control tokens, as
        the model's own tokenizer would do with harmless text.
        """
        before = self._control.encode(head, add_special_tokens=False)
        after = self._control.encode(tail, add_special_tokens=False)
        at_head = [i for i, t in enumerate(before.ids) if t in self._added_ids]
        at_tail = [i for i, t in enumerate(after.ids) if t in self._added_ids]
        kept_head = at_head[-1] + 1 if at_head else 0
        kept_tail = at_tail[0] if at_tail else len(after.ids)
        cut_head = before.offsets[kept_head - 1][1] if at_head else 0
        cut_tail = after.offsets[kept_tail][0] if at_tail else len(tail)
        middle = self.encode(head[cut_head:] + foreign + tail[:cut_tail])
        return [*before.ids[:kept_head], *middle, *after.ids[kept_tail:]]

    def with_bos(self, ids: Sequence[int]) -> list[int]:
        """`ids` with the one BOS that the tokenizer asks for in front; never a second one."""
        if self.adds_bos and self.bos_id is not None and list(ids[:1]) != [self.bos_id]:
            return [self.bos_id, *ids]
        return list(ids)

    def decode_bytes(self, ids: Iterable[SupportsIndex]) -> bytes:
        """The exact bytes of `ids`, added tokens as their literal text.

        Raises:
            ValueError: an id outside [0, vocab_size).
        """
        numbers = [operator.index(i) for i in ids]
        wrong = [i for i in numbers if not 0 <= i < self.vocab_size]
        if wrong:
            raise ValueError(f"token id {wrong[0]} is outside the vocabulary of {self.vocab_size}")
        return b"".join(self.token_bytes[i] for i in numbers)

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of `ids`; a UTF-8 character cut by the borders reads as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def chat_text(self, messages: Sequence[dict[str, str]], **options: Any) -> str:
        """The chat template's text for `messages`, generation prompt included, as text.

        Raises:
            UserError: the tokenizer has no chat template (a base model's, mostly).
        """
        if not getattr(self._fast, "chat_template", None):
            raise UserError(
                f"{self._fast.name_or_path or 'tokenizer'}: has no chat template; "
                "use BasePrompt, or fetch the instruct model's tokenizer_config.json"
            )
        return self._fast.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True, **options
        )


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: the printable ones as themselves, the others from U+0100 on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in set(own)]
    return {chr(b): b for b in own} | {chr(0x100 + n): b for n, b in enumerate(rest)}


def _without_added(spec: dict[str, Any], added: Iterable[str]) -> dict[str, Any]:
    """The tokenizer's specification without its added tokens, nor any way to merge bytes into one.

    A token of a single character is spared: it may be the only spelling of its byte.
    """
    banned = {text for text in added if len(text) > 1}
    model = spec["model"]
    vocab = {token: i for token, i in model.get("vocab", {}).items() if token not in banned}
    merges = []
    for merge in model.get("merges", ()):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not banned.intersection((*pair, "".join(pair))):
            merges.append(merge)
    plain = {**model, "vocab": vocab, "merges": merges, "unk_token": None}
    return {**spec, "model": plain, "added_tokens": [], "post_processor": None}


def _token_bytes(
    backend: Backend, added: dict[int, str], vocab_size: int | None, name: str
) -> tuple[bytes, ...]:
    """Bytes of every id of the (padded) vocabulary; UserError where that is impossible."""
    vocab: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    count = max(vocab.values(), default=-1) + 1
    size = count if vocab_size is None else vocab_size
    if count > size:
        raise UserError(f"{name}: the tokenizer has {count} ids but the model only {size} rows")
    alphabet = byte_alphabet()
    missing = sum(char not in vocab for char, byte in alphabet.items() if byte in _NEEDED)
    if missing:
        raise UserError(
            f"{name}: not a byte-level BPE: {missing} of {len(_NEEDED)} ASCII bytes have no token"
        )
    table = [b""] * size
    for token, i in vocab.items():
        if i in added:
            table[i] = added[i].encode()
        else:
            try:
                table[i] = bytes(alphabet[char] for char in token)
            except KeyError as e:
                raise UserError(
                    f"{name}: not a byte-level BPE: token {i} ({token!r}) holds {e.args[0]!r}"
                ) from None
    return tuple(table)


def _generation_eos(path: Path) -> list[int]:
    """The eos ids of a generation_config.json, [] without the file."""
    if not path.is_file():
        return []
    try:
        eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        return [
            operator.index(i)
            for i in (eos if isinstance(eos, list) else [] if eos is None else [eos])
        ]
    except (ValueError, AttributeError) as e:
        raise UserError(f"{path}: not a JSON object: {e}") from e
    except TypeError as e:
        raise UserError(f"{path}: eos_token_id = {eos!r}, must be an id or a list of ids") from e
