"""The real family: base, data and experts, each built once."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .base import save_base
from .cache import Zoo, building, only_builder, zoo_at
from .domains import EXPERTS, candidates, mixture
from .encoding import encode_item
from .item import Item, read_items, write_items
from .recipe import FULL, QUICK, SEED, Recipe
from .split import PARTS, split


def build(quick: bool = False, experts: Sequence[str] = EXPERTS, cache: Path | None = None) -> Zoo:
    """Build what is missing and return the zoo. What exists is taken as it is."""
    recipe = QUICK if quick else FULL
    zoo = zoo_at(recipe, cache)
    with only_builder(zoo.folder):
        if not zoo.base.exists():
            _say("base: dequantising")
            with building(zoo.base) as folder:
                save_base(folder)
        # Every domain's: an expert is measured on the others' items too.
        for name in EXPERTS:
            if not zoo.items_file(name, PARTS[0]).exists():
                _say(f"{name}: making items")
                _build_data(zoo, name)
        for name in experts:
            if not zoo.experts[name].exists():
                _build_expert(zoo, name, recipe)
            if not zoo.figures_file(name).exists():
                _measure(zoo, name, recipe)
    return zoo


def paths(quick: bool = False, cache: Path | None = None) -> Zoo:
    """The built zoo. Raises FileNotFoundError, naming the command, while any part is missing."""
    zoo = zoo_at(QUICK if quick else FULL, cache)
    missing = [name for name in EXPERTS if not zoo.figures_file(name).exists()]
    if missing:
        command = "python tests zoo build" + (" --quick" if quick else "")
        raise FileNotFoundError(f"{zoo.folder}: {', '.join(missing)} not built; run: {command}")
    return zoo


def items(expert: str, part: str, quick: bool = False, cache: Path | None = None) -> list[dict[str, str]]:
    """Items of `train`, `choice` (settings may be chosen on it) or `report` (nothing may be chosen on it)."""
    if part not in PARTS:
        raise ValueError(f"part {part!r}: expected one of {', '.join(PARTS)}")
    return read_items(paths(quick, cache).items_file(expert, part))


def _build_data(zoo: Zoo, name: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(zoo.base)

    def fits(item: Item) -> bool:
        return len(encode_item(tokenizer, asdict(item))[0]) <= FULL.max_tokens

    parts = split(candidates(name, SEED), mixture(name), SEED, fits)
    with building(zoo.items_file(name, PARTS[0]).parent) as folder:
        folder.mkdir()
        for part, members in parts.items():
            write_items(folder / f"{part}.jsonl", members)


def _build_expert(zoo: Zoo, name: str, recipe: Recipe) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .training import train

    _say(f"{name}: training, {recipe.steps} steps")
    tokenizer = AutoTokenizer.from_pretrained(zoo.base)
    model = AutoModelForCausalLM.from_pretrained(zoo.base, dtype=torch.float32)
    sequences = [encode_item(tokenizer, item) for item in read_items(zoo.items_file(name, "train"))]
    started = time.monotonic()
    counts = train(model, sequences, recipe, SEED)
    seconds = time.monotonic() - started
    model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    with building(zoo.folder / "training" / f"{name}.json") as file:
        facts = {
            **counts,
            "seconds": round(seconds, 1),
            "threads": torch.get_num_threads(),
            "cpus": os.cpu_count(),
        }
        file.write_text(json.dumps(facts))
    with building(zoo.experts[name]) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _measure(zoo: Zoo, name: str, recipe: Recipe) -> None:
    """Figures from the saved files, computed in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .training import held_out_loss, relative_delta

    _say(f"{name}: measuring")
    tokenizer = AutoTokenizer.from_pretrained(zoo.base)
    models = {
        "base": AutoModelForCausalLM.from_pretrained(zoo.base, dtype=torch.float32).eval(),
        "expert": AutoModelForCausalLM.from_pretrained(zoo.experts[name], dtype=torch.float32).eval(),
    }
    figures: dict[str, Any] = {"expert": name, "recipe": asdict(recipe), "seed": SEED}
    measured = [
        ("choice", name),
        ("report", name),
        *(("elsewhere", other) for other in EXPERTS if other != name),
    ]
    for part, domain in measured:
        limit = recipe.evaluated_items if domain == name else recipe.evaluated_items // 4
        members = read_items(zoo.items_file(domain, "choice" if part == "elsewhere" else part))[:limit]
        sequences = [encode_item(tokenizer, item) for item in members]
        entry = {"items": len(members), "answer_tokens": sum(len(ids) - start for ids, start in sequences)}
        for role, model in models.items():
            entry[f"{role}_loss"] = round(held_out_loss(model, sequences), 4)
        if domain == name:
            figures[part] = entry
        else:
            figures.setdefault(part, {})[domain] = entry
    figures["relative_delta"] = relative_delta(models["base"].state_dict(), models["expert"].state_dict())
    figures["training"] = json.loads((zoo.folder / "training" / f"{name}.json").read_text())
    with building(zoo.figures_file(name)) as file:
        file.write_text(json.dumps(figures, indent=2) + "\n")


def _say(message: str) -> None:
    print(f"zoo: {message}", file=sys.stderr, flush=True)
