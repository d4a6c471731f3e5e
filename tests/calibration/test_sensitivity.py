"""Sensitivities beside what they stand for: the divergence that small random errors of the weights make."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from meswitch_cli.calibration.sensitivity import Sensitivities, drawn_windows, stream_sensitivities
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.delta.statistics import EmbeddingSensitivity, LinearSensitivity
from meswitch_cli.errors import CalibrationError
from meswitch_cli.model.weights import CheckpointWeights
from zoo.tiny import make_pair

SIZE, DRAWN = 2e-3, 12


def _weights(folder: Path, family: str, **config: Any) -> CheckpointWeights:
    _, expert = make_pair(folder, family, dtype=torch.float32, **config)
    return CheckpointWeights(Checkpoint.open(str(expert)))


def _windows(seed: int = 0, count: int = 8) -> torch.Tensor:
    return torch.randint(268, (count, 16), generator=torch.Generator().manual_seed(seed))


def _all(weights: CheckpointWeights, **options: Any) -> Sensitivities:
    found: Sensitivities = {}
    order = []
    for index, part in stream_sensitivities(weights, _windows(), **options):
        order.append(index)
        found |= part
    assert order == [1, 0, 2]
    return found


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("gemma2", {"final_logit_softcapping": 5.0}),
        ("phi3", {}),
    ],
)
def test_expected_divergence_is_that_of_small_errors(tmp_path: Path, family: str, config: dict[str, Any]) -> None:
    weights = _weights(tmp_path, family, **config)
    found = _all(weights)
    model: Any = AutoModelForCausalLM.from_pretrained(weights.checkpoint.source.path, dtype=torch.float32).eval()
    generator, ids = torch.Generator().manual_seed(5), _windows()
    with torch.no_grad():
        reference = torch.log_softmax(model(ids, use_cache=False).logits.double(), -1)
        for name, parameter in model.named_parameters():
            if name not in found:
                continue
            own = found[name]
            if isinstance(own, EmbeddingSensitivity) and config.get("tie_word_embeddings", "gemma" in family):
                head = found["lm_head.weight"]
                assert isinstance(head, LinearSensitivity)
                own = EmbeddingSensitivity(own.ids, own.gradients, own.rows, head)
            kept, size = parameter.clone(), SIZE * float(parameter.square().mean().sqrt())
            expected = float(own.of_rows(slice(0, len(kept))).sum()) * size**2
            real = 0.0
            for _ in range(DRAWN):
                parameter.copy_(kept + size * torch.randn(kept.shape, generator=generator))
                other = torch.log_softmax(model(ids, use_cache=False).logits.double(), -1)
                real += float((reference.exp() * (reference - other)).sum(-1).mean()) / DRAWN
            parameter.copy_(kept)
            assert expected == pytest.approx(real, rel=0.5), name


def test_every_linear_has_its_rows(tmp_path: Path) -> None:
    weights = _weights(tmp_path, "llama")
    found = _all(weights)
    wanted = {name: item.shape for name, item in weights.architecture.parameters.items() if item.kind != "dense"}
    assert {name: tuple(own.of_rows(slice(0, 1 << 20)).shape) for name, own in found.items()} == wanted
    assert all(len(own.row_weights()) == wanted[name][0] for name, own in found.items())


def test_a_seed_gives_the_same_numbers(tmp_path: Path) -> None:
    weights = _weights(tmp_path, "llama")
    first, again, other = (_all(weights, seed=seed) for seed in (0, 0, 1))
    name = "model.layers.0.mlp.up_proj.weight"
    rows = slice(0, 8)
    assert torch.equal(first[name].of_rows(rows), again[name].of_rows(rows))
    assert not torch.equal(first[name].of_rows(rows), other[name].of_rows(rows))


def test_linears_that_no_token_reaches_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = _weights(tmp_path, "llama")
    layers = type(AutoModelForCausalLM.from_pretrained(weights.checkpoint.source.path).model.layers[0].mlp)
    monkeypatch.setattr(layers, "forward", lambda self, x: self.down_proj(self.up_proj(x)))
    found = _all(weights)
    assert "model.layers.0.mlp.up_proj.weight" in found
    assert "model.layers.0.mlp.gate_proj.weight" not in found


def test_drawn_tokens_follow_the_predictions(tmp_path: Path) -> None:
    weights = _weights(tmp_path, "llama")
    options = {"device": "cpu", "dtype": torch.float32}
    random = _windows(count=64)
    drawn, again, other = (drawn_windows(weights, random, seed=seed, **options) for seed in (0, 0, 1))
    assert torch.equal(drawn, again)
    assert not torch.equal(drawn, other)
    assert torch.equal(drawn[:, 0], random[:, 0])
    model: Any = AutoModelForCausalLM.from_pretrained(weights.checkpoint.source.path, dtype=torch.float32).eval()

    def likelihood(ids: torch.Tensor) -> float:
        with torch.no_grad():
            said = torch.log_softmax(model(ids, use_cache=False).logits[:, :-1], -1)
        return float(said.gather(-1, ids[:, 1:, None]).mean())

    assert likelihood(drawn) > likelihood(random) + 0.05


def test_a_family_whose_layers_do_not_run_alone_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = _weights(tmp_path, "llama")
    layers = type(AutoModelForCausalLM.from_pretrained(weights.checkpoint.source.path).model.layers[0])

    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise RuntimeError("needs its neighbour")

    monkeypatch.setattr(layers, "forward", refuse)
    with pytest.raises(CalibrationError, match=r"llama.*needs its neighbour; give --bits"):
        list(stream_sensitivities(weights, _windows()))
