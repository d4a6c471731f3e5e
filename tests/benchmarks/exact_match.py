"""Exact match by greedy generation, apart from loss: writes docs/results/exact_match.md.

    python tests bench exact_match [--items 24]

What was measured is kept outside the repository, expert by expert, and not measured again.

An expert that learned the form of the answers lowers its loss without solving more; this table shows which it was.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import zoo
from benchmarks.machine import describe
from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.restore import restore
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.compression.job import compress, prepare
from meswitch_cli.compression.settings import (
    DEFAULT_STEPS,
    RANDOM,
    CompressionSettings,
    default_channel_scale,
    default_rank,
)
from zoo.generation import greedy_texts

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "exact_match.md"
SETTINGS: dict[str, dict[str, Any]] = {
    "2 bits, default": {"calibration": RANDOM, "steps": DEFAULT_STEPS},
    "1 bit, default": {
        "calibration": RANDOM,
        "bits": 1,
        "rank": default_rank(1),
        "channel_scale": default_channel_scale(1),
        "steps": DEFAULT_STEPS,
    },
}
BATCH = 16
MAX_NEW_TOKENS = 160


def answers(path: Path, tokenizer: Any, items: Sequence[dict[str, str]]) -> list[str]:
    """What a model answers to each item's prompt, greedily."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    texts = greedy_texts(model, tokenizer, items, MAX_NEW_TOKENS, BATCH)
    return [zoo.extract_answer(text) for text in texts]


def artifact(family: zoo.Zoo, name: str, settings: dict[str, Any], scratch: Path) -> Path:
    """Compress with these settings, restore in fp32, and return the restored folder."""
    out = scratch / "artifact"
    job = prepare(str(family.base), str(family.experts[name]), out, CompressionSettings(**settings), None)
    compress(job, force=True)
    base = Checkpoint.open(str(family.base))
    return restore(Artifact.open(out), base, scratch / "restored", dtype=torch.float32, force=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=24)
    parser.add_argument("--measured", type=Path, default=Path.home() / ".cache" / "meswitch-zoo" / "exact_match.json")
    arguments = parser.parse_args()
    family = zoo.paths()
    measured: dict[str, list[str]] = json.loads(arguments.measured.read_text()) if arguments.measured.exists() else {}
    for name in zoo.EXPERTS:
        if name in measured:
            continue
        lines = measured[name] = []
        items = [item for item in zoo.items(name, "report") if item["answer"]][: arguments.items]
        tokenizer = AutoTokenizer.from_pretrained(family.experts[name])
        full = answers(family.experts[name], tokenizer, items)
        rows = {"base": answers(family.base, tokenizer, items), "full expert": full}
        for label, settings in SETTINGS.items():
            with tempfile.TemporaryDirectory() as scratch:
                rows[label] = answers(artifact(family, name, settings, Path(scratch)), tokenizer, items)
        for label, found in rows.items():
            right = sum(answer == item["answer"] for answer, item in zip(found, items, strict=True))
            same = sum(a == b for a, b in zip(found, full, strict=True))
            lines.append(f"| {name} | {len(items)} | {label} | {right} | {same} |")
            print(lines[-1], flush=True)
        arguments.measured.write_text(json.dumps(measured))
    table = ["| expert | items | model | right | same answer as the full expert |", "|---|---|---|---|---|"]
    table += [line for name in zoo.EXPERTS for line in measured[name]]
    RESULTS.write_text(
        "# Exact match\n\nOf weak fine-tunes, when 2 bits without directions were the default: "
        "[strong fine-tunes](strong.md) have more items, and today's default.\n\n"
        "Greedy answers to report items that have a short answer; a count of this size says little "
        "about small differences. What matters here is whether the compressed expert answers as the full one does.\n\n"
        f"`python tests bench exact_match --items {arguments.items}`, {describe()}; settings "
        f"{json.dumps(SETTINGS)}, data-free.\n\n" + "\n".join(table) + "\n"
    )


if __name__ == "__main__":
    main()
