"""Exact match: greedy answers to the items of a file that say what is right."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from meswitch_cli.errors import EvaluationError
from meswitch_cli.evaluation.figures import EXACT_MATCH
from meswitch_cli.evaluation.prompts import EncodedSet, EvaluationSet
from meswitch_cli.evaluation.tasks import Document, TaskRun, refuse_non_finite_logits
from meswitch_cli.token_batches import batches_by_length

#: Tokens of a batch, prompts and what may be generated together.
GENERATION_TOKENS = 8192


def final_answer(text: str) -> str:
    """What follows the last `####`, or the whole text where there is none, without blanks at its ends."""
    return text.rsplit("####", 1)[-1].strip()


def exact_match(
    model: Any,
    tokenizer: Any,
    data: EvaluationSet,
    encoded: EncodedSet,
    *,
    ends: Collection[int],
    most: int,
    context: int,
    answer_of: Callable[[int, str], str] = lambda number, text: final_answer(text),
) -> TaskRun:
    """What a model answers to each example that names its answer, 1 where it is that one.

    Args:
        model: a transformers causal language model in memory.
        data: the file's examples.
        encoded: the same, of which the prompts' tokens are used.
        ends: ids that end an answer.
        most: tokens of an answer.
        context: tokens that the model has places for.
        answer_of: reads what is compared off a generated text, from the example's number too.

    Raises:
        EvaluationError: the model's logits are not finite, or a prompt uses tokens that it does not have.
    """
    asked = [index for index, number in enumerate(encoded.kept) if data.answers[number] is not None]
    prompts = [encoded.items[index].tokens[: encoded.items[index].answer_start] for index in asked]
    generated = greedy_tokens(model, prompts, ends=ends, most=most, context=context)
    documents = []
    for index, prompt, tokens in zip(asked, prompts, generated, strict=True):
        number = encoded.kept[index]
        target, question = data.answers[number] or "", data.conversations[number][-2]["content"]
        answer = answer_of(number, tokenizer.decode(tokens, skip_special_tokens=True))
        documents.append(
            Document(
                number,
                f"{number}-{hashlib.sha256(repr((question, target)).encode()).hexdigest()[:16]}",
                question,
                tokenizer.decode(prompt),
                target,
                answer,
                {EXACT_MATCH: float(answer == final_answer(target))},
            )
        )
    if not documents:
        raise EvaluationError(f'{data.path}: no example with an "answer" fits the model\'s context')
    return TaskRun(data.name, EXACT_MATCH, tuple(documents))


@torch.inference_mode()
def greedy_tokens(
    model: Any, prompts: Sequence[Sequence[int]], *, ends: Collection[int], most: int, context: int
) -> list[list[int]]:
    """The likeliest next tokens after each prompt, until one of `ends` (left out) or `most`, or the context is full.

    Raises:
        EvaluationError: as `exact_match`.
    """
    from transformers import GenerationConfig

    device, rows = model.get_input_embeddings().weight.device, model.get_input_embeddings().weight.shape[0]
    largest = max(max(prompt) for prompt in prompts) if prompts else 0
    if largest >= rows:
        raise EvaluationError(f"the model has {rows} embedding rows, the prompts use token {largest}")
    found: list[list[int]] = [[] for _ in prompts]
    watched = model.register_forward_hook(refuse_non_finite_logits)
    try:
        for batch in batches_by_length([len(prompt) + most for prompt in prompts], GENERATION_TOKENS):
            longest = max(len(prompts[index]) for index in batch)
            # Padded on the left, so that every row's next token is its last.
            gaps = [longest - len(prompts[index]) for index in batch]
            ids = [[0] * gap + [*prompts[index]] for gap, index in zip(gaps, batch, strict=True)]
            mask = [[0] * gap + [1] * (longest - gap) for gap in gaps]
            settings = GenerationConfig(
                do_sample=False,
                max_new_tokens=max(1, min(most, context - longest)),
                eos_token_id=sorted(ends) or None,
                pad_token_id=min(ends, default=0),
            )
            output = model.generate(
                input_ids=torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                generation_config=settings,
            )
            for index, row in zip(batch, output[:, longest:].tolist(), strict=True):
                stop = next((place for place, token in enumerate(row) if token in ends), len(row))
                found[index] = row[:stop]
    except FloatingPointError as error:
        raise EvaluationError(str(error)) from error
    finally:
        watched.remove()
    return found
