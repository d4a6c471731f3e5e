"""Prompts for an expert of whom nobody gave any: what its model card shows, and the general prompts of its field."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from meswitch_cli.artifact.card import MAX_CARD_BYTES, MODEL_CARD, OUR_TAGS, split_front_matter
from meswitch_cli.errors import RouterError
from meswitch_cli.router.decide.conversation import is_binary
from meswitch_cli.router.decide.labels import check_label
from meswitch_cli.router.train.data import Example
from meswitch_cli.router.train.general import general_prompts

#: Two words are of one stem where so many of their first letters agree: "maths" and "mathematics".
_STEM = 4
#: Words of field names that say nothing of a field.
_COMMON = frozenset(["with", "from", "other", "writing", "reading", "people", "text", "tasks"])


def examples_from_card(name: str, folder: Path) -> list[Example]:
    """Prompts of an expert: its card's `widget` examples, and the general prompts of the fields that it is about.

    A field is meant where a word of its name has the stem of a word of the expert's name, or of the card's `tags`,
    `pipeline_tag`, `datasets` and first heading. What an artifact's card says of itself and of its base says nothing of
    the expert.

    Raises:
        RouterError: the card cannot be read, or names no field that there are prompts of.
    """
    check_label(name, "--auto")
    front, body = _card(folder / MODEL_CARD)
    heading = next((line.lstrip("# ") for line in body.splitlines() if line.startswith("# ")), "")
    if front.get("library_name") == "meswitch":
        heading = heading.partition(", as ")[0]
    told = [item for key in ("tags", "pipeline_tag", "datasets") for item in _strings(front.get(key))]
    said = [name, heading, *(item for item in told if item not in OUR_TAGS)]
    stems = {stem for text in said for stem in _stems(text)}
    meant = {_wide(prompt) for prompt in general_prompts() if _stems(str(prompt.group)) & stems}
    found = [
        replace(prompt, domain=name, group=None, where=f"{name}: {prompt.where}")
        for prompt in general_prompts()
        if _wide(prompt) in meant
    ]
    widgets = front.get("widget")
    for item in widgets if isinstance(widgets, list) else []:
        text = item.get("text") if isinstance(item, dict) else None
        if isinstance(text, str) and text.strip() and not is_binary(text):
            found.append(Example(text.strip(), name, f"{folder / MODEL_CARD}: widget"))
    if not found:
        raise RouterError(
            f"expert {name!r}: neither its name nor its card says a field that there are prompts of; "
            f"give some: --expert {name}=FILE"
        )
    return found


def _wide(prompt: Example) -> str:
    """The wide field: an expert for a part of it is asked about all of it."""
    return str(prompt.group).partition(":")[0]


def _card(path: Path) -> tuple[dict[object, object], str]:
    """(front matter, the rest); both empty where there is no card."""
    if not path.is_file():
        return {}, ""
    try:
        if path.stat().st_size > MAX_CARD_BYTES:
            raise RouterError(f"{path}: larger than a model card can be")
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise RouterError(f"{path}: cannot be read: {error.strerror}") from error
    import yaml

    front, body = split_front_matter(text)
    try:
        members = yaml.safe_load(front)
    except yaml.YAMLError as error:
        raise RouterError(f"{path}: its front matter is not valid YAML") from error
    return (members if isinstance(members, dict) else {}), body


def _strings(value: object) -> Sequence[str]:
    if isinstance(value, str):
        return [value]
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _stems(text: str) -> set[str]:
    words = re.findall(r"[a-z]+", text.casefold())
    return {word[:_STEM] for word in words if len(word) >= _STEM and word not in _COMMON} | {
        word for word in words if word == "law"
    }
