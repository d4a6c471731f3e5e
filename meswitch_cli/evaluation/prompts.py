"""Evaluation data: prompts with their answers, of which the answers count, or plain text, of which every token does."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from meswitch_cli.calibration.data import read_calibration
from meswitch_cli.errors import CalibrationError, EvaluationError
from meswitch_cli.evaluation.fidelity import EncodedItem
from meswitch_cli.textfile import read_text

#: Tokens of a window of plain text.
WINDOW_TOKENS = 512


@dataclass(frozen=True)
class EvaluationSet:
    """One file of evaluation data.

    Attributes:
        name: what tables call it, the file's stem.
        path: the file.
        sha256: of its bytes.
        owner: label of the expert whose own prompts these are, None where the user named none.
        conversations: message lists whose last message is the answer; empty for plain text.
        texts: plain texts, each all answer.
        answers: the short right answer of each conversation, for exact match; None where it names none.
    """

    name: str
    path: Path
    sha256: str
    owner: str | None
    conversations: tuple[tuple[dict[str, str], ...], ...]
    texts: tuple[str, ...]
    answers: tuple[str | None, ...] = ()

    @property
    def has_answers(self) -> bool:
        return any(answer is not None for answer in self.answers)

    @property
    def kind(self) -> Literal["responses", "text"]:
        return "responses" if self.conversations else "text"


@dataclass(frozen=True)
class EncodedSet:
    """A set as one expert's tokenizer encodes it.

    Attributes:
        items: what fits.
        kept: the number of each item's example or window in the file.
        skipped: examples longer than the model's context.
    """

    items: tuple[EncodedItem, ...]
    kept: tuple[int, ...]
    skipped: int


def read_set(path: Path, owner: str | None = None) -> EvaluationSet:
    """Read JSONL (`prompt` and `response`, `messages`, or `text`), or any other file as one plain text.

    An example's `answer` is what exact match compares, and its response where it has no other.

    Raises:
        EvaluationError: no such file, nothing in it, a line of no known form, or a prompt without an answer.
    """
    if path.suffix not in (".jsonl", ".json"):
        return _read_text(path, owner)
    try:
        file = read_calibration(path)
    except CalibrationError as error:
        raise EvaluationError(str(error)) from error
    examples = [item for item in file.items if "messages" in item]
    conversations = [tuple(_answered(item)) for item in examples]
    texts = [item["text"] for item in file.items if "text" in item]
    if conversations and texts:
        raise EvaluationError(f"{path}: holds both conversations and plain texts; put them into two files")
    for number, messages in enumerate(conversations, 1):
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise EvaluationError(
                f'{path}: example {number} has no answer to evaluate; give "prompt" and "response", or "messages" '
                "that end with the assistant's"
            )
    answers = tuple(item.get("answer") for item in examples)
    return EvaluationSet(path.stem, path, file.sha256, owner, tuple(conversations), tuple(texts), answers)


def _answered(item: dict[str, Any]) -> list[dict[str, str]]:
    messages = list(item["messages"])
    if "answer" in item and messages[-1]["role"] == "user":
        messages.append({"role": "assistant", "content": item["answer"]})
    return messages


def _read_text(path: Path, owner: str | None) -> EvaluationSet:
    file = read_text(path, EvaluationError, "plain text to evaluate")
    if not file.text.strip():
        raise EvaluationError(f"{path}: empty; there is nothing to evaluate")
    return EvaluationSet(path.stem, path, hashlib.sha256(file.raw).hexdigest(), owner, (), (file.text,))


def encode_set(
    data: EvaluationSet,
    tokenizer: Any,
    *,
    vocabulary: int,
    context: int,
    limit: int | None = None,
    window: int = WINDOW_TOKENS,
) -> EncodedSet:
    """Encode with an expert's tokenizer and chat template; `limit` keeps the first examples or windows.

    Raises:
        EvaluationError: nothing is left to evaluate, or the tokenizer gives a token that the model has no row for.
    """
    if data.conversations:
        found = [_encode_conversation(messages, tokenizer, data.path) for messages in data.conversations[:limit]]
    else:
        found = _windows(data.texts, tokenizer, min(window, context))[:limit]
    kept = tuple(number for number, item in enumerate(found) if item.answer_start < len(item.tokens) <= context)
    items = tuple(found[number] for number in kept)
    if not items:
        raise EvaluationError(f"{data.path}: no example with an answer fits the model's context of {context} tokens")
    largest = max(max(item.tokens) for item in items)
    if largest >= vocabulary:
        raise EvaluationError(
            f"{data.path}: the tokenizer gives token {largest}, the model has {vocabulary} embedding rows: tokenizer "
            "and weights do not belong together"
        )
    return EncodedSet(items, kept, len(found) - len(items))


def _encode_conversation(messages: tuple[dict[str, str], ...], tokenizer: Any, path: Path) -> EncodedItem:
    """The answer is what the template adds after the prompt, its end-of-turn token included."""
    turns, answer = list(messages), messages[-1]["content"]
    if not getattr(tokenizer, "chat_template", None):
        prompt = tokenizer("\n".join(turn["content"] for turn in turns[:-1]) + "\n").input_ids
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        tokens = [*prompt, *tokenizer(answer, add_special_tokens=False).input_ids, *end]
        return EncodedItem(tuple(tokens), len(prompt))
    try:
        before = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # templates raise whatever their author chose
        raise EvaluationError(f"{path}: the expert's chat template refuses an example: {error}") from error
    after = whole[len(before) :].rstrip() if whole.startswith(before) else answer + (tokenizer.eos_token or "")
    prompt = tokenizer(before, add_special_tokens=False).input_ids
    return EncodedItem((*prompt, *tokenizer(after, add_special_tokens=False).input_ids), len(prompt))


def _windows(texts: Sequence[str], tokenizer: Any, window: int) -> list[EncodedItem]:
    """Texts in windows; a window's first token is context alone, so that every token counts once at most."""
    items = []
    for text in texts:
        tokens = tokenizer(text).input_ids
        for start in range(0, len(tokens), window):
            part = tokens[start : start + window]
            if len(part) > 1:
                items.append(EncodedItem(tuple(part), 1))
    return items
