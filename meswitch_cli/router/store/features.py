"""The features of the training data: with them an expert is added or removed without the base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from meswitch_cli.router.backends.contract import NULL

#: The head is fitted on train; layer and regularisation are chosen on validation; temperature and thresholds are
#: fitted on calibration; figures are of test.
PARTS = ("train", "validation", "calibration", "test")


@dataclass(frozen=True)
class FeatureStore:
    """All examples, whatever their part.

    Attributes:
        features: `[n, d]` fp32, scaled and rounded to 16 bit, so that a refit sees what the first fit saw.
        targets: `[n, labels]` probability of each label; zeros for prompts of no domain.
        labels: `[n]` index of the certain label, `NULL` where there is none.
        parts: `[n]` index into `PARTS`.
        digests: `[n]` of the prompts' texts, to know them again.
    """

    features: torch.Tensor
    targets: torch.Tensor
    labels: torch.Tensor
    parts: torch.Tensor
    digests: torch.Tensor

    def rows(self, part: str, *, null: bool = False) -> torch.Tensor:
        """Mask of a part's rows with a certain label, or with `null` of those of no domain."""
        inside = self.parts == PARTS.index(part)
        return inside & (self.labels == NULL) & (self.targets.sum(1) == 0) if null else inside & (self.labels != NULL)

    def training_rows(self) -> torch.Tensor:
        """Rows that the head is fitted on, uncertain labels included."""
        return (self.parts == PARTS.index("train")) & (self.targets.sum(1) > 0)

    def joined(self, other: FeatureStore) -> FeatureStore:
        """Both stores' examples; their labels must be the same."""
        pairs = zip(self.tensors().values(), other.tensors().values(), strict=True)
        return FeatureStore.from_tensors(
            dict(zip(self.tensors(), (torch.cat([mine, theirs]) for mine, theirs in pairs), strict=True))
        )

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
        return FeatureStore(self.features[kept], targets[kept], labels[kept], self.parts[kept], self.digests[kept])

    def tensors(self) -> dict[str, torch.Tensor]:
        return {
            "features": self.features.half(),
            "targets": self.targets,
            "labels": self.labels.to(torch.int16),
            "parts": self.parts.to(torch.uint8),
            "digests": self.digests,
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> FeatureStore:
        return cls(
            tensors["features"].float(),
            tensors["targets"],
            tensors["labels"].long(),
            tensors["parts"],
            tensors["digests"],
        )
