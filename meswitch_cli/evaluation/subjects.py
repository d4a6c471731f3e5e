"""What is evaluated: the base, the full experts and the compressed models, proven to belong together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.base import check_base_shapes, refuse_other_base
from meswitch_cli.artifact.coding import ServedWeights
from meswitch_cli.artifact.weights import ArtifactWeights
from meswitch_cli.checkpoint.fingerprint import short_fingerprint
from meswitch_cli.errors import CheckpointError, EvaluationError
from meswitch_cli.hub.fetch import find_artifact
from meswitch_cli.model.adapted import open_expert
from meswitch_cli.model.matching import make_plan
from meswitch_cli.model.tokenizer import load_tokenizer, tokenizer_folder
from meswitch_cli.model.weights import CheckpointWeights, Weights
from meswitch_cli.names import BASE as BASE

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "chat_template.jinja")


@dataclass(frozen=True)
class Expert:
    """A full fine-tune, with the label that tables and `LABEL=` options use and its own tokenizer."""

    label: str
    weights: CheckpointWeights
    tokenizer: Any


@dataclass(frozen=True)
class Candidate:
    """A compressed model of an expert: an artifact, or another method's delta made on the fly.

    Attributes:
        label: what tables call it.
        expert: label of the expert it stands for.
        kind: `artifact` or `baseline`.
        weights: its weights.
        facts: bytes on disk, hashes and settings, for the report.
        served: whether it is what an engine makes of an artifact, and not what is stored.
    """

    label: str
    expert: str
    kind: str
    weights: Weights
    facts: Mapping[str, Any] = field(default_factory=dict)
    served: bool = False

    def nbytes(self) -> int:
        """Bytes of the tensors on disk; a baseline knows its own once its weights have been read."""
        stored = self.facts.get("nbytes")
        return int(getattr(self.weights, "nbytes", 0) if stored is None else stored)


def open_experts(names: Sequence[str], base: CheckpointWeights) -> list[Expert]:
    """Open experts given as `PATH` or `LABEL=PATH`; without a label the folder's name is the label.

    Raises:
        CheckpointError: one cannot be used, or is not a fine-tune of the base.
        EvaluationError: two have one label, or tokenizers that give shared tokens other ids.
    """
    experts: list[Expert] = []
    for name in names:
        label, path = split_label(name)
        checkpoint = open_expert(path, base.checkpoint)
        make_plan(base.checkpoint, checkpoint)
        label = label or checkpoint.source.id.rpartition("/")[2]
        if label == BASE or any(expert.label == label for expert in experts):
            raise EvaluationError(f"two models are called {label!r}; name the expert: --expert LABEL=FOLDER")
        tokenizer = load_tokenizer(tokenizer_folder(checkpoint.side_folders))
        _refuse_other_tokenizer(base, tokenizer, checkpoint.source.path)
        experts.append(Expert(label, CheckpointWeights(checkpoint), tokenizer))
    return experts


def split_label(option: str) -> tuple[str | None, str]:
    """`LABEL=VALUE` in its parts; the label is None where there is no `=`, or a path stands before it."""
    label, found, value = option.partition("=")
    if not found or "/" in label or not label:
        return None, option
    return label, value


def open_artifacts(
    path: Path, base: CheckpointWeights, experts: Sequence[Expert], taken: Sequence[str]
) -> list[Candidate]:
    """As `open_artifact`; and of one that is stored bit for bit also what an engine serves, which is coded at loading.

    Raises:
        ArtifactError, EvaluationError: as `open_artifact`.
    """
    stored = open_artifact(path, base, experts, taken)
    assert isinstance(stored.weights, ArtifactWeights)
    artifact = stored.weights.artifact
    if not artifact.manifest.exact:
        return [stored]
    label = _free_label(f"{stored.label}-served", [BASE, *(item.label for item in experts), *taken])
    return [stored, replace(stored, label=label, weights=ServedWeights(artifact, base), served=True)]


def open_artifact(path: Path, base: CheckpointWeights, experts: Sequence[Expert], taken: Sequence[str]) -> Candidate:
    """Open an artifact (a folder or a Hub id), check every byte of it, and find the expert and base it was made from.

    Raises:
        ArtifactError: it is damaged, or made against another base.
        EvaluationError: it was made from none of the experts, or carries another tokenizer than its expert.
    """
    artifact = Artifact.open(find_artifact(path))
    check_base_shapes(artifact.manifest, base.checkpoint)
    refuse_other_base(artifact.manifest, base.fingerprint, base.checkpoint.source.path)
    owner = next(
        (item for item in experts if item.weights.fingerprint == artifact.manifest.expert.fingerprint),
        None,
    )
    if owner is None:
        given = ", ".join(f"{item.label} ({short_fingerprint(item.weights.fingerprint)})" for item in experts)
        raise EvaluationError(
            f"{path}: made from another expert, {artifact.manifest.expert.id} with fingerprint "
            f"{short_fingerprint(artifact.manifest.expert.fingerprint)}; given: {given}"
        )
    artifact.check_whole()
    _refuse_other_tokenizer_files(artifact.path, owner)
    named = path.resolve() if path.exists() else path
    others = [BASE, *(item.label for item in experts)]
    name = f"{named.name}-compressed" if named.name in others else named.name
    label = _free_label(name, [*others, *taken])
    facts = {
        "manifest_sha256": artifact.digest,
        "nbytes": artifact.manifest.nbytes,
        "settings": dict(artifact.manifest.settings),
    }
    return Candidate(label, owner.label, "artifact", ArtifactWeights(artifact, base), facts)


def _free_label(name: str, taken: Sequence[str]) -> str:
    label, number = name, 2
    while label in taken:
        label, number = f"{name}-{number}", number + 1
    return label


def _refuse_other_tokenizer(base: CheckpointWeights, tokenizer: Any, path: Path) -> None:
    """The same ids go through both models, so a token that both know must have one id."""
    try:
        theirs = load_tokenizer(base.checkpoint.source.path).get_vocab()
    except CheckpointError:
        return  # a base without a tokenizer says nothing about its tokens
    ours = tokenizer.get_vocab()
    other = next((token for token, number in theirs.items() if ours.get(token, number) != number), None)
    if other is not None or len(ours.keys() & theirs.keys()) < len(theirs) // 2:
        what = f"token {other!r} has ids {theirs[other]} and {ours[other]}" if other else "few tokens are common"
        raise EvaluationError(
            f"tokenizer mismatch: {path} and {base.checkpoint.source.path}: {what}; the models cannot be compared on "
            "the same tokens"
        )


def _refuse_other_tokenizer_files(artifact: Path, owner: Expert) -> None:
    folder = owner.weights.checkpoint.source.path
    for name in _TOKENIZER_FILES:
        files = [folder / name, artifact / name]
        if all(file.is_file() for file in files) and files[0].read_bytes() != files[1].read_bytes():
            raise EvaluationError(f"tokenizer mismatch: {files[0]} and {files[1]} differ")
