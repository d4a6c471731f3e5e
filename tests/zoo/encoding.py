"""An item as the tokens that training and scoring use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_item(tokenizer: PreTrainedTokenizerBase, item: Mapping[str, str]) -> tuple[list[int], int]:
    """(input_ids, answer_start): the prompt through the chat template, the response, the end-of-turn token.

    Tokens from `answer_start` on are the answer; the first is predicted at position `answer_start - 1`.
    """
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": item["prompt"]}], add_generation_prompt=True, tokenize=False
    )
    prompt_ids = tokenizer(rendered, add_special_tokens=False).input_ids
    response_ids = tokenizer(item["response"], add_special_tokens=False).input_ids
    return [*prompt_ids, *response_ids, tokenizer.eos_token_id], len(prompt_ids)


def encode_text(tokenizer: PreTrainedTokenizerBase, item: Mapping[str, str]) -> tuple[list[int], int]:
    """(input_ids, answer_start): prompt and response as plain text, all of it but the first token to be learnt."""
    ids = tokenizer(f"{item['prompt']}\n\n{item['response']}\n", add_special_tokens=False).input_ids
    return [*ids, tokenizer.eos_token_id], 1
