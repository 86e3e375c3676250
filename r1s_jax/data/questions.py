"""Questions as JSONL files: one object per line, every mistake named by file, line and field."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import Any

from etils import epath

from r1s_jax.types import Question, UserError


def read_questions(path: str | os.PathLike[str]) -> list[Question]:
    """Reads a question file.

    A row is `{"id" | "idx", "question", "answer": text or list of texts}` with optional
    "answers" (further accepted answers), "kind" and "gold_documents"; other fields are left
    alone, empty lines are skipped, a row without an id is named by its line number.

    Raises:
        UserError: the file is missing or empty, or a line is not such a row; the message
            names file, line and field.
    """
    file = epath.Path(path)
    if not file.exists():
        raise UserError(f"{path}: no such question file")
    questions: list[Question] = []
    lines_by_id: dict[str, int] = {}
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        question = _question(_row(line, where), where, number)
        if question.id in lines_by_id:
            raise UserError(
                f'{where}: field "id": {question.id!r} was already used on line '
                f"{lines_by_id[question.id]}"
            )
        lines_by_id[question.id] = number
        questions.append(question)
    if not questions:
        raise UserError(f"{path}: holds no questions")
    return questions


def write_questions(path: str | os.PathLike[str], questions: Iterable[Question]) -> None:
    """Writes questions so that `read_questions` gives them back equal."""
    lines = []
    for q in questions:
        row: dict[str, Any] = {"id": q.id, "question": q.text, "answer": list(q.answers)}
        if q.kind:
            row["kind"] = q.kind
        if q.gold_documents:
            row["gold_documents"] = list(q.gold_documents)
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    epath.Path(path).write_bytes("".join(lines).encode())


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
        json.dumps(row, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (UnicodeError, json.JSONDecodeError) as error:
        raise UserError(f"{where}: not a line of JSON: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: must be a JSON object, is a {type(row).__name__}")
    return row


def _question(row: dict[str, Any], where: str, number: int) -> Question:
    key = "id" if "id" in row else "idx"
    id = row.get(key, number)
    if isinstance(id, bool) or not isinstance(id, str | int) or not str(id).strip():
        raise UserError(f'{where}: field "{key}" must be a text or a number, is {id!r}')
    if "question" not in row:
        raise UserError(f'{where}: field "question" is missing')
    text = row["question"]
    if not isinstance(text, str) or not text.strip():
        raise UserError(f'{where}: field "question" must be a text that is not empty, is {text!r}')
    answers: list[str] = []
    for field in ("answer", "answers"):
        if field in row:
            answers += [a for a in _texts(row, field, where) if a not in answers]
    if not answers:
        field = "answers" if "answers" in row and "answer" not in row else "answer"
        state = "is empty" if field in row else "is missing"
        raise UserError(f'{where}: field "{field}" {state}')
    kind = row.get("kind", "")
    if not isinstance(kind, str):
        raise UserError(f'{where}: field "kind" must be a text, is {kind!r}')
    gold = tuple(_texts(row, "gold_documents", where)) if "gold_documents" in row else ()
    return Question(id=str(id), text=text, answers=tuple(answers), kind=kind, gold_documents=gold)


def _texts(row: dict[str, Any], field: str, where: str) -> list[str]:
    """The field as a list of texts, none of them empty."""
    value = row[field]
    values = value if isinstance(value, list) else [value]
    for item in values:
        if not isinstance(item, str) or not item.strip():
            raise UserError(f'{where}: field "{field}" holds {item!r}, must be a text, not empty')
    return values
