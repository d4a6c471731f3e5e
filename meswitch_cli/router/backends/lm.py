"""The paper's router: a small causal language model answers a multiple-choice question by one letter.

ME-Switch (arXiv 2406.09041, section on routing) does not publish its template; this one is ours.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from meswitch_cli.checkpoint.source import resolve
from meswitch_cli.errors import RouterError, UsageError, reason_of
from meswitch_cli.model.tokenizer import load_tokenizer
from meswitch_cli.router.backends.contract import (
    NULL,
    Backend,
    FitRequest,
    FittedBackend,
    LabelledTexts,
    SavedBackend,
    all_features,
)
from meswitch_cli.router.backends.lm_training import fine_tune
from meswitch_cli.router.backends.texts import encode, native_dtype, quiet_transformers
from meswitch_cli.router.decide.conversation import clip_characters
from meswitch_cli.router.decide.head import Head
from meswitch_cli.token_batches import batches_by_length, padded

LETTERS = string.ascii_uppercase
_QUESTION = "\n\nWhich domain does the request above belong to?\n{options}\nAnswer:"


class LetterModel(Backend):
    """The hidden state at the last position of the question; the head is the letters' rows of the model's own head.

    No text is generated: the letters' logits of one forward are the scores, so there is nothing to parse and nothing
    that can fail to parse.
    """

    title = "language model"
    extendable = False

    def __init__(self, folder: Path, options: tuple[str, ...], *, max_tokens: int, training: bool = False) -> None:
        from transformers import AutoModelForCausalLM

        if not 2 <= len(options) <= len(LETTERS):
            raise RouterError(f"the lm backend chooses between 2 to {len(LETTERS)} experts, not {len(options)}")
        try:
            with quiet_transformers():
                self.model: Any = AutoModelForCausalLM.from_pretrained(
                    folder,
                    dtype=torch.float32 if training else native_dtype(),
                    local_files_only=True,
                    use_safetensors=True,
                ).eval()
        except Exception as error:  # transformers raises many kinds for a folder it cannot load
            raise RouterError(f"{folder}: the language model cannot be loaded: {reason_of(error)}") from error
        self.tokenizer = load_tokenizer(folder, RouterError)
        self.options = options
        self.size = int(self.model.config.get_text_config().hidden_size)
        self.max_tokens = max_tokens
        self.letter_ids = [self._letter_id(letter) for letter in LETTERS[: len(options)]]

    @classmethod
    def fit(cls, request: FitRequest) -> FittedBackend:
        """Fine-tune every weight until validation stops falling, then take the letters' rows as the head."""
        folder = str(request.model) if request.model else request.base.name if request.base else None
        if folder is None:
            raise UsageError("--model DIR is needed: the folder of the small causal language model")
        settings = request.settings
        path = Path(resolve(folder).path)
        made = cls(path, request.labels, max_tokens=settings.max_tokens, training=True)
        train, validation = (_certain(request.parts[part], request.labels) for part in ("train", "validation"))
        kept = request.read_ahead / "lm" if request.read_ahead else None
        course = fine_tune(made, train, validation, settings, request.on_progress, kept)
        # As it will be stored and served, so that the figures are of what the folder holds.
        made.model.to(torch.bfloat16).to(native_dtype())
        return FittedBackend(
            backend=made,
            features=all_features(made, request),
            standardise=False,
            head=made.letters_head(),
            notes={
                "first_losses": course.losses[:5],
                "last_losses": course.losses[-5:],
                "validation_losses": {str(step): loss for step, loss in course.validation.items()},
                "best_step": course.best_step,
                "converged": course.converged,
            },
        )

    @classmethod
    def load(cls, saved: SavedBackend) -> LetterModel:
        options = saved.settings.get("options")
        if not isinstance(options, list) or not all(isinstance(item, str) for item in options):
            raise RouterError("router.json: backend: options is not a list of names")
        return cls(saved.folder, tuple(options), max_tokens=saved.number("max_tokens"))

    def _letter_id(self, letter: str) -> int:
        """The token of " A" after "Answer:"."""
        ids = self.tokenizer.encode(f" {letter}", add_special_tokens=False)
        return int(ids[-1])

    def question(self, text: str, options: Sequence[str]) -> list[int]:
        """Token ids of the question about a prompt; the prompt is cut to `max_tokens`, the question never."""
        prompt = encode(self.tokenizer, text, self.max_tokens)
        listed = "\n".join(f"{letter}. {name}" for letter, name in zip(LETTERS, options, strict=False))
        return [*prompt, *self.tokenizer.encode(_QUESTION.format(options=listed), add_special_tokens=False)]

    def last_hidden(self, token_ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """`[n, hidden]` after the final norm, at each question's last token."""
        inputs, _ = padded(token_ids)
        # Padding is on the right and attention is causal: no token sees it, so none needs a mask.
        hidden = self.model.base_model(input_ids=inputs, use_cache=False).last_hidden_state
        last = torch.tensor([len(ids) - 1 for ids in token_ids])
        return torch.as_tensor(hidden[torch.arange(len(token_ids)), last])

    @torch.inference_mode()
    def features(self, texts: Sequence[str], on_done: Callable[[int], None] = lambda count: None) -> torch.Tensor:
        questions = [self.question(text, self.options) for text in texts]
        found = torch.empty(len(texts), self.size)
        for batch in batches_by_length([len(ids) for ids in questions]):
            found[batch] = self.last_hidden([questions[index] for index in batch]).float()
            on_done(len(batch))
        return found

    def letters_head(self) -> Head:
        """The letters' rows of the output embedding."""
        weight = self.model.get_output_embeddings().weight[self.letter_ids].detach().float().clone()
        return Head(weight, torch.zeros(len(self.options)))

    def count_tokens(self, text: str) -> int:
        return len(self.tokenizer.encode(clip_characters(text, self.max_tokens)))

    def settings(self) -> dict[str, Any]:
        return {"size": self.size, "max_tokens": self.max_tokens, "options": list(self.options)}

    def save_model(self, folder: Path) -> None:
        """As bf16, what it is served in."""
        with quiet_transformers():
            self.model.to(torch.bfloat16)
            self.model.config.dtype = torch.bfloat16
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)


def _certain(part: LabelledTexts, labels: Sequence[str]) -> list[tuple[str, str]]:
    """The prompts whose label is certain, with it."""
    return [
        (text, labels[label]) for text, label in zip(part.texts, part.labels.tolist(), strict=True) if label != NULL
    ]


BACKEND = LetterModel
