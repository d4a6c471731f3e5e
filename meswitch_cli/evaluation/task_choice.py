"""`--tasks [LABEL=]NAME,...`: which tasks an evaluation runs, each proven to load before any model does."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from meswitch_cli.errors import EvaluationError, UsageError
from meswitch_cli.evaluation.subjects import split_label
from meswitch_cli.evaluation.task_source import load_tasks


@dataclass(frozen=True)
class TaskChoice:
    """A task as the user named it.

    Attributes:
        name: its name, its file, or a group's name.
        owner: label of the expert whose field it is, None where the user named none.
        tasks: names of the tasks that it stands for.
    """

    name: str
    owner: str | None
    tasks: tuple[str, ...]


def parse_tasks(options: Sequence[str], labels: Collection[str]) -> list[tuple[str, str | None]]:
    """Read `[LABEL=]NAME[,NAME...]` options to (name, label).

    Raises:
        UsageError: a label that no expert has, or an option that names nothing.
    """
    found: list[tuple[str, str | None]] = []
    for option in options:
        owner, names = split_label(option)
        if owner is not None and owner not in labels:
            raise UsageError(f"--tasks {option}: no expert is called {owner!r}")
        named = [name.strip() for name in names.split(",") if name.strip()]
        if not named:
            raise UsageError(f"--tasks {option}: names no task")
        found += [(name, owner) for name in named]
    return found


def choose_tasks(
    options: Sequence[str], labels: Collection[str], include: Path | None, *, allow_code: bool
) -> tuple[list[TaskChoice], dict[str, str]]:
    """The tasks that load, and by name why the others do not.

    Raises:
        UsageError: as `parse_tasks`.
        EvaluationError: a task is named twice.
    """
    choices: list[TaskChoice] = []
    failures: dict[str, str] = {}
    for name, owner in parse_tasks(options, labels):
        try:
            loaded = load_tasks([name], include, allow_code=allow_code)
        except EvaluationError as error:
            failures[name] = str(error)
            continue
        choices.append(TaskChoice(name, owner, tuple(task.task_name for task in loaded)))
    names = [task for choice in choices for task in choice.tasks]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise EvaluationError(f"--tasks: {twice!r} is named twice")
    return choices, failures
