"""Activation statistics of a model, one decoder layer in memory at a time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from meswitch_cli.delta.statistics import InputStatistics
from meswitch_cli.errors import CalibrationError, CheckpointError
from meswitch_cli.model.streaming import StreamedModel
from meswitch_cli.model.weights import Weights

#: The statistics of a layer's linears by parameter name.
LayerStatistics = dict[str, InputStatistics]


class _Collector:
    """Sums of second moments of linears' inputs, filled by forward hooks while it is entered."""

    def __init__(self, linears: Mapping[str, nn.Module], gram: bool, keep: bool) -> None:
        self._gram, self._keep = gram, keep
        self._energy: dict[str, torch.Tensor] = {}
        self._grams: dict[str, torch.Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._inputs: dict[str, list[torch.Tensor]] = {}
        self._last: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None] = (None, None, None)
        self._linears, self._handles = linears, list[RemovableHandle]()

    def __enter__(self) -> _Collector:
        self._handles = [module.register_forward_pre_hook(self._hook(name)) for name, module in self._linears.items()]
        return self

    def __exit__(self, *_exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._last = (None, None, None)

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def observe(_module: nn.Module, args: tuple[Any, ...]) -> None:
            self.add(name, args[0])

        return observe

    def add(self, name: str, inputs: torch.Tensor) -> None:
        """Take inputs `[..., in]` of the linear with this weight name into its sums."""
        energy, gram = self._moments(inputs)
        self._tokens[name] = self._tokens.get(name, 0) + inputs.numel() // inputs.shape[-1]
        self._energy[name] = self._energy[name] + energy if name in self._energy else energy
        if self._keep:
            self._inputs.setdefault(name, []).append(inputs.detach().reshape(-1, inputs.shape[-1]).float())
        if gram is not None:
            self._grams[name] = self._grams[name] + gram if name in self._grams else gram

    def _moments(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(energy, gram) of inputs; projections that read the same tensor one after another share them."""
        last, energy, gram = self._last
        if last is inputs and energy is not None:
            return energy, gram
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        energy = rows.square().sum(0, dtype=torch.float64)
        gram = rows.T @ rows if self._gram else None
        self._last = (inputs, energy, gram)
        return energy, gram

    def statistics(self) -> LayerStatistics:
        return {
            name: InputStatistics(
                energy.float(),
                self._grams.get(name),
                self._tokens[name],
                torch.cat(self._inputs[name]) if self._keep else None,
            )
            for name, energy in self._energy.items()
        }


def calibration_dtype(stored: torch.dtype, device: torch.device | str, *, few_tokens: bool) -> torch.dtype:
    """What to run a model in whose weights are stored so: fp32 on a CPU, else as they are.

    Few tokens run in bf16 weights as they are everywhere, because reading weights is what they cost.
    """
    as_stored = torch.device(device).type != "cpu" or (few_tokens and stored == torch.bfloat16)
    return stored if as_stored else torch.float32


@torch.no_grad()
def stream_statistics(
    weights: Weights,
    windows: torch.Tensor,
    *,
    gram: bool = False,
    keep: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[int, LayerStatistics]]:
    """Run token windows `[n, length]` through a model once; yield the input statistics of each part as it passes.

    Args:
        weights: the full fine-tune's; its activations are the ones that count.
        windows: int64 token ids.
        gram: also sum x x^T, `[in, in]` for every linear of one layer.
        keep: also keep the inputs, `[tokens, in]` for every linear of one layer: for few tokens.
        device, dtype: where layers run, and in what.

    Yields:
        (index, statistics by parameter name): of every decoder layer in order, and last, under the number of layers,
        of the language-model head. A layer's may be larger than its weights: let go of them before asking for the next.

    Raises:
        CalibrationError, CheckpointError: this family cannot be run one layer at a time.
    """
    parameters = weights.architecture.parameters

    def watch(index: int, layer: nn.Module) -> _Collector:
        prefix = f"{weights.architecture.layers_prefix}.{index}."
        names = [name for name, item in parameters.items() if item.layer == index and item.kind == "linear"]
        linears = {name: layer.get_submodule(name.removeprefix(prefix).removesuffix(".weight")) for name in names}
        return _Collector(linears, gram, keep)

    try:
        model = StreamedModel(weights, torch.device(device), dtype)
    except CheckpointError as error:
        raise CalibrationError(f"{error}; compress it without calibration (--calibration none)") from error
    for index, collector in model.layers(windows, watch):
        statistics = collector.statistics()
        del collector
        yield index, statistics
        del statistics
    head = _Collector({}, gram, keep)
    for name, item in parameters.items():
        if item.kind == "head":
            head.add(name, model.last_hidden_state)
    del model
    gc.collect()  # the stand-ins and the model refer to each other
    yield weights.architecture.num_layers, head.statistics()
