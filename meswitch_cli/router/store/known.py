"""The beginnings of the prompts that a router knows, so that it can name those near to one that it is asked about."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from meswitch_cli.errors import RouterError

KNOWN_FILE = "known.json"
#: Characters of a prompt that are kept.
EXCERPT = 120
_MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class KnownPrompt:
    """A prompt of the gate.

    Attributes:
        digest: of the whole text, as `FeatureStore` has it.
        field: the expert, "no domain", or the field of a general prompt.
        excerpt: its beginning, on one line.
    """

    digest: int
    field: str
    excerpt: str

    @classmethod
    def of(cls, text: str, digest: int, field: str) -> KnownPrompt:
        line = " ".join(text[: 2 * EXCERPT].split())
        return cls(digest, field, line if len(line) <= EXCERPT else f"{line[: EXCERPT - 3]}...")


def to_json(prompts: Sequence[KnownPrompt]) -> str:
    lines = (json.dumps([item.digest, item.field, item.excerpt], ensure_ascii=False) for item in prompts)
    return "[\n" + ",\n".join(lines) + "\n]\n"


def read_known(path: Path, count: int) -> tuple[KnownPrompt, ...]:
    """The prompts of a router whose gate has `count` points, in their order.

    Raises:
        RouterError: the file cannot be read, or holds something else.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise RouterError(f"{path}: larger than such a file can be")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise RouterError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise RouterError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, list) or len(value) != count:
        raise RouterError(f"{path}: must be a list of the gate's {count} prompts")
    for item in value:
        if not isinstance(item, list) or [type(part) for part in item] != [int, str, str]:
            raise RouterError(f"{path}: {str(item)[:80]!r} is not a digest, a field and an excerpt")
    return tuple(KnownPrompt(digest, field[:80], excerpt[:EXCERPT]) for digest, field, excerpt in value)
