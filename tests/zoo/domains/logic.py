"""Deduction over small closed worlds: four reasoning_gym generators.

Chosen because the answers can be checked by rule and differ in length: syllogisms are answered in one word,
knights and knaves in one sentence, the cube and the lock by a trace of the state after every step, written
here from the generator's metadata. A template is an item's form without its names: quantifiers, formulas,
turns or buttons.
"""

from __future__ import annotations

import re
from typing import Any

import reasoning_gym

from ..item import Item

MIXTURE = {"syllogism": 1, "knights_knaves": 1, "color_cube_rotation": 1, "quantum_lock": 1}
_CANDIDATES_PER_KIND = 600
# Harder locks take seconds each to generate.
_SETTINGS: dict[str, dict[str, Any]] = {"quantum_lock": {"difficulty": 4}}

# For each turn: the side that a side's colour comes from; sides not named stay.
_TURNS = {
    "front": {"top": "front", "front": "bottom", "bottom": "back", "back": "top"},
    "right": {"top": "right", "right": "bottom", "bottom": "left", "left": "top"},
    "back": {"top": "back", "back": "bottom", "bottom": "front", "front": "top"},
    "left": {"top": "left", "left": "bottom", "bottom": "right", "right": "top"},
    "bottom": {"top": "bottom", "bottom": "top", "front": "back", "back": "front"},
}
_OPERATIONS = {"add": "+", "subtract": "-", "multiply": "*"}


def candidates(seed: int) -> list[Item]:
    make = {
        "syllogism": _syllogism,
        "knights_knaves": _knights_knaves,
        "color_cube_rotation": _cube,
        "quantum_lock": _lock,
    }
    return [
        make[kind](entry)
        for kind in MIXTURE
        for entry in reasoning_gym.create_dataset(kind, seed=seed, size=_CANDIDATES_PER_KIND, **_SETTINGS.get(kind, {}))
    ]


def _item(kind: str, form: str, entry: dict[str, Any], response: str) -> Item:
    return Item(kind, f"{kind}:{form}", entry["question"], response, entry["answer"])


def _syllogism(entry: dict[str, Any]) -> Item:
    metadata = entry["metadata"]
    letters: dict[str, str] = {}
    statements = [metadata[key] for key in ("premise1", "premise2", "conclusion")]
    forms = []
    for statement in statements:
        quantifier, first, verb, second = re.fullmatch(r"(\w+) (\w+) (are not|are) (\w+)", statement).groups()
        for term in (first, second):
            letters.setdefault(term, chr(ord("A") + len(letters)))
        forms.append(f"{quantifier} {letters[first]} {verb} {letters[second]}")
    return _item("syllogism", "; ".join(forms), entry, entry["answer"])


def _knights_knaves(entry: dict[str, Any]) -> Item:
    return _item("knights_knaves", str(entry["metadata"]["statements"]), entry, entry["answer"])


def _cube(entry: dict[str, Any]) -> Item:
    metadata = entry["metadata"]
    sides, target = dict(metadata["initial_state"]), metadata["target_side"]
    lines = []
    for turn in metadata["rotations"]:
        sides = {side: sides[_TURNS[turn].get(side, side)] for side in sides}
        lines.append(f"{turn} to top: " + ", ".join(f"{side} {colour}" for side, colour in sides.items()))
    if sides[target] != entry["answer"]:
        raise ValueError(f"the cube's trace ends with {sides[target]}, the generator says {entry['answer']}")
    form = "-".join([*metadata["rotations"], target])
    return _item("color_cube_rotation", form, entry, "\n".join([*lines, f"#### {entry['answer']}"]))


def _lock(entry: dict[str, Any]) -> Item:
    metadata = entry["metadata"]
    buttons = {button["name"]: button for button in metadata["buttons"]}
    value, light = metadata["initial_value"], metadata["initial_state"]
    lines = []
    for name in metadata["solution_path"]:
        operation, amount = buttons[name]["type"], buttons[name]["value"]
        result = {"add": value + amount, "subtract": value - amount, "multiply": value * amount}[operation]
        light = "green" if light == "red" else "red"
        lines.append(f"{name}: {value} {_OPERATIONS[operation]} {amount} = {result}, light {light}")
        value = result
    if value != metadata["target_value"]:
        raise ValueError(f"the lock's trace ends at {value}, not at the target {metadata['target_value']}")
    form = " ".join(f"{button['type']}{button['value']}" for button in metadata["buttons"])
    return _item("quantum_lock", form, entry, "\n".join([*lines, f"#### {entry['answer']}"]))
