"""A sentence encoder: any local folder that transformers' AutoModel loads, mean-pooled."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional

from meswitch_cli.errors import RouterError, UsageError, reason_of
from meswitch_cli.model.tokenizer import load_tokenizer
from meswitch_cli.router.backends.contract import Backend, FitRequest, FittedBackend, SavedBackend, all_features
from meswitch_cli.router.backends.texts import encode, mean_over_tokens, quiet_transformers
from meswitch_cli.router.decide.conversation import clip_characters
from meswitch_cli.token_batches import batches_by_length, padded

#: What a router carries of the encoder's folder: it must go on working when that folder is gone.
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_OPTIONAL_FILES = ("vocab.txt", "sentencepiece.bpe.model", "spiece.model")


class Encoder(Backend):
    """Last hidden states averaged over tokens and brought to unit length."""

    title = "sentence encoder"

    def __init__(self, folder: Path, *, max_tokens: int) -> None:
        from transformers import AutoModel

        if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
            raise RouterError(f"{folder}: not an encoder's folder: config.json and model.safetensors are needed")
        try:
            with quiet_transformers():
                model = AutoModel.from_pretrained(
                    folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
                )
        except Exception as error:  # transformers raises many kinds for a folder it cannot load
            raise RouterError(f"{folder}: the encoder cannot be loaded: {reason_of(error)}") from error
        self._folder = folder
        self._model = model.eval()
        self._tokenizer = load_tokenizer(folder, RouterError)
        self.size = int(model.config.hidden_size)
        self.max_tokens = min(max_tokens, int(getattr(model.config, "max_position_embeddings", max_tokens)))

    @classmethod
    def fit(cls, request: FitRequest) -> FittedBackend:
        if request.model is None:
            raise UsageError("--model DIR is needed: the folder of the sentence encoder")
        encoder = cls(request.model, max_tokens=request.settings.max_tokens)
        return FittedBackend(
            backend=encoder,
            features=all_features(encoder, request),
            standardise=True,
        )

    @classmethod
    def load(cls, saved: SavedBackend) -> Encoder:
        return cls(saved.folder, max_tokens=saved.number("max_tokens"))

    @torch.inference_mode()
    def features(self, texts: Sequence[str], on_done: Callable[[int], None] = lambda count: None) -> torch.Tensor:
        token_ids = [encode(self._tokenizer, text, self.max_tokens) for text in texts]
        pooled = torch.empty(len(texts), self.size)
        for batch in batches_by_length([len(ids) for ids in token_ids]):
            inputs, mask = padded([token_ids[index] for index in batch])
            hidden = self._model(input_ids=inputs, attention_mask=mask.long()).last_hidden_state
            pooled[batch] = functional.normalize(mean_over_tokens(hidden, mask), dim=1)
            on_done(len(batch))
        return pooled

    def count_tokens(self, text: str) -> int:
        return len(self._tokenizer.encode(clip_characters(text, self.max_tokens)))

    def settings(self) -> dict[str, Any]:
        return {"size": self.size, "max_tokens": self.max_tokens}

    def save_model(self, folder: Path) -> None:
        folder.mkdir()
        for name in (*FILES, *_OPTIONAL_FILES):
            if (self._folder / name).is_file():
                shutil.copyfile(self._folder / name, folder / name)


BACKEND = Encoder
