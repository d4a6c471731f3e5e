"""The paper's own router, a small language model that is asked by letters, trained until validation stops falling.

Beside it the latency of a decision, of this router and of the probe, as a share of the base's own prefill.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.router_data import spread
from meswitch_cli.model.tokenizer import load_tokenizer
from meswitch_cli.router.backends.base import BaseHiddenStates
from meswitch_cli.router.backends.lm import LetterModel
from meswitch_cli.router.backends.lm_training import Course, Pairs, fine_tune
from meswitch_cli.router.backends.probe import Probe
from meswitch_cli.router.backends.texts import native_dtype, quiet_transformers
from meswitch_cli.router.decide.model import RouterModel
from meswitch_cli.router.decide.router import Router
from meswitch_cli.router.decide.temperature import fit_temperature
from meswitch_cli.router.train import measures
from meswitch_cli.router.train.data import Example, gather
from meswitch_cli.router.train.settings import TrainingSettings
from meswitch_cli.router.train.split import split

#: It takes minutes for what the others take seconds for: prompts are cut to so many tokens, and of each set judged at
#: most so many a domain.
MAX_TOKENS, JUDGED = 64, 60
LATENCY_TOKENS, LATENCY_REPEATS = 100, 15
UNTRAINED = 30


def train_and_judge(
    base: Path, train: Sequence[Example], sets: Mapping[str, Sequence[Example]], scratch: Path
) -> tuple[LetterModel, dict[str, Any]]:
    """The trained model, and its figures; a training that was stopped goes on from what it left in `scratch`."""
    gathered = gather(train)
    parts = split(gathered.examples, 0)
    settings = TrainingSettings(backend="lm", max_tokens=MAX_TOKENS)
    asked = LetterModel(base, gathered.labels, max_tokens=MAX_TOKENS, training=True)
    some = {name: _some(examples, gathered.labels, JUDGED) for name, examples in sets.items()}
    untrained = _scores(asked, _some(some["report"], gathered.labels, UNTRAINED // len(gathered.labels)))
    worked = time.process_time()
    course = fine_tune(asked, _pairs(parts["train"]), _pairs(parts["validation"]), settings, _progress, scratch / "lm")
    seconds = time.process_time() - worked
    asked.model.to(torch.bfloat16).to(native_dtype())
    validation = _scores(asked, parts["validation"])
    temperature = fit_temperature(*validation)
    figures = {
        "course": _course(course),
        "processor_seconds_of_this_run": seconds,
        "prompts": len(parts["train"]),
        "bytes": 2 * sum(parameter.numel() for parameter in asked.model.parameters()),
        "untrained": _accuracy(*untrained),
        "validation": _accuracy(*validation),
        "sets": {name: _judged(asked, examples, temperature) for name, examples in some.items()},
    }
    return asked, figures


def latency(
    base: Path, prompts: Sequence[Example], model: RouterModel, layer: int, asked: LetterModel
) -> dict[str, Any]:
    """Whole decisions of the probe, and questions to the language model, beside the base's own prefill, in turns."""
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(base)
    with quiet_transformers():
        whole: Any = AutoModelForCausalLM.from_pretrained(base, dtype=native_dtype()).eval()
    states = BaseHiddenStates(str(base), layer)
    probe = Probe(states, tokenizer, layer=layer, size=states.hidden_size, max_tokens=256)
    router = Router(probe, model)
    ids = tokenizer.encode(" ".join(item.text for item in prompts[:40]))
    windows = [ids[start : start + LATENCY_TOKENS] for start in range(0, 5 * LATENCY_TOKENS, LATENCY_TOKENS)]
    texts = [tokenizer.decode(window) for window in windows]
    asked.max_tokens = 256  # so that it reads as much of a prompt as the others
    took: dict[str, list[float]] = {"prefill": [], "probe": [], "lm": []}
    for repeat in range(LATENCY_REPEATS + 2):
        turn = repeat % len(windows)
        with torch.inference_mode():
            _timed(took["prefill"], lambda: whole(torch.tensor([windows[turn]]), use_cache=True, logits_to_keep=1))  # noqa: B023
        _timed(took["probe"], lambda: router.route(texts[turn]))  # noqa: B023
        _timed(took["lm"], lambda: asked.features([texts[turn]]))  # noqa: B023
    kept = {name: values[2:] for name, values in took.items()}
    return {
        "tokens": LATENCY_TOKENS,
        "layer": layer,
        "layers": states.num_hidden_layers,
        "dtype": str(native_dtype()),
        "share_of_prefill": {
            name: statistics.median(mine / base for mine, base in zip(kept[name], kept["prefill"], strict=True))
            for name in ("probe", "lm")
        },
        "least_ms": {name: 1000 * min(values) for name, values in kept.items()},
    }


def _timed(took: list[float], work: Any) -> None:
    started = time.perf_counter()
    work()
    took.append(time.perf_counter() - started)


def _some(examples: Sequence[Example], labels: Sequence[str], count: int) -> list[Example]:
    """At most `count` of each domain, whichever the order."""
    return [item for label in labels for item in spread([one for one in examples if one.domain == label], count)]


def _pairs(examples: Sequence[Example]) -> Pairs:
    return [(item.text, item.domain) for item in examples if item.domain is not None]


def _course(course: Course) -> dict[str, Any]:
    return {
        "steps": len(course.losses),
        "validation": {str(step): loss for step, loss in course.validation.items()},
        "best_step": course.best_step,
        "converged": course.converged,
    }


def _scores(asked: LetterModel, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the letters and the truth."""
    features = asked.features([item.text for item in examples])
    truth = torch.tensor([asked.options.index(str(item.domain)) for item in examples])
    return asked.letters_head()(features), truth


def _accuracy(scores: torch.Tensor, truth: torch.Tensor) -> dict[str, Any]:
    right = int((scores.argmax(1) == truth).sum())
    return {"right": right, "prompts": len(truth)}


def _judged(asked: LetterModel, examples: Sequence[Example], temperature: float) -> dict[str, Any]:
    scores, truth = _scores(asked, examples)
    probabilities = (scores / temperature).softmax(1)
    by_domain = {
        label: _accuracy(scores[truth == index], truth[truth == index]) for index, label in enumerate(asked.options)
    }
    ece = measures.calibration_error(probabilities.double().numpy(), truth.numpy())
    return _accuracy(scores, truth) | {"by_domain": by_domain, "ece": float(ece)}


def _progress(what: str, done: int, total: int) -> None:
    print(f"{what}: {done}/{total}", file=sys.stderr, flush=True)
