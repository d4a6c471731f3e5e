"""Hidden states of the base, seen as requests pass through it.

A prompt to be pooled is a request of one token. While it is computed, among others', a hook on a decoder layer adds up
what comes out of it, so that the weights on the device serve the router too. Such batches alone are computed without
what was compiled and captured, which calls no hooks.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context


@dataclass
class TokenSum:
    """The hidden states of a request after a layer, added up over its tokens so far."""

    layer: int
    total: Tensor | None = None
    tokens: int = 0


class PooledPrompts:
    """The watched requests of a worker, by the id under which they were submitted."""

    def __init__(self, runner: Any, layers_prefix: str) -> None:
        self._runner, self._prefix = runner, layers_prefix
        self._watched: dict[str, TokenSum] = {}
        self._forward = runner._model_forward
        runner._model_forward = self._model_forward

    def watch(self, request_id: str, layer: int) -> None:
        """Add up what comes out of decoder layer `layer` (1 is the first) for a request to come."""
        self._watched[request_id] = TokenSum(layer)

    def take(self, request_id: str) -> list[float]:
        """The mean over a request's tokens `[hidden]`, which is then forgotten."""
        watched = self._watched.pop(request_id)
        if watched.total is None:
            return []
        mean: list[float] = (watched.total / watched.tokens).tolist()
        return mean

    def _model_forward(self, *arguments: Any, **options: Any) -> Any:
        layers = {watched.layer for watched in self._watched.values()}
        with ExitStack() as hooks:
            if layers:
                context = get_forward_context()
                context.skip_compiled, context.cudagraph_runtime_mode = True, CUDAGraphMode.NONE
            for layer in layers:
                module = self._runner.get_model().get_submodule(f"{self._prefix}.{layer - 1}")
                hooks.callback(module.register_forward_hook(partial(self._see, layer)).remove)
            return self._forward(*arguments, **options)

    def _see(self, layer: int, module: Any, inputs: Any, output: Any) -> None:
        hidden = _hidden_states(output)
        starts = self._runner.query_start_loc.np
        for row, request_id in enumerate(self._runner.input_batch.req_ids):
            watched = self._watched.get(request_id.rpartition("-")[0])  # vLLM appends characters of its own
            if watched is None or watched.layer != layer:
                continue
            if self._runner.input_batch.num_computed_tokens_cpu[row] == 0:  # the first part, or begun again
                watched.total, watched.tokens = None, 0
            own = hidden[int(starts[row]) : int(starts[row + 1])].float()
            total = own.sum(0)
            watched.total = total if watched.total is None else watched.total + total
            watched.tokens += own.shape[0]


def _hidden_states(output: Any) -> Tensor:
    """`[tokens, hidden]`. vLLM's layers return what they add and what it is added to, where the next norm does the
    addition; transformers', in vLLM, return `[1, tokens, hidden]`."""
    if isinstance(output, tuple):
        added, residual = output
        output = added if residual is None else added + residual
    states: Tensor = output.flatten(0, -2)
    return states
