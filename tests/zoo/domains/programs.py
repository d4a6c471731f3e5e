"""Runs the short programs of a data file to learn what they return.

The programs are other people's: only those run whose syntax tree imports nothing but arithmetic and names
nothing that reaches the machine, in a separate interpreter with limits on time and memory. A program is
stopped after a number of lines, the same on every machine; the clock only ends what hangs inside one line.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence

_ALLOWED_IMPORTS = {
    "math",
    "random",
    "itertools",
    "collections",
    "functools",
    "fractions",
    "statistics",
    "string",
    "re",
}
# What reaches the machine or the interpreter, and what orders or numbers things as the machine likes.
_FORBIDDEN_NAMES = {
    *(
        "open",
        "input",
        "exec",
        "eval",
        "compile",
        "globals",
        "locals",
        "vars",
        "getattr",
        "setattr",
        "delattr",
    ),
    *("super", "type", "memoryview", "breakpoint", "exit", "quit", "help", "print"),
    *("id", "hash", "set", "frozenset"),
}

_RUNNER = """
import json, random, resource, signal, sys
from random import Random
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
def stop(*_):
    raise TimeoutError
signal.signal(signal.SIGPROF, stop)
def count(frame, event, argument):
    global lines
    lines += 1
    if lines > 50000:
        raise TimeoutError
    return count
request = json.load(sys.stdin)
results = []
for number, (program, generator) in enumerate(request["sources"]):
    calls, lines = [], 0
    signal.setitimer(signal.ITIMER_PROF, 5)
    sys.settrace(count)
    try:
        scope = {"Random": Random, "__name__": "program"}
        exec(program, scope)
        exec(generator, scope)
        for call in range(request["calls"]):
            seed = request["seed"] * 100000 + number * 10 + call
            random.seed(seed)
            shown = json.dumps(scope["generate_inputs"](Random(seed)))
            outputs = set()
            for throw in (1, 2):
                random.seed(throw)
                outputs.add(json.dumps(scope["main_solution"](**json.loads(shown)), allow_nan=False))
            if len(outputs) == 1:
                calls.append((shown, outputs.pop()))
    except BaseException:
        pass
    finally:
        sys.settrace(None)
        signal.setitimer(signal.ITIMER_PROF, 0)
    results.append(calls)
sys.stdout.write(json.dumps(results))
"""


def is_harmless(source: str) -> bool:
    """Whether the program uses only arithmetic: no other imports, no private attributes, no way to files."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return False
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(alias.name not in _ALLOWED_IMPORTS for alias in node.names):
            return False
        if isinstance(node, ast.ImportFrom) and node.module not in _ALLOWED_IMPORTS:
            return False
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            return False
        if isinstance(node, ast.Name) and (node.id in _FORBIDDEN_NAMES or node.id.startswith("__")):
            return False
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "__" in node.value:
            return False
    return True


def run_programs(sources: Sequence[tuple[str, str]], calls: int, seed: int) -> list[list[tuple[str, str]]]:
    """For each (program, input generator): up to `calls` pairs (arguments, output) as JSON; none if it may
    not run.

    A program whose output depends on chance has none either.
    """
    harmless = [number for number, pair in enumerate(sources) if all(is_harmless(source) for source in pair)]
    request = json.dumps({"sources": [sources[number] for number in harmless], "calls": calls, "seed": seed})
    with tempfile.TemporaryDirectory() as directory:
        finished = subprocess.run(
            [sys.executable, "-s", "-c", _RUNNER],
            input=request,
            capture_output=True,
            text=True,
            check=True,
            cwd=directory,
            timeout=600,
            env={"PATH": os.defpath, "PYTHONHASHSEED": "0"},
        )
    results: list[list[tuple[str, str]]] = [[] for _ in sources]
    for number, pairs in zip(harmless, json.loads(finished.stdout), strict=True):
        results[number] = [(arguments, output) for arguments, output in pairs]
    return results
