"""`meswitch` as tests call it: in a process of its own, or in this one."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import unittest.mock
from pathlib import Path

from forked import Forked

from meswitch_cli.app import main

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}

Result = subprocess.CompletedProcess[str]
_FORKED = Forked(ENVIRONMENT)


def meswitch(
    *arguments: object,
    stdin: str = "",
    cwd: Path | None = None,
    timeout: float = 200,
    online: bool = False,
    anew: bool = False,
) -> Result:
    """Run a command as a user does, in a process of its own, which is forked from one that has read the libraries.

    With `anew` the process begins at nothing; so it does with `online`, with what the environment says of the Hub now.
    """
    words = [str(argument) for argument in arguments]
    if not (online or anew):
        return _FORKED.run(words, stdin=stdin, cwd=cwd, timeout=timeout)
    return subprocess.run(
        [sys.executable, "-m", "meswitch_cli", *words],
        capture_output=True,
        text=True,
        input=stdin,
        cwd=cwd,
        env=os.environ | {"COLUMNS": "200"} if online else ENVIRONMENT,
        timeout=timeout,
        check=False,
    )


def python(code: str, *arguments: object, cwd: Path | None = None, timeout: float = 200) -> Result:
    """Run `python -c CODE` so."""
    return _FORKED.run(["-c", code, *map(str, arguments)], cwd=cwd, timeout=timeout)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def in_process(*arguments: object, terminal: bool = False) -> Result:
    """The same without a process of its own: for mistakes, of which there are many.

    With `terminal` both streams are terminals; what styles the text is taken out of it again.
    """
    words = ["meswitch", *map(str, arguments)]
    kind = Terminal if terminal else io.StringIO
    out, err, status = kind(), kind(), 0
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        unittest.mock.patch.object(sys, "argv", words),
    ):
        try:
            main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(bool(end.code))
    return subprocess.CompletedProcess(words, status, unstyled(out.getvalue()), unstyled(err.getvalue()))


def unstyled(text: str) -> str:
    """The text without the sequences that tell a terminal of colours and places."""
    return re.sub(r"\x1b(\[[0-9;?]*[a-zA-Z]|\][^\x07]*\x07)", "", text)


def fails(result: Result, status: int, *words: str) -> None:
    """Check that a command ended with a status, these words on stderr, no traceback, and nothing on stdout."""
    assert result.returncode == status, result.stdout + result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    for word in words:
        assert word in result.stderr
    assert result.stdout == ""
