"""How many kernels a decode step launches, counted without a card."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("triton")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the profiler counts them there")

MOST = 450
KINDS = {
    "1 bit": {"bits": 1, "salient": 4, "rank": 16, "embedding_rank": 16},
    "1/4 bit": {"bits": 0.25, "rank": 16, "embedding_bits": 0.25, "embedding_rank": 16},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_32_layers_launches_few_kernels(kind: str, tmp_path: Path, needs_triton: None) -> None:
    """And every layer as many as any other, so that those of 32 are known from three."""
    launches = pytest.importorskip("engine.launches")
    steps = [launches.step_launches(tmp_path / str(layers), layers, KINDS[kind]) for layers in (1, 2, 3)]
    for mixed in (True, False):
        first, second, third = (step[mixed] for step in steps)
        assert second - first == third - second and second > first
    whole = launches.whole_step(steps[0][True], steps[1][True])
    assert whole.total() <= MOST
    assert whole["decode"] + whole["decode_siblings"] == 4 * launches.WHOLE + 1  # with the head
    page = Path(__file__).parents[2] / "docs" / "results" / "kernels-gpu.md"
    assert f" | {whole.total()} | " in next(
        line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| all |")
    )


def test_what_is_launched_is_counted(needs_triton: None) -> None:
    """Kernels of ours and of PyTorch, and neither views nor memory; what is made of other operators by its parts."""
    launches = pytest.importorskip("engine.launches")
    x = torch.ones(3, 4)

    def counted(call: Any) -> Counter[str]:
        with torch.inference_mode(), launches.Launches() as mode:
            call()
        return mode.counted

    assert counted(lambda: x.view(4, 3).t()[1:].reshape(-1, 2)) == {"clone": 1}
    assert counted(lambda: torch.nn.functional.linear(x, x)) == {"mm": 1}
    assert counted(lambda: torch.empty(5).add_(x.sum())) == {"sum": 1, "add_": 1}
