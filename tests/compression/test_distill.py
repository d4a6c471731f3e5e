from collections.abc import Callable

import pytest
import torch
from torch import nn

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.compression.distill import DistilledLinear, with_steps
from meswitch_cli.delta.quantize import dequantize, quantize
from meswitch_cli.delta.settings import QuantizerSettings
from zoo.tiny import Pair


def _problem(**settings: object) -> tuple[torch.Tensor, DistilledLinear, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(24, 96, generator=generator)
    expert = base + 0.1 * torch.randn(24, 96, generator=generator)
    quantized, _ = quantize(base, expert, QuantizerSettings(salient=3, **settings))
    weight = base + dequantize(quantized)
    return weight, DistilledLinear(weight, None, quantized), torch.randn(5, 7, 96, generator=generator)


@pytest.mark.parametrize(
    "settings", [{}, {"bits": 1, "channel_scale": "rms"}, {"group_size": 64}, {"rank": 4}, {"bits": 0.25}]
)
def test_starts_as_the_compressed_weight(settings: dict) -> None:
    weight, module, x = _problem(**settings)
    torch.testing.assert_close(module(x), x @ weight.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"bits": 1, "channel_scale": "rms"}, {"group_size": 64}])
def test_gradients_are_those_of_autograd(settings: dict) -> None:
    _, module, x = _problem(**settings)
    x.requires_grad_()
    target = torch.randn(5, 7, 24, generator=torch.Generator().manual_seed(1))
    (module(x) * target).sum().backward()
    ours = (module.factors.grad, x.grad)
    module.factors.grad = x.grad = None
    (nn.functional.linear(x, module.weight(module.factors)) * target).sum().backward()
    for mine, theirs in zip(ours, (module.factors.grad, x.grad), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rank", "bits"), [(0, 2), (3, 2), (3, 0.25)])
def test_only_steps_move(pair: Pair, make_artifact: Callable[..., Artifact], rank: int, bits: float) -> None:
    before = make_artifact(pair, out="before", calibrated=True, steps="unbiased", rank=rank, bits=bits)
    after = make_artifact(pair, out="after", calibrated=True, steps="distill", rank=rank, bits=bits)
    assert [entry.name for entry in before.manifest.tensors] == [entry.name for entry in after.manifest.tensors]
    moved = 0
    for old, new in zip(before.manifest.tensors, after.manifest.tensors, strict=True):
        ours, theirs = before.shard(old.shard), after.shard(new.shard)
        if not old.bits:
            assert torch.equal(ours.delta(old.name).value, theirs.delta(old.name).value)
            continue
        first, second = ours.delta(old.name), theirs.delta(new.name)
        assert torch.equal(first.codes, second.codes)
        assert torch.equal(first.salient_channels, second.salient_channels)
        if old.kind != "linear":
            assert torch.equal(first.steps, second.steps)
            continue
        if rank:
            assert torch.equal(first.factors()[0], second.factors()[0])
            assert torch.equal(first.factors()[1], second.factors()[1])
        moved += not torch.equal(first.steps, second.steps)
        index = first.salient_channels
        kept = dequantize(first)[:, index]
        torch.testing.assert_close(dequantize(second)[:, index], kept, rtol=0, atol=float(kept.abs().max()) * 2**-9)
    assert moved >= 10


def test_with_steps_keeps_salient_channels() -> None:
    base = torch.zeros(8, 64)
    expert = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    quantized, _ = quantize(base, expert, QuantizerSettings(2, 4))
    changed = with_steps(quantized, quantized.steps * 1.5)
    index = quantized.salient_channels
    torch.testing.assert_close(dequantize(changed)[:, index], expert[:, index], rtol=0, atol=2e-3)
    other = [column for column in range(64) if column not in index.tolist()]
    torch.testing.assert_close(dequantize(changed)[:, other], 1.5 * dequantize(quantized)[:, other])
