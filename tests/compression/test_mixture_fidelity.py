"""What is left of a trained mixture of experts: its task, and its distributions."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.weights import ArtifactWeights
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.compression.job import compress, prepare
from meswitch_cli.compression.settings import CompressionSettings
from meswitch_cli.model.build import build_model
from meswitch_cli.model.weights import CheckpointWeights
from zoo.tiny_tokenizer import tiny_tokenizer

VOCABULARY, LENGTH, BATCH = 48, 16, 16
#: The base counts on by one, its fine-tune by five.
BASE_STEP, EXPERT_STEP = 1, 5
#: The most of the base's KL that may be left, and the least of the fine-tune's right answers.
MOST_KL, LEAST_RIGHT = 0.05, 0.98


def _counting(step: int, generator: torch.Generator) -> Tensor:
    """Sequences `[batch, length]` that go on by `step`, round the vocabulary."""
    start = torch.randint(VOCABULARY, (BATCH, 1), generator=generator)
    return (start + step * torch.arange(LENGTH)) % VOCABULARY


def _train(model: Any, step: int, updates: int, rate: float) -> None:
    generator = torch.Generator().manual_seed(step)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(updates):
        ids = _counting(step, generator)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def _predictions(model: Any) -> tuple[Tensor, float]:
    """Log-probabilities of the next token on held-out sequences of the fine-tune's task, and the share that is right.

    The first tokens tell nothing of the task.
    """
    ids = _counting(EXPERT_STEP, torch.Generator().manual_seed(99))
    logits = model(input_ids=ids, use_cache=False).logits[:, 2:-1].float()
    return torch.log_softmax(logits, -1), float((logits.argmax(-1) == ids[:, 3:]).float().mean())


def test_a_trained_mixture_keeps_its_task(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mixtral", hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, vocab_size=VOCABULARY, pad_token_id=0,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _train(base, BASE_STEP, 120, 3e-3)
    expert = copy.deepcopy(base)
    _train(expert, EXPERT_STEP, 120, 1e-3)
    for name, model in (("base", base), ("expert", expert)):
        model.eval().save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    settings = CompressionSettings.with_defaults(salient=4)
    compress(prepare(str(tmp_path / "base"), str(tmp_path / "expert"), tmp_path / "a", settings, None))
    weights = ArtifactWeights(Artifact.open(tmp_path / "a"), CheckpointWeights(Checkpoint.open(str(tmp_path / "base"))))
    expected, right = _predictions(expert)
    found, kept = _predictions(build_model(weights, torch.device("cpu"), torch.float32))
    before, unable = _predictions(base)
    kl, base_kl = (float((expected.exp() * (expected - item)).sum(-1).mean()) for item in (found, before))
    assert right > 0.9 and unable < 0.2 and base_kl > 1
    assert kept >= LEAST_RIGHT * right and kl < MOST_KL * base_kl, (right, kept, kl, base_kl)
