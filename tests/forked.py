"""A process that has imported what commands import, and forks for each one.

A command so run is a process as a user starts it, with its own arguments, folder, streams and end, but for the seconds
in which Python reads torch and transformers. `python forked.py` is that process; `Forked` is how a test has it.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import pkgutil
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

#: Beside every module of ours: what those import when they are used.
_HEAVY = ("torch", "numba", "safetensors.torch", "tokenizers", "uvicorn", "transformers.models.llama.modeling_llama")

Result = subprocess.CompletedProcess[str]


@dataclass(frozen=True)
class Running:
    """A command that was started: its process, and the folder of the files that are its streams."""

    id: int
    folder: Path
    words: tuple[str, ...]


class Forked:
    """The process, started at its first command; it ends with this one, which is the end of its standard input."""

    def __init__(self, environment: Mapping[str, str], python: str | Path = sys.executable) -> None:
        self._environment, self._python = dict(environment), str(python)
        self._process: subprocess.Popen[str] | None = None

    def run(self, words: Sequence[str], *, stdin: str = "", cwd: Path | None = None, timeout: float = 200) -> Result:
        """As `subprocess.run` of `meswitch WORDS`, or of `python -c CODE ...`, with text for streams.

        Raises:
            TimeoutExpired: it is ended by SIGALRM.
        """
        return self.wait(self.start(words, stdin=stdin, cwd=cwd, timeout=timeout))

    def start(self, words: Sequence[str], *, stdin: str = "", cwd: Path | None = None, timeout: float = 200) -> Running:
        """The same, but do not wait: `wait` must be called once."""
        folder = Path(tempfile.mkdtemp(prefix="forked-"))
        (folder / "stdin").write_text(stdin, encoding="utf-8")
        job = {"words": list(words), "cwd": str(cwd or Path.cwd()), "folder": str(folder), "seconds": int(timeout) + 1}
        return Running(self._ask(job), folder, tuple(words))

    def wait(self, running: Running) -> Result:
        """Until it ends by itself, by a signal, or because its time is over. Raises TimeoutExpired."""
        status = self._ask({"wait": running.id})
        out, err = ((running.folder / name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
        shutil.rmtree(running.folder)
        if status == -signal.SIGALRM:
            raise subprocess.TimeoutExpired(["meswitch", *running.words], 0, out, err)
        return subprocess.CompletedProcess(["meswitch", *running.words], status, out, err)

    def ended(self, running: Running) -> bool:
        """Whether it has; `wait` tells how."""
        return bool(self._ask({"ended": running.id}))

    def _ask(self, job: Mapping[str, Any]) -> int:
        if self._process is None:
            self._process = subprocess.Popen(
                [self._python, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=self._environment,
            )
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise AssertionError(f"the process that forks ended with status {self._process.wait()}")
        return int(answer)


def _serve() -> None:
    """Fork for each job on standard input and tell the child's id; wait for a child, and tell how it ended.

    A child returns from here, and runs the command.
    """
    _import_all()
    gc.freeze()  # a child's collections leave these pages shared
    # Kept apart from descriptors 0 and 1, which are a child's own.
    jobs, answers = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    ended: dict[int, int] = {}
    for line in jobs:
        job = json.loads(line)
        if "ended" in job:
            if job["ended"] not in ended:
                child, status = os.waitpid(job["ended"], os.WNOHANG)
                ended |= {child: status} if child else {}
            told = int(job["ended"] in ended)
        elif "wait" in job:
            status = ended.pop(job["wait"]) if job["wait"] in ended else os.waitpid(job["wait"], 0)[1]
            told = os.waitstatus_to_exitcode(status)
        elif not (told := os.fork()):
            _become(job)
            return
        print(told, file=answers, flush=True)
    os._exit(0)


def _become(job: Mapping[str, Any]) -> None:
    os.chdir(job["cwd"])
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        flags = os.O_WRONLY | os.O_CREAT if descriptor else os.O_RDONLY
        opened = os.open(Path(job["folder"]) / name, flags, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.argv = ["meswitch", *job["words"]]
    signal.alarm(job["seconds"])


def _command() -> int:
    """Run `meswitch` or the code with this process's arguments, and tell the status that Python would end with."""
    from meswitch_cli.app import main

    try:
        if sys.argv[1:2] == ["-c"]:
            code, sys.argv = sys.argv[2], ["-c", *sys.argv[3:]]
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        else:
            main()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _end(status: int) -> NoReturn:
    """End as Python does, but without taking every module apart, which takes longer than most commands."""
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _import_all() -> None:
    import meswitch_cli

    names = [found.name for found in pkgutil.walk_packages(meswitch_cli.__path__, "meswitch_cli.")]
    for name in [*_HEAVY, *(name for name in names if "vllm" not in name and not name.endswith("__main__"))]:
        with contextlib.suppress(ImportError):  # of an extra that is not installed
            importlib.import_module(name)


if __name__ == "__main__":
    sys.path.pop(0)  # the tests' folder: a command does not see it
    _serve()
    _end(_command())
