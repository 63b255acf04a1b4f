"""Tasks in files: questions with answers to choose from, or words to guess, scored by what the model finds likeliest.

A task is a .jsonl file of rows of one of these kinds; other fields are ignored:

    {"query": "Question: ...", "choices": ["...", "..."], "gold": 1}               which choice is right
    {"context_options": ["...", "..."], "continuation": "...", "gold": 0}          which context leads to it
    {"context": "...", "continuation": "..."}                                      whether it is guessed, word for word

The figures are lm-eval's, by its names: `acc`, the share of questions whose right answer has the highest probability;
`acc_bytes`, the highest per byte of the answer; each with its standard error.
"""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moelet.errors import UserError
from moelet.likelihood import Likelihood, Note, encode_pairs, likelihoods, silent
from moelet.modelling import GPT
from moelet.storage.intake import LARGEST_LINES, open_file
from moelet.tokenizer import Tokenizer

KINDS = {  # which fields make a row of each kind
    "choices": ("query", "choices", "gold"),
    "contexts": ("context_options", "continuation", "gold"),
    "guess": ("context", "continuation"),
}
DELIMITER = " "  # between a context and what continues it: lm-eval's `target_delimiter`


class Question(NamedTuple):
    texts: list[tuple[str, str]]  # each answer as a context and what continues it
    gold: int | None  # the right one; None: there is one text, to be guessed
    lengths: list[int] | None  # of each choice in bytes; None where they say nothing


def read_task(path: Path, delimiter: str = DELIMITER, limit: int | None = None) -> list[Question]:
    """Return the questions of a file, the first `limit`. Raises UserError naming the line that is wrong."""
    _require_unicode(delimiter, "--delimiter")
    try:
        with open_file(path, LARGEST_LINES) as file:
            lines = file.read().decode("utf-8-sig").split("\n")  # some editors begin a file with a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it isn't UTF-8"
        raise UserError(f"the task {path} can't be read ({reason}). It is a .jsonl file. Give another.") from None
    found: list[Question] = []
    first = None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if limit is not None and len(found) >= limit:
            break
        kind, row = _read_row(line, f"{path}, line {number}")
        first = first or kind
        if kind != first:
            raise UserError(
                f"{path}, line {number} is a row of the kind {KINDS[kind]}, those before are {KINDS[first]}. A task "
                "has one kind. Make two files."
            )
        found.append(_question(kind, row, delimiter, f"{path}, line {number}"))
    if not found:
        raise UserError(f"the task {path} has no row. It needs one. Give another file.")
    return found


def _read_row(line: str, where: str) -> tuple[str, dict[str, Any]]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"{where} isn't JSON. Each line is one JSON object. Mend it.") from None
    fields = set(row) if isinstance(row, dict) else set()
    for kind, needed in KINDS.items():
        if fields >= set(needed):
            return kind, row
    kinds = "; or ".join(", ".join(needed) for needed in KINDS.values())
    raise UserError(f"{where} has the fields {sorted(fields)}. It needs {kinds}. Rename or add fields.")


def _question(kind: str, row: dict[str, Any], delimiter: str, where: str) -> Question:
    if kind == "guess":
        return Question([(_text(row, "context", where), delimiter + _text(row, "continuation", where))], None, None)
    several = "choices" if kind == "choices" else "context_options"
    options, gold = row[several], row["gold"]
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(o, str) and o for o in options):
        raise UserError(f"{where}: {several} must be a list of two or more texts, none of them empty. Mend the line.")
    for option in options:
        _require_unicode(option, f"{where}: one of {several}")
    if type(gold) is not int or not 0 <= gold < len(options):
        raise UserError(
            f"{where}: gold is {json.dumps(gold)} and there are {len(options)} {several}. It must be the place of the "
            "right one, the first 0. Mend the line."
        )
    if kind == "contexts":
        continuation = delimiter + _text(row, "continuation", where)
        return Question([(context, continuation) for context in options], gold, None)
    query = _text(row, "query", where)
    return Question([(query, delimiter + choice) for choice in options], gold, [len(o.encode()) for o in options])


def _text(row: dict[str, Any], name: str, where: str) -> str:
    text = row[name]
    if not isinstance(text, str) or (name == "continuation" and not text):
        raise UserError(f"{where}: {name} must be a text, a continuation not an empty one. Mend the line.")
    _require_unicode(text, f"{where}: {name}")
    return text


def _require_unicode(text: str, what: str) -> None:
    """Raise UserError for half of a surrogate pair, which JSON can hold by its escape and no tokenizer can read."""
    lone = next((character for character in text if "\ud800" <= character <= "\udfff"), None)
    if lone is not None:
        raise UserError(
            f"{what} has the lone surrogate U+{ord(lone):04X}, half of a character. Text must be valid Unicode. Remove "
            "or replace it."
        )


def score(
    model: GPT,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    batch_size: int,
    dtype: torch.dtype,
    note: Note = silent,
) -> dict[str, float | None]:
    """Return the figures of a task: `n`, `acc`, `acc_stderr` and, by kind, `chance` and `acc_bytes` or `perplexity`.

    `perplexity` is that of a whole continuation, None where it is too large for a float64. Where there is one question
    alone, standard errors are None.
    """
    pairs = encode_pairs(tokenizer, [text for question in questions for text in question.texts])
    rest = iter(likelihoods(model, pairs, batch_size, dtype, note))
    return figures(questions, [[next(rest) for _ in question.texts] for question in questions])


def figures(questions: Sequence[Question], found: Sequence[Sequence[Likelihood]]) -> dict[str, float | None]:
    """Return the figures of questions, given the likelihoods of their texts."""
    result: dict[str, float | None] = {"n": len(questions)}
    if questions[0].gold is None:
        result |= _mean("acc", [float(answers[0].greedy) for answers in found])
        nats = -statistics.fmean(answers[0].log_probability for answers in found)
        return result | {"perplexity": math.exp(nats) if nats < 709 else None}  # from there on exp overflows a float64
    result |= {"chance": statistics.fmean(1 / len(question.texts) for question in questions)}
    right, right_by_bytes = [], []
    for question, answers in zip(questions, found, strict=True):
        scores = [answer.log_probability for answer in answers]
        right.append(float(scores.index(max(scores)) == question.gold))
        if question.lengths is not None:
            per_byte = [score / size for score, size in zip(scores, question.lengths, strict=True)]
            right_by_bytes.append(float(per_byte.index(max(per_byte)) == question.gold))
    return result | _mean("acc", right) | (_mean("acc_bytes", right_by_bytes) if right_by_bytes else {})


def _mean(name: str, values: Sequence[float]) -> dict[str, float | None]:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {name: statistics.fmean(values), f"{name}_stderr": error}
