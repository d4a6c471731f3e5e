"""Where a fine-tuning stands: it can be left in a folder and gone on with, to the same weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from meswitch_cli.artifact.disk import disk_errors, sync_folder

FILE = "fine_tuning.safetensors"
#: The moments of AdamW, as its state names them.
_MOMENTS = ("exp_avg", "exp_avg_sq")


class TrainingState:
    """Weights, AdamW's moments, and the best weights so far.

    Attributes:
        losses: of each step.
        validation: loss by the number of steps done.
        best_step: 0 before anything was judged.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        self._parameters, self._optimizer = parameters, optimizer
        self._best: dict[str, torch.Tensor] = {}
        self.losses: list[float] = []
        self.validation: dict[int, float] = {}
        self.best_step = 0

    @property
    def steps(self) -> int:
        return len(self.losses)

    def judged(self, loss: float) -> None:
        """Keep what validation says of the weights of now, and them where they are the best."""
        if loss < min(self.validation.values(), default=float("inf")):
            self._best = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
            self.best_step = self.steps
        self.validation[self.steps] = loss

    def take_best(self) -> None:
        """Put the best weights in place; where nothing was judged those of now stay."""
        for name, tensor in self._best.items():
            self._parameters[name].data.copy_(tensor)
        self.best_step = self.best_step or self.steps

    def save(self, folder: Path, identity: str) -> None:
        """Leave everything in `folder`, over what lies there.

        Args:
            identity: of data and settings; only a training of the same goes on from it.

        Raises:
            ArtifactError: the disk refuses.
        """
        tensors = {f"now.{name}": parameter.detach() for name, parameter in self._parameters.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self._best.items()}
        for name, parameter in self._parameters.items():
            of_one = self._optimizer.state.get(parameter, {})
            tensors |= {f"{moment}.{name}": of_one[moment] for moment in _MOMENTS if moment in of_one}
        told = {"identity": _digest(identity), "losses": self.losses, "best_step": self.best_step}
        told |= {"validation": list(self.validation.items())}
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            temporary = folder / (FILE + ".tmp")
            # Written by the library: as bytes it would be in memory twice.
            safetensors.torch.save_file(tensors, temporary, {"state": json.dumps(told)})
            temporary.rename(folder / FILE)
            sync_folder(folder)

    def resume(self, folder: Path, identity: str) -> None:
        """Go on from what lies in `folder`; nothing happens where it is of another training, or damaged."""
        try:
            with safetensors.safe_open(folder / FILE, "pt") as file:
                told = json.loads((file.metadata() or {})["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, safetensors.SafetensorError, KeyError, ValueError):
            return
        if told.get("identity") != _digest(identity) or not self._fits(tensors):
            return
        self.losses, self.best_step = list(told["losses"]), int(told["best_step"])
        self.validation = {int(step): float(loss) for step, loss in told["validation"]}
        for name, parameter in self._parameters.items():
            parameter.data.copy_(tensors[f"now.{name}"])
            self._best[name] = tensors[f"best.{name}"]
            moments: dict[str, Any] = {moment: tensors[f"{moment}.{name}"] for moment in _MOMENTS}
            self._optimizer.state[parameter] = {"step": torch.tensor(float(self.steps)), **moments}

    def _fits(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        return all(
            f"{kind}.{name}" in tensors and tensors[f"{kind}.{name}"].shape == parameter.shape
            for name, parameter in self._parameters.items()
            for kind in ("now", "best", *_MOMENTS)
        )


def _digest(identity: str) -> str:
    return hashlib.sha256(identity.encode("utf-8", "surrogatepass")).hexdigest()
