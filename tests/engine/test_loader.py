"""The loader's own stream, under a stand-in for CUDA's: what loads must not hold up what generates."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine.family import Family, tokenizer_of
from patience import PATIENCE

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.engine import loader as loading
from meswitch_cli.engine.bank_layout import bank_layout
from meswitch_cli.engine.banks import Banks
from meswitch_cli.engine.base_model import load_base
from meswitch_cli.engine.expert import ServedModel
from meswitch_cli.engine.host_copies import HostCopies
from meswitch_cli.engine.loader import SlotLoader
from meswitch_cli.engine.residency import Load

CPU = torch.device("cpu")


class Stream:
    """A stream that notes what is asked of it."""

    device = CPU

    def __init__(self, told: list[str]) -> None:
        self.told = told

    def wait_stream(self, other: object) -> None:
        self.told.append("waits")

    def synchronize(self) -> None:
        self.told.append("is done")


def test_an_expert_is_copied_on_a_stream_of_its_own_and_told_of_when_it_is_there(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    artifact = Artifact.open(family.artifacts["alpha"])
    base = load_base(Checkpoint.open(str(family.base)), CPU, torch.float32)
    banks = Banks(base, bank_layout(base, [artifact.manifest]), 2)
    model = ServedModel(
        name="alpha",
        path=family.artifacts["alpha"],
        digest="digest",
        tokenizer=tokenizer_of(family.artifacts["alpha"]),
        vocabulary=268,
        end_ids=frozenset(),
        artifact=artifact,
    )
    done = threading.Event()

    def on_loaded(load: Load, problem: str | None) -> None:
        assert problem is None
        told.append("told")
        done.set()

    @contextlib.contextmanager
    def stream(own: Stream) -> Iterator[None]:
        told.append("on its stream")
        yield
        told.append("off its stream")

    for name, item in {
        "stream": stream,
        "current_stream": lambda device: None,
        "set_device": lambda device: told.append("on its card"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, item)
    load = banks.load

    def noted(*arguments: Any) -> int:
        told.append("copied")
        return load(*arguments)

    monkeypatch.setattr(banks, "load", noted)
    monkeypatch.setattr(loading, "StagedCopy", lambda stored, device: stored)
    own = SlotLoader(banks, HostCopies(0, Checkpoint.open(str(family.base))), on_loaded)
    own._stream = Stream(told)
    own.start()
    try:
        own.load(Load("alpha", 1), model)
        assert done.wait(PATIENCE)
    finally:
        own.stop()
    assert told == ["on its card", "waits", "on its stream", "copied", "off its stream", "is done", "told"]
