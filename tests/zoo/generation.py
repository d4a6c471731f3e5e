"""Greedy answers of a model to many prompts at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.inference_mode()
def greedy_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Mapping[str, str]],
    max_new_tokens: int,
    batch_size: int = 50,
) -> list[str]:
    """What the model answers to each item's prompt through the chat template, up to the end of its turn."""
    prompts = [
        tokenizer(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": item["prompt"]}], add_generation_prompt=True, tokenize=False
            ),
            add_special_tokens=False,
        ).input_ids
        for item in items
    ]
    # Like lengths together: less padding.
    order = sorted(range(len(items)), key=lambda index: len(prompts[index]))
    texts = [""] * len(items)
    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        longest = max(len(prompts[index]) for index in members)
        # Padded on the left, so that every row's next token is its last.
        padding = [longest - len(prompts[index]) for index in members]
        pad = tokenizer.eos_token_id
        input_ids = torch.tensor([[pad] * gap + prompts[index] for gap, index in zip(padding, members, strict=True)])
        mask = torch.tensor([[0] * gap + [1] * (longest - gap) for gap in padding])
        output = model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
        )
        for index, row in zip(members, output[:, longest:], strict=True):
            texts[index] = tokenizer.decode(row, skip_special_tokens=True)
    return texts
