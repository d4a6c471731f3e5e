"""The model card: what an artifact is, under which licence, how near it is to its fine-tune, and how it is used."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meswitch_cli.artifact.manifest import Manifest, ModelReference, mean_errors
from meswitch_cli.errors import ArtifactError

MODEL_CARD = "README.md"
MAX_CARD_BYTES = 1 << 20
#: Tags of every artifact's card, whatever its expert is about.
OUR_TAGS = ("meswitch", "delta-compression")
#: What the Hub calls a licence that nobody told.
UNKNOWN_LICENCE = "unknown"
#: Members of a card's front matter that tell a licence.
_LICENCE_KEYS = ("license", "license_name", "license_link")
#: How the Hub spells licences; it refuses a card with any other in "license".
_LICENCE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_USE, _END_OF_USE = "<!-- use, generated -->", "<!-- end of use -->"
_HERE = "."


def split_front_matter(text: str) -> tuple[str, str]:
    """(the YAML in front, the rest) of a card; the first is empty where there is none."""
    parts = re.split(r"^---[ \t]*$\n?", text, maxsplit=2, flags=re.MULTILINE)
    return ("", text) if len(parts) < 3 or parts[0].strip() else (parts[1], parts[2])


@dataclass(frozen=True)
class Card:
    """A README.md with YAML in front of its Markdown.

    Attributes:
        front: the front matter's members; empty where there is none, or it is no YAML mapping.
        body: the rest.
    """

    front: Mapping[str, Any]
    body: str

    @classmethod
    def parse(cls, text: str) -> Card:
        import yaml

        front, body = split_front_matter(text)
        try:
            members = yaml.safe_load(front)
        except yaml.YAMLError:
            members = None
        return cls(members if isinstance(members, dict) else {}, body)

    @classmethod
    def read(cls, folder: Path) -> Card:
        """The card of a model's folder; an empty one where there is none that can be read."""
        path = folder / MODEL_CARD
        try:
            if path.stat().st_size > MAX_CARD_BYTES:
                return cls({}, "")
            return cls.parse(path.read_text(encoding="utf-8-sig", errors="replace"))
        except OSError:
            return cls({}, "")

    @property
    def text(self) -> str:
        import yaml

        if not self.front:
            return self.body
        front = yaml.safe_dump(dict(self.front), sort_keys=False, allow_unicode=True, width=1 << 20)
        return f"---\n{front}---\n{self.body}"

    @property
    def licence(self) -> dict[str, str]:
        """The licence that it tells, in the words of a card's front matter; `unknown` where it tells none."""
        told = {key: self.front[key] for key in _LICENCE_KEYS if isinstance(self.front.get(key), str)}
        identifier = told.get("license", "").strip()
        if not identifier:
            return {"license": UNKNOWN_LICENCE}
        if _LICENCE_ID.fullmatch(identifier):
            return told | {"license": identifier}
        return {"license": "other", "license_name": identifier} | {
            key: value for key, value in told.items() if key == "license_link"
        }

    def published(self, repo: str, *, base_model: str | None = None, licence: str | None = None) -> Card:
        """The card for a Hub repository: its commands name that, and what is given stands in place of what it says.

        Args:
            repo: `owner/name`.
            base_model: the fine-tune's own repository.
            licence: as the Hub spells it.

        Raises:
            ArtifactError: `base_model` is no repository's id, or `licence` no licence's.
        """
        front = dict(self.front)
        if licence is not None:
            if not _LICENCE_ID.fullmatch(licence):
                raise ArtifactError(f"licence {licence!r}: write it as the Hub does, for instance apache-2.0 or other")
            front = {key: value for key, value in front.items() if key not in _LICENCE_KEYS} | {"license": licence}
        if base_model is not None:
            if not _HUB_ID.fullmatch(base_model):
                raise ArtifactError(f"fine-tune {base_model!r}: not a Hub id (owner/name)")
            front |= {"base_model": base_model, "base_model_relation": "quantized"}
        return Card(front, self._body_naming(repo))

    def _body_naming(self, repo: str) -> str:
        before, mark, rest = self.body.partition(_USE)
        _, end, after = rest.partition(_END_OF_USE)
        base = re.search(r"--base (.+?) --", rest)
        if not mark or not end or not base:
            return self.body
        return before + _use(shlex.split(base[1])[0], repo) + after


def model_card(manifest: Manifest, expert_card: Card, expert_nbytes: int, form: str) -> bytes:
    """The card of a new artifact.

    Args:
        manifest: the artifact's.
        expert_card: the fine-tune's own card, which alone tells its licence.
        expert_nbytes: of the fine-tune's weights.
        form: what the artifact stores, as "a 1-bit delta".
    """
    front: dict[str, Any] = {"library_name": "meswitch", "pipeline_tag": "text-generation"} | expert_card.licence
    if _on_hub(manifest.expert):
        front |= {"base_model": manifest.expert.id, "base_model_relation": "quantized"}
    front["tags"] = list(OUR_TAGS)
    errors = mean_errors(manifest.tensors)
    figures = {
        "size": f"{manifest.nbytes / 1e6:.1f} MB",
        "the fine-tune's size": f"{expert_nbytes / 1e6:.1f} MB",
        "times smaller": f"{expert_nbytes / max(manifest.nbytes, 1):.1f}",
        "weight error, part of the delta's energy": _share(errors["weight_error"]),
        "output error, part of the delta's output": _share(errors["output_error"]),
    }
    told = {key: value for key, value in manifest.settings.items() if value is not None and not isinstance(value, dict)}
    settings = {key.replace("_", " "): value for key, value in told.items()}
    base, expert = (_named(item) for item in (manifest.base, manifest.expert))
    body = f"""
# {manifest.expert.id}, as {form} against {manifest.base.id}

This is {expert}, compressed against {base}. Every number of the fine-tune is the base's plus what is stored here, so it
needs that base to run.

{_use(manifest.base.id, _HERE)}

{_table("figure", figures)}

{_table("setting", settings)}
"""
    return Card(front, body).text.encode()


def _use(base: str, artifact: str) -> str:
    name = artifact.rpartition("/")[2] if artifact != _HERE else "expert"
    named, quoted = shlex.quote(base), shlex.quote(artifact)
    return f"""{_USE}
```python
import meswitch_cli as meswitch

model = meswitch.load({json.dumps(base, ensure_ascii=False)}, {json.dumps(artifact)})
```

```
meswitch verify {quoted} --base {named} --full
meswitch serve --base {named} --expert {shlex.quote(name)}={quoted}
meswitch restore {quoted} --base {named} --out restored
```
{_END_OF_USE}"""


def _table(head: str, rows: Mapping[str, Any]) -> str:
    return "\n".join([f"| {head} | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])


def _share(value: float | None) -> str:
    return "not measured" if value is None else f"{100 * value:.2f} %"


def _on_hub(model: ModelReference) -> bool:
    """Whether it was read from a Hub repository: a folder's name has no owner."""
    return bool(_HUB_ID.fullmatch(model.id))


def _named(model: ModelReference) -> str:
    if not _on_hub(model):
        return f"`{model.id}`"
    at = f" at `{model.revision[:12]}`" if model.revision else ""
    return f"[{model.id}](https://huggingface.co/{model.id}){at}"
