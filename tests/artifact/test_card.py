"""What a model card says: nothing that nobody told."""

from __future__ import annotations

import ast
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.card import Card
from meswitch_cli.errors import ArtifactError
from zoo.tiny import Pair

Make = Callable[..., Artifact]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _front(artifact: Artifact) -> dict[str, Any]:
    _, front, _ = (artifact.path / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front)


def _in_cache(folder: Path, root: Path, repo: str) -> Path:
    """A folder as it lies in the Hub's cache."""
    place = root / f"models--{repo.replace('/', '--')}" / "snapshots" / COMMIT
    shutil.copytree(folder, place)
    return place


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        (None, {"license": "unknown"}),
        ("# no front matter\nlicense: mit", {"license": "unknown"}),
        ("---\ntags: [a]\n---\n", {"license": "unknown"}),
        ("---\nlicense: [mit]\n---\n", {"license": "unknown"}),
        ("---\n{: not yaml\n---\n", {"license": "unknown"}),
        ("---\nlicense: llama3.1\n---\n# x", {"license": "llama3.1"}),
        ("\ufeff---\nlicense: apache-2.0\n---\n", {"license": "apache-2.0"}),
        (
            "---\nlicense: other\nlicense_name: mrl\nlicense_link: LICENSE\n---\n",
            {"license": "other", "license_name": "mrl", "license_link": "LICENSE"},
        ),
        ("---\nlicense: My Own Terms\n---\n", {"license": "other", "license_name": "My Own Terms"}),
    ],
)
def test_the_licence_is_the_experts_or_unknown(
    card: str | None, licence: dict[str, str], pair: Pair, make_artifact: Make, tmp_path: Path
) -> None:
    expert = Path(shutil.copytree(pair[1], tmp_path / "expert"))
    if card is not None:
        (expert / "README.md").write_text(card)
    front = _front(make_artifact((pair[0], expert)))
    assert {key: value for key, value in front.items() if key.startswith("license")} == licence
    assert front["pipeline_tag"] == "text-generation" and front["library_name"] == "meswitch"


def test_a_fine_tune_from_the_hub_is_the_base_model(pair: Pair, make_artifact: Make, tmp_path: Path) -> None:
    expert = _in_cache(pair[1], tmp_path, "ann/llama-maths")
    artifact = make_artifact((pair[0], expert))
    assert artifact.manifest.expert.id == "ann/llama-maths" and artifact.manifest.expert.revision == COMMIT
    front = _front(artifact)
    assert (front["base_model"], front["base_model_relation"]) == ("ann/llama-maths", "quantized")
    text = (artifact.path / "README.md").read_text()
    assert f"[ann/llama-maths](https://huggingface.co/ann/llama-maths) at `{COMMIT[:12]}`" in text
    assert f"| size | {artifact.manifest.nbytes / 1e6:.1f} MB |" in text and "weight error" in text


def test_a_card_for_a_repository_names_it_and_keeps_what_people_wrote(pair: Pair, make_artifact: Make) -> None:
    artifact = make_artifact(pair)
    written = Card.read(artifact.path)
    edited = Card({**written.front, "language": ["de"]}, written.body + "\nThanks to Ann.\n")
    card = edited.published("bob/maths-1bit", base_model="ann/llama-maths", licence="mit")
    again = Card.parse(card.text)
    assert again.front == {
        **edited.front,
        "license": "mit",
        "base_model": "ann/llama-maths",
        "base_model_relation": "quantized",
    }
    assert again.body.endswith("\nThanks to Ann.\n")
    commands = [shlex.split(line) for line in again.body.splitlines() if line.startswith("meswitch ")]
    assert commands == [
        ["meswitch", "verify", "bob/maths-1bit", "--base", "base", "--full"],
        ["meswitch", "serve", "--base", "base", "--expert", "maths-1bit=bob/maths-1bit"],
        ["meswitch", "restore", "bob/maths-1bit", "--base", "base", "--out", "restored"],
    ]
    call = next(line for line in again.body.splitlines() if line.startswith("model = "))
    assert ast.literal_eval(call.partition("load")[2]) == ("base", "bob/maths-1bit")
    assert Card.parse(again.published("bob/maths-1bit").text) == again


def test_a_card_that_is_not_ours_keeps_its_body() -> None:
    card = Card.parse("---\nlicense: mit\n---\n# Mine\n")
    assert card.published("a/b").text == card.text == "---\nlicense: mit\n---\n# Mine\n"
    assert Card.parse("# Mine\n---\nmore\n---\n").published("a/b").text == "# Mine\n---\nmore\n---\n"


@pytest.mark.parametrize("wrong", [{"base_model": "maths"}, {"licence": "My Own"}, {"base_model": "a/b/c"}])
def test_what_the_hub_would_refuse_is_refused_first(wrong: dict[str, str]) -> None:
    with pytest.raises(ArtifactError, match=r"not a Hub id|write it as the Hub does"):
        Card({}, "").published("a/b", **wrong)
