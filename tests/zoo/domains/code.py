"""Python: reasoning_gym's `codeio` problems, a description answered by a program, and programs' outputs
predicted.

A template is a source problem; problems whose programs or descriptions nearly coincide count as one. Two in
three items are `write` (no exact match), one in three `predict` (the program is shown, its output is the
answer).
"""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from random import Random
from typing import Any

import reasoning_gym.data

from ..item import Item
from .programs import run_programs

MIXTURE = {"write": 2, "predict": 1}
# About 384 tokens; the exact limit is applied later, with the tokenizer.
_MAX_CHARACTERS = 1600
_MAX_PROGRAM_CHARACTERS = 1000
_MAX_CALL_CHARACTERS = 160
_MAX_OUTPUT_CHARACTERS = 40
# Long numbers would measure arithmetic, not reading of programs.
_LONG_NUMBER = re.compile(r"[\d.]{7,}")
# The data set's instructions to its own writers.
_BOILERPLATE = (
    "# import necessary",
    "# all class and function",
    "# main function",
    "# all input arg",
    "# if you need to invoke",
    "# return, the returned",
)
_CALLS_PER_PROGRAM = 2
# Word overlap (Jaccard) from which two problems are one template.
_SAME_DESCRIPTION = 0.6


def candidates(seed: int) -> list[Item]:
    problems = [problem for problem in _problems() if _length(problem) <= _MAX_CHARACTERS]
    templates = [f"codeio:{group}" for group in _groups(problems)]
    shuffled = list(zip(problems, templates, strict=True))
    Random(seed).shuffle(shuffled)
    writes = [_write(problem, template) for problem, template in shuffled]
    return writes + _predicts(shuffled, seed)


def _problems() -> list[dict[str, Any]]:
    path = Path(reasoning_gym.data.get_data_file_path("codeio.jsonl.gz"))
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        problems = [json.loads(line) for line in lines]
    for problem in problems:
        kept = [line for line in problem["code_sample"].splitlines() if not line.strip().startswith(_BOILERPLATE)]
        problem["code_sample"] = re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()
    return problems


def _length(problem: dict[str, Any]) -> int:
    return sum(len(problem[key]) for key in ("task_description", "input_output_spec", "code_sample"))


def _groups(problems: list[dict[str, Any]]) -> list[int]:
    """For each problem the index of the first one that it nearly repeats, itself where there is none."""
    words = [set(re.findall(r"\w+", problem["task_description"].lower())) for problem in problems]
    groups: list[int] = []
    for index, own in enumerate(words):
        similar = (
            groups[other]
            for other in range(index)
            if len(own & words[other]) >= _SAME_DESCRIPTION * len(own | words[other])
            or problems[index]["code_sample"] == problems[other]["code_sample"]
        )
        groups.append(next(similar, index))
    return groups


def _write(problem: dict[str, Any], template: str) -> Item:
    prompt = (
        f"{problem['task_description'].strip()}\n\n{problem['input_output_spec'].strip()}\n\n"
        "Write a Python function `main_solution` that solves this."
    )
    return Item("write", template, prompt, problem["code_sample"], "")


def _predicts(problems: list[tuple[dict[str, Any], str]], seed: int) -> list[Item]:
    short = [pair for pair in problems if len(pair[0]["code_sample"]) <= _MAX_PROGRAM_CHARACTERS]
    sources = [(problem["code_sample"], problem["input_generator"]) for problem, _ in short]
    items = []
    for (problem, template), calls in zip(short, run_programs(sources, _CALLS_PER_PROGRAM, seed), strict=True):
        for arguments, output in calls:
            if len(arguments) > _MAX_CALL_CHARACTERS or len(output) > _MAX_OUTPUT_CHARACTERS:
                continue
            if not _LONG_NUMBER.search(arguments + output):
                prompt = (
                    f"{problem['code_sample']}\n\nWhat does `main_solution` return for {arguments}? "
                    "Give the value as JSON and nothing else."
                )
                items.append(Item("predict", template, prompt, output, output))
    return items
