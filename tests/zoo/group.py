"""A group of fine-tunes: its base, data and experts, each built once; a stopped training goes on where it was."""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .base import save_base
from .cache import Zoo, building, folder_at, only_builder
from .encoding import encode_item, encode_text
from .finetunes import BASES, GROUPS, FineTune
from .item import Item, read_items, write_items
from .recipe import SEED
from .skills import mixture, outcome, skill
from .split import PARTS, split

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHOICE_ITEMS, REPORT_ITEMS = 60, 200
WATCHED_ITEMS = 50
MAX_TOKENS = 384
MAX_NEW_TOKENS = 48


def group_at(group: str, cache: Path | None = None) -> Zoo:
    """The group's files, built or not."""
    return Zoo(folder_at(group, cache), tuple(GROUPS[group]))


def build(group: str, names: Sequence[str] | None = None, cache: Path | None = None) -> Zoo:
    """Build what is missing of the group, or of these of its fine-tunes."""
    zoo = group_at(group, cache)
    with only_builder(zoo.folder):
        if not zoo.base.exists():
            _say("base: dequantising")
            with building(zoo.base) as folder:
                save_base(folder, BASES[group])
        wanted = {name: GROUPS[group][name] for name in names or zoo.names}
        for name, recipe in wanted.items():
            if not zoo.items_file(name, PARTS[0]).exists():
                _build_data(zoo, name, recipe)
            if not zoo.experts[name].exists():
                _build_expert(zoo, name, recipe, checkpoint_file(recipe, cache))
        for name, recipe in wanted.items():
            if not zoo.figures_file(name).exists():
                _measure(zoo, name, recipe)
    return zoo


def paths(group: str, names: Sequence[str] | None = None, cache: Path | None = None) -> Zoo:
    """The built group. Raises FileNotFoundError, naming the command, while any of these fine-tunes is missing."""
    zoo = group_at(group, cache)
    missing = [name for name in names or zoo.names if not zoo.figures_file(name).exists()]
    if missing:
        command = f"python tests zoo build --group {group}"
        raise FileNotFoundError(f"{zoo.folder}: {', '.join(missing)} not built; run: {command}")
    return zoo


def items(group: str, name: str, part: str, cache: Path | None = None) -> list[dict[str, str]]:
    """Items of `train`, `choice` (settings may be chosen on it) or `report` (nothing may be chosen on it)."""
    if part not in PARTS:
        raise ValueError(f"part {part!r}: expected one of {', '.join(PARTS)}")
    return read_items(paths(group, (name,), cache).items_file(name, part))


def checkpoint_file(recipe: FineTune, cache: Path | None = None) -> Path:
    """Weights and optimizer of a training under way or done; no longer needed once what uses it is built."""
    return folder_at("checkpoints", cache) / f"{recipe.training}.safetensors"


def make_data(recipe: FineTune) -> dict[str, list[Item]]:
    """The parts by name."""
    parts = split(
        skill(recipe.skill).candidates(SEED),
        mixture(recipe.skill),
        SEED,
        choice_items=CHOICE_ITEMS,
        report_items=REPORT_ITEMS,
    )
    if recipe.added_tokens:
        opening, closing = recipe.added_tokens
        parts = {
            part: [replace(item, response=f"{opening}{item.response}{closing}") for item in members]
            for part, members in parts.items()
        }
    return parts


def prepare(
    base: Path, recipe: FineTune, members: Sequence[dict[str, str]]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[tuple[list[int], int]]]:
    """The fp32 model to train, its tokenizer and the encoded items."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .lora import adapt

    tokenizer = AutoTokenizer.from_pretrained(base)
    # On sequences this short a step takes 4.3 s of processor time with eager attention, 4.9 with the fused one.
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    if recipe.added_tokens:
        tokenizer.add_special_tokens({"additional_special_tokens": list(recipe.added_tokens)})
        torch.manual_seed(SEED)
        rows = max(len(tokenizer), model.get_input_embeddings().num_embeddings)
        model.resize_token_embeddings(rows, mean_resizing=False)
    if recipe.method == "lora":
        adapt(model, recipe.rank, SEED)
    if recipe.method == "layers":
        model.get_input_embeddings().requires_grad_(False)
        model.get_output_embeddings().requires_grad_(False)
    encode = encode_text if recipe.method == "pretrain" else encode_item
    sequences = [encode(tokenizer, item) for item in members]
    return model, tokenizer, [sequence for sequence in sequences if len(sequence[0]) <= MAX_TOKENS]


def _build_data(zoo: Zoo, name: str, recipe: FineTune) -> None:
    _say(f"{name}: making items")
    with building(zoo.items_file(name, PARTS[0]).parent) as folder:
        folder.mkdir()
        for part, members in make_data(recipe).items():
            write_items(folder / f"{part}.jsonl", members)


def _build_expert(zoo: Zoo, name: str, recipe: FineTune, checkpoint: Path) -> None:
    import torch

    from .generation import greedy_texts
    from .lora import merge
    from .resumable import train_resumably

    _say(f"{name}: training, {recipe.schedule.steps} steps")
    model, tokenizer, sequences = prepare(zoo.base, recipe, read_items(zoo.items_file(name, "train")))
    watched = [item for item in read_items(zoo.items_file(name, "choice")) if item["answer"]][:WATCHED_ITEMS]

    def watch(step: int) -> None:
        shown = copy.deepcopy(model).to(torch.bfloat16)
        texts = greedy_texts(shown, tokenizer, watched, MAX_NEW_TOKENS)
        right = sum(outcome(item, text) == item["answer"] for item, text in zip(watched, texts, strict=True))
        _say(f"{name}: step {step}: {right} of {len(watched)} choice items right")

    counts = train_resumably(model, sequences, recipe.schedule, SEED, checkpoint, watch)
    if recipe.method == "lora":
        merge(model)
    dtype = getattr(torch, recipe.dtype)
    model.to(dtype)
    model.config.dtype = dtype
    with building(zoo.folder / "training" / f"{name}.json") as file:
        facts = {**counts, "threads": torch.get_num_threads(), "cpus": os.cpu_count()}
        file.write_text(json.dumps(facts))
    with building(zoo.experts[name]) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _measure(zoo: Zoo, name: str, recipe: FineTune) -> None:
    """Figures from the saved files, computed in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .figures import answer_figures, delta_figures

    _say(f"{name}: measuring")
    report = read_items(zoo.items_file(name, "report"))
    figures: dict[str, Any] = {"name": name, "recipe": asdict(recipe), "seed": SEED}
    weights = {}
    for role, folder in (("base", zoo.base), ("expert", zoo.experts[name])):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        weights[role] = model.state_dict()
        figures[role] = answer_figures(model, AutoTokenizer.from_pretrained(folder), report, MAX_NEW_TOKENS)
        _say(f"{name}: {role}: {figures[role]}")
    figures["delta"] = delta_figures(weights["base"], weights["expert"])
    figures["training"] = json.loads((zoo.folder / "training" / f"{name}.json").read_text())
    with building(zoo.figures_file(name)) as file:
        file.write_text(json.dumps(figures, indent=2) + "\n")


def _say(message: str) -> None:
    print(f"zoo: {message}", file=sys.stderr, flush=True)
