"""Activation statistics of a model, one decoder layer in memory at a time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from meswitch_cli.calibration.experts import MatrixInputs
from meswitch_cli.calibration.turns import in_turns
from meswitch_cli.delta.statistics import InputStatistics
from meswitch_cli.errors import CalibrationError, CheckpointError, MeswitchError, reason_of
from meswitch_cli.model.streaming import StreamedModel
from meswitch_cli.model.weights import Weights

#: The statistics of a layer's linears by parameter name.
LayerStatistics = dict[str, InputStatistics]
#: Inputs of one expert that are kept where a gram matrix for each would be larger than the layer; a few more may be.
EXPERT_TOKENS = 256
OnStatistics = Callable[[tuple[int, LayerStatistics]], None]


class _Collector:
    """Sums of second moments of linears' inputs, filled by forward hooks."""

    def __init__(self, linears: Mapping[str, nn.Module], gram: bool, keep: bool, experts_gram: bool = False) -> None:
        self._gram, self._keep, self._experts_gram = gram, keep, experts_gram
        self._energy: dict[str, torch.Tensor] = {}
        self._grams: dict[str, torch.Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._inputs: dict[str, list[torch.Tensor]] = {}
        self._last: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None] = (None, None, None)
        self._handles = [module.register_forward_pre_hook(self._hook(name)) for name, module in linears.items()]

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def observe(_module: nn.Module, args: tuple[Any, ...]) -> None:
            self.add(name, args[0])

        return observe

    def add(self, name: str, inputs: torch.Tensor, *, expert: bool = False) -> None:
        """Take inputs `[..., in]` of the linear with this weight name into its sums.

        Of one expert's of many the first inputs are kept in the place of a gram matrix, unless that was asked for.
        """
        kept = self._tokens.get(name, 0)
        keep = self._keep or (expert and self._gram and not self._experts_gram and kept < EXPERT_TOKENS)
        energy, gram = self._moments(inputs, gram=self._gram and (not expert or self._experts_gram))
        self._tokens[name] = self._tokens.get(name, 0) + inputs.numel() // inputs.shape[-1]
        self._energy[name] = self._energy[name] + energy if name in self._energy else energy
        if keep:
            self._inputs.setdefault(name, []).append(inputs.detach().reshape(-1, inputs.shape[-1]).float())
        if gram is not None:
            self._grams[name] = self._grams[name] + gram if name in self._grams else gram

    def _moments(self, inputs: torch.Tensor, *, gram: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(energy, gram) of inputs; projections that read the same tensor one after another share them."""
        last, energy, product = self._last
        if last is inputs and energy is not None:
            return energy, product
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        energy = rows.square().sum(0, dtype=torch.float64)
        product = rows.T @ rows if gram else None
        self._last = (inputs, energy, product)
        return energy, product

    def finish(self) -> LayerStatistics:
        for handle in self._handles:
            handle.remove()
        self._last = (None, None, None)
        return {
            name: InputStatistics(
                energy.float(),
                self._grams.get(name),
                self._tokens[name],
                torch.cat(self._inputs[name]) if name in self._inputs else None,
            )
            for name, energy in self._energy.items()
        }


class _ObservedModel(StreamedModel):
    """Reports the statistics of each layer when it has run and its weights are gone."""

    def __init__(
        self,
        weights: Weights,
        device: torch.device,
        dtype: torch.dtype,
        collector: Callable[[Mapping[str, nn.Module]], _Collector],
        report: OnStatistics,
    ) -> None:
        super().__init__(weights, device, dtype)
        self._collector, self._report = collector, report
        self._matrices = MatrixInputs(lambda _stack, _matrix, _inputs: None)

    def run_layer(
        self, index: int, layer: nn.Module, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        described = self.weights.architecture
        prefix = f"{described.layers_prefix}.{index}."
        linears = {
            name: layer.get_submodule(name.removeprefix(prefix).removesuffix(".weight"))
            for name, item in described.parameters.items()
            if item.layer == index and item.kind == "linear" and name in described.held
        }
        collector = self._collector(linears)

        def report(stack: str, matrix: int, inputs: torch.Tensor) -> None:
            for piece in described.layout.groups[stack].of_index(matrix):
                if described.parameters[piece.name].shape[-1] == inputs.shape[-1]:
                    collector.add(piece.name, inputs, expert=True)

        with MatrixInputs(report) as self._matrices:
            outputs = super().run_layer(index, layer, hidden, args, kwargs)
        self._report((index, collector.finish()))
        return outputs

    def on_matrix(self, name: str, index: int, matrix: torch.Tensor) -> None:
        self._matrices.expect(name, index, matrix)


def calibration_dtype(stored: torch.dtype, device: torch.device | str, *, few_tokens: bool) -> torch.dtype:
    """What to run a model in whose weights are stored so: fp32 on a CPU, else as they are.

    Few tokens run in bf16 weights as they are everywhere, because reading weights is what they cost.
    """
    as_stored = torch.device(device).type != "cpu" or (few_tokens and stored == torch.bfloat16)
    return stored if as_stored else torch.float32


def stream_statistics(
    weights: Weights,
    windows: torch.Tensor,
    *,
    gram: bool = False,
    keep: bool = False,
    experts_gram: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[int, LayerStatistics]]:
    """Run token windows `[n, length]` through a model once; yield the input statistics of each part as it passes.

    Args:
        weights: the full fine-tune's; its activations are the ones that count.
        windows: int64 token ids.
        gram: also sum x x^T, `[in, in]` for every linear of one layer.
        keep: also keep the inputs, `[tokens, in]` for every linear of one layer: for few tokens.
        experts_gram: with `gram`, also for every expert of a mixture; else some inputs of each are kept.
        device, dtype: where layers run, and in what.

    Yields:
        (index, statistics by parameter name): of every decoder layer in order, and last, under the number of layers,
        of the language-model head. Nothing is computed until the next is asked for; a layer's may be as large as its
        weights, so let go of them first.

    Raises:
        CalibrationError: the family's layers cannot be run with their weights alone.
    """

    def collected(linears: Mapping[str, nn.Module]) -> _Collector:
        return _Collector(linears, gram, keep, experts_gram)

    @torch.no_grad()
    def run(report: OnStatistics) -> None:
        try:
            model = _ObservedModel(weights, torch.device(device), dtype, collected, report)
        except CheckpointError as error:
            raise CalibrationError(f"{error}; compress it without calibration (--calibration none)") from error
        try:
            hidden = model.last_hidden_state(windows)
        except MeswitchError:
            raise
        except Exception as error:  # a family's layers may want what only the whole model gives them
            raise CalibrationError(
                f"{weights.name}: {weights.architecture.model_type}: its layers cannot be run one by one: "
                f"{reason_of(error)}; compress it without calibration data (--calibration none)"
            ) from error
        collector = collected({})
        for name, item in weights.architecture.parameters.items():
            if item.kind == "head" and item.shape[1] == hidden.shape[-1]:  # some transform it before
                collector.add(name, hidden)
        del model, hidden
        gc.collect()  # the wrapped layers and the model refer to each other
        report((weights.architecture.num_layers, collector.finish()))

    return in_turns(run)
