"""A byte-level tokenizer made in code: 256 bytes, five special tokens, a chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def tiny_tokenizer(added_tokens: int = 0) -> PreTrainedTokenizerFast:
    """261 tokens; `added_tokens` more (`<|added_0|>`...) begin at id 268, a tiny model's first new row."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    if added_tokens:
        symbols += [f"<|unused_{index}|>" for index in range(268 - len(symbols))]
        symbols += [f"<|added_{index}|>" for index in range(added_tokens)]
    model = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    specials = [*SPECIAL_TOKENS, *(symbol for symbol in symbols if symbol.startswith("<|added_"))]
    model.add_special_tokens([AddedToken(symbol, special=True, normalized=False) for symbol in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )
