"""The features of the training data: with them an expert is added or removed without the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from meswitch_cli.router.backends.contract import NULL

#: The head is fitted on train; layer and regularisation are chosen on validation; temperature and thresholds are
#: fitted on calibration; figures are of test.
PARTS = ("train", "validation", "calibration", "test")
#: The part of the prompts that come with the package, as a number beside the indices into `PARTS`.
GENERAL = len(PARTS)


@dataclass(frozen=True)
class FeatureStore:
    """All examples, whatever their part.

    Attributes:
        features: `[n, d]` fp32, scaled and rounded to 16 bit, so that a refit sees what the first fit saw.
        targets: `[n, labels]` probability of each label; zeros for prompts of no domain.
        labels: `[n]` index of the certain label, `NULL` where there is none.
        parts: `[n]` index into `PARTS`, or `GENERAL`.
        digests: `[n]` of the prompts' texts, to know them again.
        lengths: `[n]` characters.
        fields: `[n]` number of a general prompt's field, -1 for every other; groups: `[n]` number of the wide field
            that it is a part of.
    """

    features: torch.Tensor
    targets: torch.Tensor
    labels: torch.Tensor
    parts: torch.Tensor
    digests: torch.Tensor
    lengths: torch.Tensor
    fields: torch.Tensor
    groups: torch.Tensor

    def rows(self, part: str, *, null: bool = False) -> torch.Tensor:
        """Mask of a part's rows with a certain label, or with `null` of those of no domain."""
        inside = self.parts == PARTS.index(part)
        return inside & (self.labels == NULL) & (self.targets.sum(1) == 0) if null else inside & (self.labels != NULL)

    def training_rows(self) -> torch.Tensor:
        """Rows that the head is fitted on, uncertain labels included."""
        return (self.parts == PARTS.index("train")) & (self.targets.sum(1) > 0)

    def general_rows(self) -> torch.Tensor:
        """Rows of the prompts that come with the package."""
        return self.parts == GENERAL

    def joined(self, other: FeatureStore) -> FeatureStore:
        """Both stores' examples; their labels must be the same."""
        pairs = zip(self.tensors().values(), other.tensors().values(), strict=True)
        return FeatureStore.from_tensors(
            dict(zip(self.tensors(), (torch.cat([mine, theirs]) for mine, theirs in pairs), strict=True))
        )

    def without(self, digests: Sequence[int]) -> FeatureStore:
        """The examples but for those of these texts."""
        kept = ~torch.isin(self.digests, torch.tensor(list(digests)))
        return FeatureStore.from_tensors({name: tensor[kept] for name, tensor in self.tensors().items()})

    def relabelled(self, old: tuple[str, ...], new: tuple[str, ...]) -> FeatureStore:
        """The same examples under other labels; those of a label that is gone are dropped."""
        kept = (self.labels == NULL) | torch.tensor([label in new for label in old])[self.labels]
        index = torch.tensor([new.index(label) if label in new else NULL for label in old])
        labels = torch.where(self.labels == NULL, NULL, index[self.labels])
        targets = torch.zeros(len(self.labels), len(new))
        for position, label in enumerate(old):
            if label in new:
                targets[:, new.index(label)] = self.targets[:, position]
        total = targets.sum(1, keepdim=True)
        targets = torch.where(total > 0, targets / total.clamp_min(1e-9), targets)
        rest = (self.parts, self.digests, self.lengths, self.fields, self.groups)
        return FeatureStore(self.features[kept], targets[kept], labels[kept], *(tensor[kept] for tensor in rest))

    def tensors(self) -> dict[str, torch.Tensor]:
        return {
            "features": self.features.half(),
            "targets": self.targets,
            "labels": self.labels.to(torch.int16),
            "parts": self.parts.to(torch.uint8),
            "digests": self.digests,
            "lengths": self.lengths.to(torch.int32),
            "fields": self.fields.to(torch.int16),
            "groups": self.groups.to(torch.int16),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> FeatureStore:
        """The store of these tensors; one of format version 1 knows no lengths and no general prompts."""
        nothing = torch.full((len(tensors["labels"]),), -1)
        return cls(
            tensors["features"].float(),
            tensors["targets"],
            tensors["labels"].long(),
            tensors["parts"],
            tensors["digests"],
            tensors.get("lengths", nothing).long(),
            tensors.get("fields", nothing).long(),
            tensors.get("groups", nothing).long(),
        )
