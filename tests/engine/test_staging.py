"""Pinned memory that is given back, and an expert that is copied piece by piece."""

from __future__ import annotations

import functools
import gc
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from engine.family import Family

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.delta.stored import StoredDelta
from meswitch_cli.engine import staging
from meswitch_cli.engine.bank_layout import bank_layout
from meswitch_cli.engine.banks import Banks
from meswitch_cli.engine.base_model import load_base
from meswitch_cli.engine.host_copies import HostCopies
from meswitch_cli.engine.staging import StagedCopy, pinned_buffer

CPU = torch.device("cpu")
#: So few that the tiny experts have several pieces.
PIECE_BYTES = 24 << 10


class Runtime:
    """What CUDA's runtime is asked for."""

    def __init__(self, code: int = 0) -> None:
        self.code, self.registered, self.calls = code, dict[int, int](), 0

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        assert address % 4096 == 0 and address not in self.registered
        self.calls += 1
        if not self.code:
            self.registered[address] = nbytes
        return self.code

    def cudaHostUnregister(self, address: int) -> None:
        del self.registered[address]


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    found = Runtime()
    monkeypatch.setattr(staging, "_runtime", lambda: found)
    return found


def test_memory_stays_pinned_until_the_last_tensor_in_it_is_dropped(runtime: Runtime) -> None:
    buffer = pinned_buffer(1000)
    buffer.fill_(7)
    part = buffer[8:16].view(torch.int32)
    assert list(runtime.registered.values()) == [1000] and buffer.data_ptr() in runtime.registered
    del buffer
    gc.collect()
    assert len(runtime.registered) == 1 and part.tolist() == [0x07070707] * 2
    del part
    gc.collect()
    assert runtime.registered == {}
    assert pinned_buffer(0).shape == (0,)


def _pieces(stored: Mapping[str, StoredDelta]) -> set[int]:
    return {part.untyped_storage().data_ptr() for delta in stored.values() for part in delta.tensors.values()}


def test_memory_that_cannot_be_pinned_is_used_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    staging._warn_unpinned.cache_clear()
    monkeypatch.setattr(staging, "_runtime", lambda: Runtime(code=2))
    buffer = pinned_buffer(64)
    buffer.fill_(3)
    del buffer
    gc.collect()
    assert "error 2" in caplog.text


def test_a_copy_on_host_is_pinned_piece_by_piece(
    family: Family, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = Artifact.open(family.artifacts["beta"])
    copies = HostCopies(1 << 30, Checkpoint.open(str(family.base)))
    monkeypatch.setattr(Artifact, "read_all", functools.partialmethod(Artifact.read_all, piece_bytes=PIECE_BYTES))
    stored = copies.fetch("beta", artifact, pinned=True)
    assert runtime.calls == len(_pieces(stored)) > 1
    for name, delta in artifact.read_all().items():
        assert all(torch.equal(stored[name].tensors[part], tensor) for part, tensor in delta.tensors.items())
    del stored
    copies.forget("beta")
    gc.collect()
    assert runtime.registered == {}


@pytest.mark.parametrize("name", ["alpha", "beta", "gamma"])
def test_a_staged_expert_is_the_same_in_its_slot(name: str, family: Family) -> None:
    artifact = Artifact.open(family.artifacts[name])
    stored = artifact.read_all(piece_bytes=PIECE_BYTES)
    base = load_base(Checkpoint.open(str(family.base)), CPU, torch.float32)
    plain, staged = (Banks(base, bank_layout(base, [artifact.manifest]), 1) for _ in range(2))
    copy = StagedCopy(stored, CPU)
    assert plain.load(0, artifact.manifest, stored) == staged.load(0, artifact.manifest, copy)
    assert 1 < copy.copies <= len(_pieces(stored))  # each at most once, in the order in which a slot is filled
    for key, bank in plain.banks.items():
        own: Any = staged.banks[key]
        for ours, theirs in zip(own.tensors, bank.tensors, strict=True):
            assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
        assert torch.equal(own.added_rows, bank.added_rows)
