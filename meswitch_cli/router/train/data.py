"""Labelled prompts from JSONL, checked and without duplicates."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from meswitch_cli.errors import RouterError
from meswitch_cli.jsonl import read_jsonl
from meswitch_cli.router.decide.conversation import Prompt, is_binary, routing_text
from meswitch_cli.router.decide.labels import check_label

#: Fewer prompts do not tell what a field is.
MIN_PROMPTS = 5
#: More of a domain do not make a better router, only a slower training (docs/results/router.md).
MAX_PROMPTS = 500
#: Of a text without a question, so much is read: as much as of a prompt, about.
TEXT_CHARACTERS = 1000
MAX_FILE_BYTES = 2 << 30
_ROLES = ("system", "user", "assistant", "tool", "developer")


@dataclass(frozen=True)
class Example:
    """A prompt and where it belongs.

    Attributes:
        domain: an expert's name; None: out of every expert's domain.
        group: examples of one group (a template, a document) are never dealt into two parts.
        response: what a good answer is, where the data say it.
        soft: probability of each label, where the label is not certain (`--auto-label`).
        where: file and line.
    """

    text: str
    domain: str | None
    where: str
    group: str | None = None
    response: str | None = None
    soft: Mapping[str, float] | None = None

    @property
    def digest(self) -> int:
        """64 bits of the text's SHA-256, spacing and case aside: equal for duplicates."""
        normal = " ".join(self.text.split()).casefold()
        return int.from_bytes(hashlib.sha256(normal.encode()).digest()[:8], "big", signed=True)


@dataclass(frozen=True)
class RoutingData:
    """Examples without duplicates, their labels in alphabetical order, and how many duplicates were dropped."""

    examples: tuple[Example, ...]
    labels: tuple[str, ...]
    duplicates: int


def read_examples(path: Path, *, domain: str | None = None, need_domain: bool = True) -> list[Example]:
    """Read JSONL whose lines are `{"prompt" | "messages" | "text", "domain"[, "response"][, "group"]}`.

    "text" is what calibration data may have; its beginning stands for the prompt.

    With `domain` given, every line is of that domain and need not say so.

    Raises:
        RouterError: the file cannot be read, or a line is none of these (its number is given).
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise RouterError(f"{path}: larger than 2 GB; a few thousand prompts a domain are enough")
    except OSError as error:
        raise RouterError(f"{path}: cannot be read: {error.strerror}") from error
    values = read_jsonl(path, RouterError, "routing data").values
    return [_example(f"{path}: line {number}", value, domain, need_domain) for number, value in values]


def _example(where: str, item: Any, domain: str | None, need_domain: bool) -> Example:
    if not isinstance(item, dict):
        raise RouterError(f'{where}: not an object with "prompt" or "messages"')
    text = _text(where, item)
    found = item.get("domain")
    if domain is None and need_domain and "domain" not in item:
        raise RouterError(f'{where}: has no "domain"; give a name, or null for a prompt of no expert\'s domain')
    if found is not None:
        if not isinstance(found, str):
            raise RouterError(f'{where}: "domain" must be a name or null, not {found!r}')
        check_label(found, where)
        if domain not in (None, found):
            raise RouterError(f"{where}: unknown domain {found!r}: the file was given for {domain!r}")
    group, response = item.get("group"), item.get("response")
    return Example(
        text,
        domain or found,
        where,
        str(group) if group is not None else None,
        response if isinstance(response, str) and response.strip() else None,
    )


def _text(where: str, item: dict[str, Any]) -> str:
    prompt: Prompt
    if isinstance(item.get("prompt"), str):
        prompt = item["prompt"]
    elif isinstance(item.get("text"), str):
        prompt = item["text"][:TEXT_CHARACTERS]
    elif isinstance(item.get("messages"), list):
        prompt = item["messages"]
        if not all(isinstance(turn, dict) and turn.get("role") in _ROLES for turn in prompt):
            raise RouterError(f'{where}: "messages" must be a list of objects with "role" and "content"')
    else:
        raise RouterError(f'{where}: needs "prompt", "messages" or "text"')
    text = routing_text(prompt)
    if not text:
        raise RouterError(f"{where}: the prompt is empty")
    if is_binary(text):
        raise RouterError(f"{where}: the prompt is binary data, not text")
    return text


def gather(examples: Sequence[Example], *, min_prompts: int = MIN_PROMPTS) -> RoutingData:
    """Drop duplicates and check that a router can be trained.

    Raises:
        RouterError: the same prompt under two domains, fewer than two domains, or too few prompts in one.
    """
    kept, duplicates = without_duplicates(examples)
    counts = Counter(example.domain for example in kept if example.domain is not None)
    if len(counts) < 2:
        only = ", ".join(map(repr, counts)) or "none"
        raise RouterError(f"a router chooses between at least two domains; the data has {only}")
    for name, count in sorted(counts.items()):
        if count < min_prompts:
            raise RouterError(f"domain {name!r} has {count} different prompts; at least {min_prompts} are needed")
    return RoutingData(tuple(kept), tuple(sorted(counts)), duplicates)


def thinned(data: RoutingData, limit: int, seed: int) -> tuple[RoutingData, dict[str, int]]:
    """At most `limit` prompts of each domain, and of none, and how many those with more had.

    They are chosen by a hash of the text that the seed salts, spread over the domain's groups: of each in turn.
    """
    by_domain: dict[str | None, list[Example]] = {}
    for example in data.examples:
        by_domain.setdefault(example.domain, []).append(example)
    kept: set[int] = set()
    for members in by_domain.values():
        ordered = sorted(members, key=lambda item: hashlib.sha256(f"{seed}/{item.digest}".encode()).digest())
        turns: Counter[str] = Counter()
        ranked: list[tuple[int, int, int]] = []
        for example in ordered:
            group = example.group if example.group is not None else f"text {example.digest}"
            ranked.append((turns[group], len(ranked), example.digest))
            turns[group] += 1
        kept.update(digest for *_, digest in sorted(ranked)[:limit])
    found = tuple(example for example in data.examples if example.digest in kept)
    counts = {str(domain): len(members) for domain, members in by_domain.items() if len(members) > limit}
    return replace(data, examples=found), counts


def without_duplicates(examples: Sequence[Example]) -> tuple[list[Example], int]:
    """The first of each set of equal prompts, and how many were dropped.

    Raises:
        RouterError: equal prompts have different domains.
    """
    first: dict[int, Example] = {}
    for example in examples:
        known = first.setdefault(example.digest, example)
        if known.domain != example.domain:
            raise RouterError(
                f"{example.where}: the same prompt is {example.domain!r} here and {known.domain!r} at {known.where}; "
                "a prompt has one domain: delete one of the two lines"
            )
    return list(first.values()), len(examples) - len(first)


def only_known_domains(examples: Sequence[Example], labels: Sequence[str]) -> None:
    """Check that a router knows every domain.

    Raises:
        RouterError: it does not.
    """
    for example in examples:
        if example.domain is not None and example.domain not in labels:
            raise RouterError(
                f"{example.where}: unknown domain {example.domain!r}; this router knows {', '.join(labels)}"
            )


def with_soft_label(example: Example, probabilities: Mapping[str, float], domain: str | None) -> Example:
    """The example under the label its experts' losses gave it."""
    return replace(example, domain=domain, soft=dict(probabilities))
