"""What errors in a model's weights cost, one decoder layer in memory at a time: a forward pass and one back.

The divergence of a changed model's predictions p is half the change's square in the metric of the Fisher information,
for logits diag(p) - p p^T = B B^T with B = diag(sqrt p) - p sqrt(p)^T. So with random signs v, the gradient of
(B v) . logits has squares whose mean is the information's diagonal, for any weight (Hutchinson's estimator; Dangel,
Kunstner and Hennig 2020, BackPACK, use it for sampled labels, which tell less where a model is sure of itself).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from meswitch_cli.delta.statistics import EmbeddingSensitivity, LinearSensitivity, Sensitivity
from meswitch_cli.errors import CalibrationError, CheckpointError, MeswitchError, reason_of
from meswitch_cli.model.streaming import StreamedModel
from meswitch_cli.model.weights import Weights

#: Random signs a window is asked with.
DRAWS = 2

#: How often tokens are drawn anew from the predictions. On the strong maths expert (docs/results/trellis.md) what a
#: linear's delta would cost on its own data correlates with what it would cost on such tokens by 0.84 after 3 rounds
#: and after 13, with what it would cost on random tokens by 0.72; these give half of all to the first layer.
ROUNDS = 3

#: By parameter name.
Sensitivities = dict[str, Sensitivity]


class _Differentiated(StreamedModel):
    """Keeps what enters each layer, so that a pass back can run the layers again."""

    def __init__(self, weights: Weights, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(weights, device, dtype)
        self.entered: list[tuple[nn.Module, torch.Tensor, tuple[Any, ...], dict[str, Any]]] = []
        self.left: torch.Tensor | None = None

    def run_layer(
        self, index: int, layer: nn.Module, hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.entered.append((layer, hidden, args, kwargs))
        with torch.no_grad():
            output = super().run_layer(index, layer, hidden, args, kwargs)
        if index < self.weights.architecture.num_layers - 1:
            return output
        self.left = _first(output).requires_grad_()
        return (self.left, *output[1:]) if isinstance(output, tuple) else self.left

    def back_through(self, index: int, gradient: torch.Tensor) -> tuple[torch.Tensor, Sensitivities]:
        """The gradient where a layer begins, given where it ends, and its linears' sensitivities."""
        prefix = f"{self.weights.architecture.layers_prefix}.{index}"
        layer, hidden, args, kwargs = self.entered[index]
        with self.loaded(prefix, layer), torch.enable_grad():
            seen = _Calls(
                {
                    name: layer.get_submodule(name.removeprefix(f"{prefix}.").removesuffix(".weight"))
                    for name, item in self.weights.architecture.parameters.items()
                    if item.layer == index and item.kind == "linear"
                }
            )
            start = hidden.detach().to(self.dtype).requires_grad_()
            end = _first(layer(start, *args, **kwargs))
            own, *of_outputs = torch.autograd.grad(
                end, [start, *seen.outputs], gradient.to(end.dtype), allow_unused=True
            )
        return own, seen.sensitivities(of_outputs)


class _Calls:
    """The calls of some linears in a forward pass, until their sensitivities are asked for."""

    def __init__(self, linears: dict[str, nn.Module]) -> None:
        self._names: list[str] = []
        self._inputs: list[torch.Tensor] = []
        self.outputs: list[torch.Tensor] = []
        self._handles = [module.register_forward_hook(self._hook(name)) for name, module in linears.items()]

    def _hook(self, name: str) -> Any:
        def observe(_module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            self._names.append(name)
            self._inputs.append(args[0].detach())
            self.outputs.append(output)

        return observe

    def sensitivities(self, gradients: Sequence[torch.Tensor | None]) -> Sensitivities:
        """By name, of linears that were called; `gradients` are of `outputs`, None where nothing hangs on one."""
        for handle in self._handles:
            handle.remove()
        found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for name, inputs, gradient in zip(self._names, self._inputs, gradients, strict=True):
            if gradient is not None:
                found.setdefault(name, []).append((inputs.float(), gradient.float()))
        return {name: _of_calls(calls) for name, calls in found.items()}


def _of_calls(calls: list[tuple[torch.Tensor, torch.Tensor]]) -> LinearSensitivity:
    inputs, gradients = calls[0]
    if len(calls) == 1 and inputs.dim() == 3:
        return LinearSensitivity(inputs, gradients)
    # Called for a part of the tokens, or several times: windows cannot be told apart, and need not be, since the signs
    # of one are independent of another's.
    inputs, gradients = (torch.cat([item.flatten(0, -2) for item in side])[None] for side in zip(*calls, strict=True))
    return LinearSensitivity(inputs, gradients)


@torch.no_grad()
def drawn_windows(
    weights: Weights, windows: torch.Tensor, *, seed: int, device: torch.device | str, dtype: torch.dtype
) -> torch.Tensor:
    """Token windows `[n, length]` of which each token is drawn from the model's predictions after the round's before.

    All places are drawn at once, `ROUNDS` times, from any tokens on: not quite the model's own text, but near enough
    to it to say what matters, without data and with few passes over the weights.

    Raises:
        CalibrationError: the family's layers cannot be run with their weights alone.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = windows.to(device)
    with _streaming(weights):
        for _ in range(ROUNDS):
            logits = StreamedModel(weights, torch.device(device), dtype).logits(ids)[:, :-1]
            below = torch.softmax(logits.double(), -1).cumsum(-1)
            drawn = torch.rand(*ids.shape[:1], ids.shape[1] - 1, 1, generator=generator, dtype=torch.float64)
            found = torch.searchsorted(below, drawn.to(below.device) * below[..., -1:]).clamp(max=below.shape[-1] - 1)
            ids = torch.cat([ids[:, :1], found[..., 0]], 1)
    return ids


def stream_sensitivities(
    weights: Weights,
    windows: torch.Tensor,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[int, Sensitivities]]:
    """Sensitivities of a model's linears, embedding and head on token windows `[n, length]`.

    Args:
        weights: the full fine-tune's, at which the divergence is asked for.
        seed: of the signs.

    Yields:
        (index, sensitivities by parameter name): of the decoder layers from the last to the first, then, under the
        number of layers, of embedding and head, apart even where they are tied. Linears that no token reached are
        missing.

    Raises:
        CalibrationError: the family's layers cannot be run with their weights alone.
    """
    ids = windows.repeat_interleave(DRAWS, 0).to(device)
    with _streaming(weights):
        yield from _passes(_Differentiated(weights, torch.device(device), dtype), ids, seed)


@contextmanager
def _streaming(weights: Weights) -> Iterator[None]:
    """Errors of a family whose layers do not run by themselves, as the user should know them."""
    try:
        yield
    except CheckpointError as error:
        raise CalibrationError(f"{error}; give --bits instead of a size") from error
    except MeswitchError:
        raise
    except RuntimeError as error:
        raise CalibrationError(
            f"{weights.name}: {weights.architecture.model_type}: its layers cannot be run one by one: "
            f"{reason_of(error)}; give --bits instead of a size"
        ) from error


def _passes(model: _Differentiated, ids: torch.Tensor, seed: int) -> Iterator[tuple[int, Sensitivities]]:
    architecture = model.weights.architecture
    embedding, head = model.root.get_input_embeddings(), model.root.get_output_embeddings()
    looked_up: list[torch.Tensor] = []
    scale = 1.0

    def remember(module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        nonlocal scale
        rows = module.weight[ids].float()
        scale = float((rows * output.float()).sum() / rows.square().sum())  # Gemma multiplies its rows by a number
        looked_up.append(output.detach().requires_grad_())
        return looked_up[-1]

    handle = embedding.register_forward_hook(remember)
    of_head = _Calls({"head": head})
    with torch.enable_grad():
        logits = model.logits(ids)
        assert model.left is not None
        gradient, *of_outputs = torch.autograd.grad(
            logits, [model.left, *of_head.outputs], _information_root(logits.detach(), seed)
        )
    del logits
    handle.remove()
    heads = of_head.sensitivities(of_outputs)
    for index in reversed(range(architecture.num_layers)):
        gradient, found = model.back_through(index, gradient)
        yield index, found
        del found
    _, entered, *_ = model.entered[0]
    (of_rows,) = torch.autograd.grad(entered, looked_up[0], gradient.to(entered.dtype))
    rows = architecture.parameters[architecture.embedding].shape[0]
    result: Sensitivities = {architecture.embedding: EmbeddingSensitivity(ids, scale * of_rows.float(), rows)}
    result |= {name: heads["head"] for name, item in architecture.parameters.items() if item.kind == "head"}
    yield architecture.num_layers, result


def _information_root(logits: torch.Tensor, seed: int) -> torch.Tensor:
    """B v for the random signs v of a seed, in the logits' type, `[windows, tokens, vocabulary]`."""
    p = torch.softmax(logits.float(), -1)
    root = p.sqrt()
    signs = torch.randint(2, p.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    signed = root * signs.to(p.device).mul_(2).sub_(1)
    return (signed - p * (signed.sum(-1, keepdim=True))).to(logits.dtype)


def _first(output: Any) -> torch.Tensor:
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found
