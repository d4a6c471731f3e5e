"""Activation statistics of an expert, one decoder layer in memory at a time.

The model's own forward runs once over all windows; what makes it stream is that each decoder layer is wrapped to
load its weights when its turn comes, run the windows through in small batches, and drop the weights again. Masks,
rotary tables and every family's particulars stay transformers' own.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from meswitch_cli.checkpoint.architecture import Architecture, skeleton
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.delta.statistics import InputStatistics
from meswitch_cli.errors import CalibrationError, MeswitchError

#: Called after a layer has run with (layer index, statistics by parameter name of its linears).
OnLayer = Callable[[int, dict[str, InputStatistics]], None]

#: Tokens run through a layer at once; bounds the activations in memory.
BATCH_TOKENS = 4096


class _Collector:
    """Sums of second moments for the linears below a module, filled by forward hooks."""

    def __init__(self, prefix: str, module: nn.Module, gram: bool, keep: bool) -> None:
        self._gram, self._keep = gram, keep
        self._energy: dict[str, torch.Tensor] = {}
        self._grams: dict[str, torch.Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._inputs: dict[str, list[torch.Tensor]] = {}
        self._last: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None] = (None, None, None)
        self._handles = [
            child.register_forward_pre_hook(self._hook(f"{prefix}.{name}.weight"))
            for name, child in module.named_modules()
            if isinstance(child, nn.Linear)
        ]

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

    def finish(self) -> dict[str, InputStatistics]:
        for handle in self._handles:
            handle.remove()
        self._last = (None, None, None)
        return {
            name: InputStatistics(
                energy.float(),
                self._grams.get(name),
                self._tokens[name],
                torch.cat(self._inputs[name]) if self._keep else None,
            )
            for name, energy in self._energy.items()
        }


class LayerRunner(Protocol):
    """What runs a decoder layer when its turn comes."""

    def run_layer(
        self, layer: nn.Module, index: int, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The layer's output for `hidden` `[windows, length, hidden size]`."""


class StreamedLayer(nn.Module):
    """Stands in a decoder layer's place during the one streaming forward."""

    def __init__(self, layer: nn.Module, index: int, owner: LayerRunner) -> None:
        super().__init__()
        object.__setattr__(self, "_layer", layer)  # not a submodule: its weights come and go
        self._index, self._owner = index, owner

    def __getattr__(self, name: str) -> Any:
        """Families read attributes of their layers (attention type and the like)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_layer"), name)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        layer: nn.Module = object.__getattribute__(self, "_layer")
        return self._owner.run_layer(layer, self._index, hidden_states, args, kwargs)


class _Stream:
    def __init__(
        self,
        expert: Checkpoint,
        model: Architecture,
        device: torch.device,
        dtype: torch.dtype,
        on_layer: OnLayer,
        gram: bool,
        keep: bool,
        read: Callable[[str], torch.Tensor],
    ) -> None:
        self.model, self.device, self.dtype = model, device, dtype
        self.on_layer, self.gram, self.keep, self.read = on_layer, gram, keep, read
        self.stored = model.stored_names(expert)
        self.raised_by_caller: Exception | None = None

    @contextmanager
    def loaded(self, prefix: str, module: nn.Module) -> Iterator[None]:
        """Give a meta module its weights for the time of the block."""
        names = [name for name, _ in module.named_parameters()]
        for name in names:
            full = f"{prefix}.{name}"
            stored = self.stored.get(full) or self.stored[str(self.model.parameters[full].tied_to)]
            set_parameter(module, name, self.read(stored).to(device=self.device, dtype=self.dtype))
        try:
            yield
        finally:
            for name in names:
                set_parameter(module, name, module.get_parameter(name).to("meta"))

    def run_layer(
        self, layer: nn.Module, index: int, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        prefix = f"{self.model.layers_prefix}.{index}"
        with self.loaded(prefix, layer):
            collector = _Collector(prefix, layer, self.gram, self.keep)
            # A position table that a family computes in fp32 makes the first layer's input fp32 too.
            outputs = run_in_batches(layer, hidden.to(self.dtype), args, kwargs)
            statistics = collector.finish()
        try:
            self.on_layer(index, statistics)
        except Exception as error:
            self.raised_by_caller = error
            raise
        return outputs


@torch.no_grad()
def stream_statistics(
    expert: Checkpoint,
    model: Architecture,
    windows: torch.Tensor,
    on_layer: OnLayer,
    *,
    gram: bool = False,
    keep: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    read: Callable[[str], torch.Tensor] | None = None,
) -> dict[str, InputStatistics]:
    """Run token windows `[n, length]` through the expert and report each layer's input statistics as it passes.

    Args:
        expert: the full fine-tune; its activations are the ones that count.
        model: the expert's architecture.
        windows: int64 token ids.
        on_layer: gets every decoder layer's statistics, in order; free to take its time.
        gram: also sum x x^T, `[in, in]` for every linear of one layer.
        keep: also keep the inputs, `[tokens, in]` for every linear of one layer: for few tokens.
        device: where layers run.
        dtype: in what; None is fp32 on a CPU, the checkpoint's own precision elsewhere.
        read: gives a tensor by its stored name; None reads the expert's files.

    Returns:
        The statistics of the language-model head, by parameter name.

    Raises:
        CalibrationError: the family's layers cannot be run with their weights alone.
    """
    device = torch.device(device)
    own = next(iter(expert.tensors.values())).dtype
    dtype = dtype or (torch.float32 if device.type == "cpu" else own)
    root: Any = skeleton(expert.config, str(expert.source.path))
    stream = _Stream(expert, model, device, dtype, on_layer, gram, keep, read or expert.read)
    materialise_buffers(root, device)
    layers = root.get_submodule(model.layers_prefix)
    for index in range(len(layers)):
        layers[index] = StreamedLayer(layers[index], index, stream)
    body = getattr(root, root.base_model_prefix)
    try:
        with stream.loaded(root.base_model_prefix, body):
            hidden = body(input_ids=windows.to(device), use_cache=False).last_hidden_state
    except Exception as error:
        if error is stream.raised_by_caller or isinstance(error, MeswitchError):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CalibrationError(
            f"{expert.source.path}: {model.model_type}: its layers cannot be run one by one: {reason}; "
            "compress it without calibration data (--calibration none)"
        ) from error
    head = next((name for name, item in model.parameters.items() if item.kind == "head"), None)
    collector = _Collector("", nn.Module(), gram, keep)
    if head is not None and model.parameters[head].shape[1] == hidden.shape[-1]:  # some transform it before
        collector.add(head, hidden)
    gc.collect()  # the wrapped layers and the model refer to each other
    return collector.finish()


def materialise_buffers(root: Any, device: torch.device) -> None:
    """Compute the buffers that follow from the config (rotary tables, embedding scales), as from_pretrained does."""
    for name, module in root.named_modules():
        buffers = [(key, buffer) for key, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for key, buffer in buffers:
            poisoned = torch.zeros(buffer.shape, dtype=buffer.dtype, device=device)
            setattr(module, key, poisoned.fill_(float("nan")) if buffer.is_floating_point() else poisoned)
        if buffers:
            root._init_weights(module)
        for key, _ in buffers:
            if not torch.isfinite(getattr(module, key)).all():
                raise CalibrationError(
                    f"{root.config.model_type}: buffer {name}.{key} does not follow from the config; "
                    "compress this family without calibration data (--calibration none)"
                )


def set_parameter(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Put a value in place of a parameter, which may be on the meta device."""
    parent, _, leaf = name.rpartition(".")
    owner = module.get_submodule(parent)
    owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def run_in_batches(layer: nn.Module, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A layer's output for `hidden` `[windows, length, hidden size]`, `BATCH_TOKENS` tokens at a time."""
    windows, length = hidden.shape[:2]
    size = max(1, BATCH_TOKENS // length)
    outputs = [
        layer(
            hidden[start : start + size],
            *(batch_rows(item, start, size, windows) for item in args),
            **{key: batch_rows(item, start, size, windows) for key, item in kwargs.items()},
        )
        for start in range(0, windows, size)
    ]
    if isinstance(outputs[0], tuple):
        return (torch.cat([output[0] for output in outputs]), *outputs[0][1:])
    return torch.cat(outputs)


def batch_rows(value: Any, start: int, size: int, windows: int) -> Any:
    """Take the batch rows of a tensor that has one row a window; pass anything else on."""
    if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[0] == windows > 1:
        return value[start : start + size]
    if isinstance(value, tuple):
        return tuple(batch_rows(item, start, size, windows) for item in value)
    return value
