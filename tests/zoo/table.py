"""One table of everything that the zoo holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .cache import zoo_at
from .finetunes import GROUPS
from .group import group_at
from .recipe import FULL, QUICK

HEAD = (
    *("zoo", "expert", "skill", "method", "steps", "tokens", "seconds"),
    *("||D||/||W||", "unchanged", "first 16", "loss", "exact match base", "expert"),
)
_TYPES = {"bfloat16": "", "float32": " fp32"}


def table(cache: Path | None = None) -> list[tuple[str, ...]]:
    """`HEAD` and a row for each expert; what is not built or was not measured is a dash."""
    rows = [HEAD]
    for recipe in (FULL, QUICK):
        zoo = zoo_at(recipe, cache)
        for name in zoo.names:
            figures = _read(zoo.figures_file(name))
            report = figures.get("report", {})
            losses = (report.get("base_loss"), report.get("expert_loss"))
            training = {**figures.get("training", {}), "step": recipe.steps}
            delta = {"relative_delta": figures.get("relative_delta")}
            rows.append((recipe.name, name, "mixture", "full", *_training(training), *_delta(delta), _losses(*losses)))
    for group, finetunes in GROUPS.items():
        zoo = group_at(group, cache)
        for name, finetune in finetunes.items():
            figures = _read(zoo.figures_file(name))
            base, expert = figures.get("base", {}), figures.get("expert", {})
            method = finetune.method + (f" {finetune.rank}" if finetune.rank else "") + _TYPES[finetune.dtype]
            training = figures.get("training", {"step": finetune.schedule.steps})
            rows.append(
                (
                    *(group, name, finetune.skill, method, *_training(training), *_delta(figures.get("delta", {}))),
                    *(_losses(base.get("loss"), expert.get("loss")), _exact_match(base), _exact_match(expert)),
                )
            )
    return [(*row, *("-" * (len(HEAD) - len(row)))) for row in rows]


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return found


def _training(training: dict[str, Any]) -> tuple[str, str, str]:
    steps, tokens, seconds = (training.get(key) for key in ("step", "tokens", "seconds"))
    return _or_dash(steps, "d"), _or_dash(tokens, "d"), _or_dash(seconds, ".0f")


def _delta(delta: dict[str, float | None]) -> tuple[str, str, str]:
    size, unchanged, leading = (delta.get(key) for key in ("relative_delta", "unchanged", "leading_energy"))
    return _or_dash(size, ".2e"), _or_dash(unchanged, ".1%"), _or_dash(leading, ".1%")


def _losses(base: float | None, expert: float | None) -> str:
    return "-" if base is None or expert is None else f"{base:.3f}>{expert:.3f}"


def _exact_match(answers: dict[str, Any]) -> str:
    if not answers:
        return "-"
    low, high = answers["interval"]
    return f"{answers['right']}/{answers['items']} [{100 * low:.0f}, {100 * high:.0f}] %"


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
