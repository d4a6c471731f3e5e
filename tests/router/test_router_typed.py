"""Prompts that a person types, and those of the README and of `serve`, through a router of the real base."""

from __future__ import annotations

from pathlib import Path

import pytest

import zoo
from meswitch_cli.router import Router
from meswitch_cli.router.train.data import Example, gather
from meswitch_cli.router.train.settings import TrainingSettings
from meswitch_cli.router.train.training import train_router

ROOT = Path(__file__).parents[2]
#: What the README sends and what `meswitch serve` prints.
SHOWN = {
    "README.md": "Tom has 17 apples and buys 25 more. How many are there?",
    "meswitch_cli/commands/serve.py": "What is 12 times 12?",
}
TYPED = {
    "maths": (
        "what's 15% of 80",
        "If 3 pens cost 4.50, how much are 7 pens?",
        "Solve 2x + 9 = 31",
        "47 * 36 = ?",
        "My car does 6.2 litres per 100 km. How much petrol do I need for 340 km?",
        "What is the square root of 1764?",
        "I earn 2,350 a month and spend a third of it on rent. How much is left?",
        "find the area of a circle with radius 7",
        "a train leaves at 9:40 and arrives at 13:05, how long is the trip",
        "Simplify (3x^2 - 12) / (x - 2)",
        "Convert 5 miles to kilometres",
        "how many ways are there to arrange 6 people in a row",
        "What is the derivative of x^2 * ln(x)?",
        "Two dice are thrown. What is the chance that the sum is at least 10?",
        "1/3 + 1/4 + 1/5",
        "A recipe for 4 people needs 250 g of rice. How much for 10 people?",
        "What is the sum of the first 100 natural numbers?",
        "Anna is twice as old as Ben. Together they are 36. How old is Anna?",
        "round 3.14159 to two decimals",
        "The price went from 80 to 92 euros. By how many percent did it rise?",
    ),
    "code": (
        "Write a Python function that reverses a string",
        "how do I read a file line by line in python",
        "What does this print? print([i**2 for i in range(4)])",
        "fix this: for i in range(10) print(i)",
        "Write a function that returns the n-th Fibonacci number",
        "How do I sort a dict by value in Python?",
        "difference between a list and a tuple",
        "Explain this code: while n: n //= 2",
        "write a regex for dates like 2024-05-31",
        "SELECT name FROM users; how do I get only the distinct names?",
        "Implement a stack with push and pop",
        "Why is my loop infinite? i = 0\nwhile i < 5:\n    print(i)",
        "Write a unit test for a function add(a, b)",
        "def f(x): return x if x < 2 else f(x-1) + f(x-2). What is f(6)?",
        "How can I catch an exception in Java?",
        "write a javascript function that removes duplicates from an array",
        "why is my git push rejected",
        "IndexError: list index out of range, what does it mean",
        "Refactor this into a list comprehension: out = []\nfor x in xs:\n    if x > 0:\n        out.append(x)",
        "parse this JSON in Python: {\"a\": [1, 2]}",
    ),
    "logic": (
        "All dogs are mammals and all mammals breathe. Do all dogs breathe?",
        "If it rains the street gets wet. The street is dry. Did it rain?",
        "A knight always tells the truth, a knave always lies. A says: we are both knaves. What is A?",
        "Is this valid: some cats are black, Tom is a cat, so Tom is black?",
        "Tom is taller than Ann, Ann is taller than Sue. Who is the shortest?",
        "Five people stand in a line. Bob is behind Carol, Dave is first. Who can be last?",
        "No fish can fly. A salmon is a fish. What follows?",
        "Is 'p and not p' a contradiction?",
        "Either the butler or the gardener did it. The butler was away. Who did it?",
        "If yesterday was not Sunday, can today be Monday?",
        "What is the fallacy in: everybody does it, so it must be right?",
        "If A implies B and B implies C, does A imply C?",
        "One of three sisters lies. Anna says Bea lies, Bea says Clara lies, Clara says both lie. Who tells the truth?",
        "Which conclusion follows: all poets are dreamers, no dreamer is rich?",
        "The red house is left of the blue one, the green one is at the right end. What is the order?",
        "Which statement, if true, weakens the argument that the new road caused the accidents?",
        "If nobody who lies is trusted and Max is trusted, does Max lie?",
        "Is the converse of a true statement always true?",
        "When is 'if p then q' false?",
        "Some A are B. All B are C. Are some A C?",
    ),
}  # fmt: skip
FOREIGN = (
    "Who wrote Hamlet?", "What is the capital of Peru?", "Give me a recipe for pancakes",
    "Translate 'good night' into Italian", "What are the symptoms of the flu?", "Tell me a joke",
    "Who won the World Cup in 2014?",
    "Write a birthday poem for my aunt",
    "Can my landlord raise the rent in winter?", "hello, how are you?", "Recommend a film for tonight",
    "How do I get red wine out of a carpet?", "When did the Second World War end?", "Why is the sky blue?",
    "What should I wear to a job interview?", "Wie wird das Wetter morgen?",
)  # fmt: skip


@pytest.fixture(scope="module")
def router() -> Router:
    """Of 200 prompts an expert and no others, as the README trains it."""
    family = zoo.build(quick=True)
    examples = [
        Example(item["prompt"], name, f"zoo {name}", item["template"])
        for name in zoo.EXPERTS
        for item in zoo.items(name, "train", quick=True)[:200]
    ]
    return train_router(gather(examples), TrainingSettings(), base=str(family.base)).router


@pytest.mark.zoo
def test_prompts_that_the_documents_show_reach_their_expert(router: Router) -> None:
    for file, prompt in SHOWN.items():
        assert prompt in (ROOT / file).read_text()
        decision = router.route(prompt)
        assert (decision.expert, decision.reason) == ("maths", "routed"), prompt


@pytest.mark.zoo
def test_prompts_that_a_person_types_reach_their_expert(router: Router) -> None:
    judged = {name: router.model.judge(router.backend.features(prompts)) for name, prompts in TYPED.items()}
    for name, found in judged.items():
        likeliest = sum(item.label == name for item in found)
        reached = sum(item.label == name and item.verdict == "routed" for item in found)
        missed = [text for text, item in zip(TYPED[name], found, strict=True) if item.label != name]
        assert likeliest >= 19 and reached >= 17, f"{name}: {likeliest} likeliest, {reached} reached; {missed}"


@pytest.mark.zoo
def test_prompts_of_other_fields_reach_nobody(router: Router) -> None:
    judged = router.model.judge(router.backend.features(FOREIGN))
    passed = [text for text, item in zip(FOREIGN, judged, strict=True) if item.verdict == "routed"]
    assert len(passed) <= 1, passed
