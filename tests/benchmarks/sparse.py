"""Updates that leave most weights alone: what tells a delta that is worth nothing. Writes docs/results/sparse.md.

    python tests bench sparse [--expert maths] [--items 4]

Real updates are the zoo's fine-tune taken at a part of its length and rounded to bf16, as small learning rates leave
it; the others move weights of every linear at random places.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.machine import describe
from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.calibration.data import random_window
from meswitch_cli.compression.closeness import WINDOWS
from meswitch_cli.compression.job import compress, prepare
from meswitch_cli.compression.settings import CompressionSettings
from zoo.cache import Zoo, zoo_at
from zoo.item import read_items
from zoo.recipe import QUICK

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "sparse.md"
WEIGHTS = "model.safetensors"
PARTS = (0.03, 0.1, 0.3, 1.0)
SHARES = (0.2, 0.05, 0.01)
#: Of a random update's norm to the weight's.
LENGTH = 0.02
TOKENS = 120
Tensors = dict[str, torch.Tensor]


def is_linear(name: str, weight: torch.Tensor) -> bool:
    return weight.dim() == 2 and "embed" not in name


def part_of(base: Mapping[str, torch.Tensor], expert: Mapping[str, torch.Tensor], part: float) -> Tensors:
    """A part of a fine-tune's way, in the base's type; the embedding stays the base's."""
    moved = {name: base[name].float() + part * (expert[name].float() - base[name].float()) for name in base}
    return {name: base[name] if "embed" in name else value.to(base[name].dtype) for name, value in moved.items()}


def at_random_places(base: Mapping[str, torch.Tensor], share: float) -> Tensors:
    """A share of each linear's weights moved."""
    generator, result = torch.Generator().manual_seed(0), dict(base)
    for name, weight in base.items():
        if is_linear(name, weight):
            delta = torch.randn(weight.shape, generator=generator)
            delta *= torch.rand(weight.shape, generator=generator) < share
            delta *= LENGTH * weight.float().norm() / delta.norm()
            result[name] = (weight.float() + delta).to(weight.dtype)
    return result


class Judge:
    """Compares weights by what a model predicts with them."""

    def __init__(self, folder: Path, texts: Sequence[torch.Tensor], vocabulary: int) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._inputs = [list(texts), [random_window(vocabulary, index) for index in range(WINDOWS)]]

    @torch.no_grad()
    def predictions(self, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Log-probabilities with these weights, on the texts and on random tokens."""
        for name, parameter in self._model.named_parameters():
            parameter.copy_(tensors[name])
        return [
            torch.cat([torch.log_softmax(self._model(item).logits[0].double(), -1) for item in items])
            for items in self._inputs
        ]


def divergences(reference: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> list[float]:
    return [float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(reference, other, strict=True)]


def texts_of(zoo: Zoo, expert: str, count: int) -> list[torch.Tensor]:
    """The first choice items as token ids `[1, tokens]`."""
    tokenizer = AutoTokenizer.from_pretrained(zoo.base)
    found = []
    for item in read_items(zoo.items_file(expert, "choice"))[:count]:
        turns = [{"role": "user", "content": item["prompt"]}, {"role": "assistant", "content": item["response"]}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        found.append(torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][:TOKENS])[None])
    return found


def row(
    label: str, zoo: Zoo, base: Tensors, expert: Tensors, bits: int, judge: Judge, full: Any, gap: Any, scratch: Path
) -> str:
    folder, out, said = scratch / "expert", scratch / "artifact", list[str]()
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(zoo.base, folder)
    safetensors.torch.save_file(expert, folder / WEIGHTS, {"format": "pt"})
    job = prepare(str(zoo.base), str(folder), out, CompressionSettings.with_defaults(bits=bits), None)
    manifest = compress(job, force=True, keep_weak=True, on_note=said.append)
    artifact = Artifact.open(out)
    restored = dict(expert) | {
        entry.name: artifact.expert_tensor(entry, base[entry.base]) for entry in manifest.tensors
    }
    shares = [found / own for found, own in zip(divergences(full, judge.predictions(restored)), gap, strict=True)]
    measured = [(entry.weight_error or 0.0, entry.delta_energy or 0.0) for entry in manifest.tensors if entry.bits]
    error = sum(error * energy for error, energy in measured) / sum(energy for _, energy in measured)
    linears = [name for name in base if is_linear(name, base[name])]
    moved = sum(int((base[name] != expert[name]).sum()) for name in linears) / sum(
        base[name].numel() for name in linears
    )
    verdict = "" if not said else "error" if "no nearer" in said[0] else "warning"
    return (
        f"| {label} | {moved:.1%} | {bits} | {error:.0%} | {max(item for item, _ in measured):.0%} | {gap[0]:.2e} | "
        f"{shares[0]:.2%} | {shares[1]:.2%} | {verdict} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--expert", default="maths")
    parser.add_argument("--items", type=int, default=4)
    arguments = parser.parse_args()
    zoo = zoo_at(QUICK)
    base = safetensors.torch.load_file(zoo.base / WEIGHTS)
    tuned = safetensors.torch.load_file(zoo.experts[arguments.expert] / WEIGHTS)
    judge = Judge(
        zoo.base, texts_of(zoo, arguments.expert, arguments.items), base["model.embed_tokens.weight"].shape[0]
    )
    of_base = judge.predictions(base)
    lines = [
        "| update | weights moved | bits | weight error | of the worst tensor | base's KL | KL, share of the base's | "
        "on random tokens | compress |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    updates = [
        *((f"{part:.0%} of the fine-tune", partial(part_of, base, tuned, part), (1, 2)) for part in PARTS),
        *((f"random places, {share:.0%}", partial(at_random_places, base, share), (1, 2, 4)) for share in SHARES),
    ]
    with tempfile.TemporaryDirectory() as scratch:
        for label, make, widths in updates:
            expert = make()
            full = judge.predictions(expert)
            gap = divergences(full, of_base)
            for bits in widths:
                lines.append(row(label, zoo, base, expert, bits, judge, full, gap, Path(scratch)))
                print(lines[-1], flush=True)
    RESULTS.write_text(
        "# Updates that leave most weights alone\n\n"
        "A code has no zero, so a weight that does not move is coded as half a step. Weight error: squared error over "
        "the delta's energy. KL: of the full expert's next-token distribution to the compressed expert's, as a share "
        f"of that to the base's, on {arguments.items} choice items of {arguments.expert} and on the random tokens that "
        "`compress` asks where weight errors leave a doubt. The last column is what `compress` says.\n\n"
        f"`python tests bench sparse --expert {arguments.expert} --items {arguments.items}`, "
        f"SmolLM2-135M, {describe()}.\n\n" + "\n".join(lines) + "\n"
    )


if __name__ == "__main__":
    main()
