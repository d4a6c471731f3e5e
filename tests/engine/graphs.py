"""A stand-in for CUDA graphs on a CPU: a capture records and computes nothing, as on a GPU; a replay computes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers.generation.continuous_batching import initialization, model_runner

from meswitch_cli.engine import batching


@dataclass
class Recorded:
    """What the stand-in did: the key of each graph that was captured, and of each that was replayed."""

    captures: list[tuple[int, ...]] = field(default_factory=list)
    replays: list[tuple[int, ...]] = field(default_factory=list)


class Graph:
    """A forward pass with the arguments that it was captured with."""

    def __init__(self, recorded: Recorded, runner: Any, forward: Callable[[], None]) -> None:
        self.recorded, self.runner, self.forward = recorded, runner, forward
        self.key: tuple[int, ...] = runner._key()
        self.output: torch.Tensor | None = None

    def captured(self) -> None:
        """The captured pass has left its output's memory as it was: anything."""
        self.output = self.runner._logits[self.key].fill_(torch.nan)
        self.recorded.captures.append(self.key)

    def replay(self) -> None:
        assert self.output is not None and self.key == self.runner._key()
        self.forward()
        self.output.copy_(self.runner._logits[self.key])
        self.runner._logits[self.key] = self.output
        self.recorded.replays.append(self.key)

    def reset(self) -> None:
        """Nothing is held."""


def stand_in(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """Have engines on the CPU capture graphs and page their attention."""
    recorded, making = Recorded(), []
    transformers_capture = model_runner.ModelRunner._capture_graph

    def capture(self: Any, forward: Callable[..., None], stream: Any, *arguments: Any) -> None:
        making.append(Graph(recorded, self, lambda: forward(*arguments)))
        transformers_capture(self, forward, stream, *arguments)

    @contextlib.contextmanager
    def capturing(graph: Graph, stream: Any, pool: Any) -> Iterator[None]:
        yield
        graph.captured()

    monkeypatch.setattr(batching, "captures_graphs", lambda device: True)
    monkeypatch.setattr(initialization, "get_accelerator_graph_name", lambda: "Graph")
    monkeypatch.setattr(model_runner.ModelRunner, "_capture_graph", capture)
    monkeypatch.setattr(model_runner, "create_accelerator_graph", lambda: making.pop())
    monkeypatch.setattr(model_runner, "get_memory_pools", lambda: (None, None))
    monkeypatch.setattr(model_runner, "memory_pool_context", lambda pool: contextlib.nullcontext())
    monkeypatch.setattr(model_runner, "accelerator_graph_capture_context", capturing)
    return recorded
