"""Finding tasks: shipped ones, the user's YAML and JSONL, and the names that lm-evaluation-harness knows."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meswitch_cli.errors import EvaluationError, reason_of
from meswitch_cli.jsonl import read_jsonl
from meswitch_cli.paths import user_path

if TYPE_CHECKING:
    from lm_eval.api.task import Task

SHIPPED = Path(__file__).parent / "task_files"
#: What a task file may hold that runs code from beside it.
_CODE = ("!function", "!!python", "hf_evaluate")


def load_tasks(names: Sequence[str], include: Path | None, *, allow_code: bool = False) -> list[Task]:
    """Load tasks anew, by YAML path or by name: the user's folder first, then the shipped ones, then the harness's.

    Templates are rendered in jinja2's sandbox.

    Raises:
        EvaluationError: lm-evaluation-harness is not installed, there is no such task, its file or data is damaged or
            missing, it would run code that was not allowed, or it needs a network that is not there.
    """
    require_harness()
    _sandbox_templates()
    folders = [folder for folder in (include, SHIPPED) if folder is not None]
    if include is not None and not include.is_dir():
        raise EvaluationError(f"--include-path {include}: no such folder")
    found: list[Task] = []
    for name in names:
        broken: list[str] = []
        path = user_path(name) if name.endswith((".yaml", ".yml")) else _local_file(name, folders, broken)
        with quiet():
            found += _from_file(path, allow_code) if path is not None else _from_harness(name, folders, broken)
    taken = [task.task_name for task in found]
    twice = next((name for name in taken if taken.count(name) > 1), None)
    if twice is not None:
        raise EvaluationError(f"--tasks: {twice!r} is named twice")
    return found


def require_harness() -> None:
    """Raise EvaluationError where the extra is not installed."""
    try:
        import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        raise EvaluationError(f"tasks need lm-evaluation-harness: pip install 'meswitch[eval]' ({error})") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the log lines of the harness and of downloads off stderr; what fails is raised, and said once."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "huggingface_hub", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _sandbox_templates() -> None:
    """A task file's templates are text from outside: keep them from reaching Python's internals."""
    import lm_eval.utils
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if not isinstance(lm_eval.utils.env, ImmutableSandboxedEnvironment):
        sandbox = ImmutableSandboxedEnvironment(undefined=lm_eval.utils.env.undefined, keep_trailing_newline=True)
        sandbox.filters.update(lm_eval.utils.env.filters)
        lm_eval.utils.env = sandbox


def _local_file(name: str, folders: Sequence[Path], broken: list[str]) -> Path | None:
    """The file of a task; files that are none do not stand in its way, and what is wrong with them is noted."""
    for folder in folders:
        for path in sorted(folder.glob("**/*.yaml")):
            try:
                if _read(path).get("task") == name:
                    return path
            except EvaluationError as error:
                broken.append(str(error))
    return None


def _read(path: Path, *, functions: bool = False) -> dict[str, Any]:
    """A task file with what it includes, functions left as text unless asked for."""
    import yaml
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        value: dict[str, Any] = load_yaml(path, resolve_func=functions)
    except FileNotFoundError as error:
        raise EvaluationError(f"{error.filename or path}: no such task file") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError, ImportError, AttributeError) as error:
        raise EvaluationError(f"{path}: not a task file: {reason_of(error)}") from error
    return value


def _from_file(path: Path, allow_code: bool) -> list[Task]:
    from lm_eval.api.task import ConfigurableTask

    config = _read(path)
    for file in [path, *(path.parent.resolve() / item for item in _included(path))]:
        used = next((word for word in _CODE if word in file.read_text(encoding="utf-8")), None)
        if (used or "class" in config) and not allow_code:
            raise EvaluationError(
                f"{file}: {used or 'class'} runs code that comes with the task; read it, then give --allow-task-code"
            )
    if allow_code:
        config = _read(path, functions=True)
    if not isinstance(config.get("task"), str):
        raise EvaluationError(f"{path}: a task file names its task: task: my_task")
    config = _with_local_data(config, path)
    try:
        return [ConfigurableTask(config=config)]
    except EvaluationError:
        raise
    except Exception as error:  # the harness and datasets raise whatever they meet
        raise _explained(error, config["task"], str(path)) from error


def _included(path: Path) -> list[str]:
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Reads the one key that matters, whatever tags the rest has."""

    Loader.add_multi_constructor("", lambda loader, suffix, node: None)
    value = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    included = value.get("include", []) if isinstance(value, dict) else []
    return [included] if isinstance(included, str) else list(included)


def _with_local_data(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """JSONL beside the task file is read here: no download code, no cache, and errors that name the line."""
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    if config.get("dataset_path") != "json" or files is None:
        return config
    by_split = files if isinstance(files, dict) else {"train": files}
    rows: dict[str, list[dict[str, Any]]] = {}
    for split, names in by_split.items():
        rows[split] = [
            row for name in ([names] if isinstance(names, str) else names) for row in _rows(path.parent / name)
        ]
    return config | {"custom_dataset": _dataset(rows), "dataset_kwargs": {}}


def _dataset(rows: dict[str, list[dict[str, Any]]]) -> Callable[..., Any]:
    def make(**_: Any) -> Any:
        from datasets import Dataset, DatasetDict

        return DatasetDict({split: Dataset.from_list(items) for split, items in rows.items()})

    return make


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, row in read_jsonl(path, EvaluationError, "a task's data").values:
        if not isinstance(row, dict):
            raise EvaluationError(f"{path}: line {number}: not a JSON object")
        rows.append(row)
    return rows


def _from_harness(name: str, folders: Sequence[Path], broken: Sequence[str]) -> list[Task]:
    manager = _manager(tuple(str(folder) for folder in folders))
    if name not in manager.all_tasks:
        shipped = sorted(str(_read(path).get("task")) for path in SHIPPED.glob("*.yaml"))
        raise EvaluationError(
            f"--tasks {name}: no such task; shipped are {', '.join(shipped)}; `lm-eval ls tasks` lists the harness's"
            + "".join(f"; {reason}" for reason in broken)
        )
    try:
        return list(manager.load([name])["tasks"].values())
    except Exception as error:  # the harness and datasets raise whatever they meet
        raise _explained(error, name, "lm-evaluation-harness") from error


@functools.lru_cache(maxsize=1)
def _manager(folders: tuple[str, ...]) -> Any:
    """The harness's index of all tasks; it reads some ten thousand files."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(folders))


def _explained(error: Exception, name: str, where: str) -> EvaluationError:
    text = " ".join(f"{type(item).__name__} {item}" for item in (error, error.__cause__, error.__context__) if item)
    network = ("ConnectionError", "Offline", "offline", "reach", "resolve", "Timeout", "ProxyError", "huggingface.co")
    if any(word in text for word in network):
        return EvaluationError(
            f"task {name!r} needs data from the Hugging Face Hub, which cannot be reached from here "
            f"({reason_of(error)}); use tasks with local files (--include-path), or a machine with a network"
        )
    return EvaluationError(f"task {name!r} ({where}) cannot be loaded: {reason_of(error)}")
