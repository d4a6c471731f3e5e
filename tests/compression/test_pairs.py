from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.compression import pairs
from meswitch_cli.compression.job import compress, prepare
from meswitch_cli.compression.pairs import PairReader, reading_order
from meswitch_cli.compression.settings import RANDOM, CompressionSettings
from meswitch_cli.model.matching import make_plan
from zoo.tiny import Pair


def test_calibration_and_quantiser_share_one_reading(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: Counter[tuple[Path, str]] = Counter()
    original = Checkpoint.read

    def spy(self: Checkpoint, name: str, *rest: Any) -> torch.Tensor:
        read[self.source.path, name] += 1
        return original(self, name, *rest)

    monkeypatch.setattr(Checkpoint, "read", spy)
    job = prepare(str(pair[0]), str(pair[1]), tmp_path / "a", CompressionSettings(salient=4, calibration=RANDOM), None)
    compress(job)
    layers = {key: count for key, count in read.items() if ".layers." in key[1]}
    assert len(layers) == sum(".layers." in name for side in (job.base, job.expert) for name in side.tensors)
    assert set(layers.values()) == {1}


def test_reading_keeps_to_its_bound(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    base, expert = (Checkpoint.open(str(path)) for path in pair)
    items = make_plan(base, expert).units[0]
    monkeypatch.setattr(pairs, "READ_AHEAD_BYTES", 1)
    with PairReader(base, expert, reading_order([items], [0], calibrated=False)) as reader:
        for item in items:
            assert len(reader._reading) == 1
            found = reader.pair(item)
            assert torch.equal(found.base, base.read(item.base.name))
            assert torch.equal(found.expert, expert.read(item.expert.name))


@pytest.mark.parametrize("end", ["forget", "pair"])
def test_a_pair_holds_what_the_expert_ran_with(pair: Pair, end: str) -> None:
    base, expert = (Checkpoint.open(str(path)) for path in pair)
    items = make_plan(base, expert).units[0]
    order = reading_order([items, ()], [0] if end == "pair" else [], calibrated=True)
    with PairReader(base, expert, order) as reader:
        ran = {item.name: reader.expert(item) for item in items}
        if end == "forget":
            reader.forget(items)
        else:
            assert all(reader.pair(item).expert is ran[item.name] for item in items)
        assert not reader._held and not reader._reading
