"""Which list of modules holds the decoder layers."""

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from meswitch_cli.errors import CheckpointError
from meswitch_cli.model.architecture import architecture, decoder_layers

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "num_hidden_layers": 3, "vocab_size": 60, "tie_word_embeddings": True,
}  # fmt: skip


def _layers(count: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(2, 2) for _ in range(count))


class _Seeing(nn.Module):
    """A text decoder beside a vision tower, which comes first and is as deep; and heads that predict further tokens."""

    def __init__(self, text_layers: int = 3) -> None:
        super().__init__()
        text = SimpleNamespace(num_hidden_layers=3)
        self.config = SimpleNamespace(model_type="seeing", get_text_config=lambda: text)
        self.visual = nn.Module()
        self.visual.layers = _layers(3)
        self.language_model = nn.Module()
        self.language_model.extra = _layers(2)
        self.language_model.embed_tokens = nn.Embedding(5, 2)
        self.language_model.layers = _layers(text_layers)
        self.mtp = _layers(3)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens


def test_decoder_layers_hang_beside_the_embedding() -> None:
    model = _Seeing()
    name, found = decoder_layers(model, "here")
    assert name == "language_model.layers" and found is model.language_model.layers


def test_without_one_there_the_first_of_the_right_length_is_taken() -> None:
    assert decoder_layers(_Seeing(text_layers=4), "here")[0] == "visual.layers"


def test_without_any_the_family_is_refused() -> None:
    model = _Seeing(text_layers=4)
    model.visual.layers, model.mtp = _layers(4), _layers(1)
    with pytest.raises(CheckpointError, match="here: family 'seeing' cannot be compressed: no list of decoder layers"):
        decoder_layers(model, "here")


@pytest.mark.parametrize("tied", [True, False])
def test_the_holder_of_a_tied_head_is_the_embedding(tied: bool) -> None:
    found = architecture(LLAMA | {"tie_word_embeddings": tied}, "here")
    assert found.embedding == "model.embed_tokens.weight" and found.vocabulary == 60
    assert found.holder("lm_head.weight").name == (found.embedding if tied else "lm_head.weight")
    assert found.holder("model.norm.weight").name == "model.norm.weight"
    assert found.num_layers == 3 and found.layers_prefix == "model.layers"


@pytest.mark.parametrize("error", [AttributeError("no such tree"), NotImplementedError("made for another")], ids=repr)
def test_a_class_that_does_not_find_its_embedding_is_refused(error: Exception) -> None:
    class Lost(_Seeing):
        def get_input_embeddings(self) -> nn.Module:
            raise error

    with pytest.raises(CheckpointError, match=f"family 'seeing' cannot be compressed: Lost .* embedding: {error}"):
        decoder_layers(Lost(), "here")
