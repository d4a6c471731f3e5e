"""What compression leaves of a trained mixture of experts: writes docs/results/mixture.md.

    python tests bench mixture

A small Qwen3-MoE is trained until it knows its task, and fine-tuned on another. A minute or two of one core for each.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.machine import describe
from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.weights import ArtifactWeights
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.compression.job import compress, prepare
from meswitch_cli.compression.settings import CompressionSettings
from meswitch_cli.model.build import build_model
from meswitch_cli.model.weights import CheckpointWeights
from zoo.tiny_tokenizer import tiny_tokenizer

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "mixture.md"
VOCABULARY, LENGTH, BATCH, HELD_OUT = 60, 24, 32, 512
UPDATES = {"base": 400, "fine-tune": 300}
RATES = {"base": 3e-3, "fine-tune": 5e-4}
#: The first tokens, by which a sequence's two steps can be known.
TOLD = 4
BITS = (0.25, 1, 2)
CPU = torch.device("cpu")


def sequences(count: int, alternating: bool, generator: torch.Generator) -> Tensor:
    """Token ids `[count, length]` that go on by a step of 1 to 4, round the vocabulary; or by two steps in turn."""
    start, first, second = (
        torch.randint(low, high, (count, 1), generator=generator) for low, high in ((0, VOCABULARY), (1, 5), (1, 5))
    )
    places = torch.arange(LENGTH)
    if not alternating:
        second = first
    return (start + first * ((places + 1) // 2) + second * (places // 2)) % VOCABULARY


def train(model: Any, name: str) -> None:
    generator = torch.Generator().manual_seed(len(name))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATES[name])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATES[name], UPDATES[name], pct_start=0.1)
    for _ in range(UPDATES[name]):
        ids = sequences(BATCH, name == "fine-tune", generator)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


class Seen(NamedTuple):
    """On held-out sequences of the fine-tune's task: log-probabilities, the share of right tokens, and for each layer
    the experts of every token, sorted."""

    logprobs: Tensor
    right: float
    routes: Tensor


@torch.no_grad()
def look(model: Any) -> Seen:
    ids = sequences(HELD_OUT, True, torch.Generator().manual_seed(99))
    routes: list[Tensor] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _module, _inputs, output: routes.append(output[2].sort(-1).values))
        for layer in model.model.layers
    ]
    logits = model(input_ids=ids, use_cache=False).logits[:, TOLD:-1].float()
    for hook in hooks:
        hook.remove()
    right = float((logits.argmax(-1) == ids[:, TOLD + 1 :]).float().mean())
    return Seen(torch.log_softmax(logits, -1), right, torch.stack(routes))


def row(label: str, found: Seen, expected: Seen, base_kl: float, size: str) -> str:
    kl = _kl(found, expected)
    same = float((found.logprobs.argmax(-1) == expected.logprobs.argmax(-1)).float().mean())
    routes = float((found.routes == expected.routes).all(-1).float().mean())
    return f"| {label} | {size} | {kl:.2g} | {kl / base_kl:.3%} | {same:.2%} | {found.right:.2%} | {routes:.1%} |"


def _kl(found: Seen, expected: Seen) -> float:
    return float((expected.logprobs.exp() * (expected.logprobs - found.logprobs)).sum(-1).mean())


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3_moe", hidden_size=128, moe_intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, head_dim=32,
        num_key_value_heads=2, num_experts=8, num_experts_per_tok=2, vocab_size=VOCABULARY, pad_token_id=0,
        eos_token_id=1, bos_token_id=2, norm_topk_prob=True,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    train(base, "base")
    expert = copy.deepcopy(base)
    train(expert, "fine-tune")
    expected, before = look(expert.eval()), look(base.eval())
    base_kl = _kl(before, expected)
    rows = [row("base", before, expected, base_kl, "0")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for label, model in (("base", base), ("expert", expert)):
            model.save_pretrained(folder / label)
            tiny_tokenizer().save_pretrained(folder / label)
        opened = CheckpointWeights(Checkpoint.open(str(folder / "base")))
        for bits in BITS:
            out = folder / f"{bits}"
            settings = CompressionSettings.with_defaults(bits=bits)
            compress(prepare(str(folder / "base"), str(folder / "expert"), out, settings, None), keep_weak=True)
            artifact = Artifact.open(out)
            found = look(build_model(ArtifactWeights(artifact, opened), CPU, torch.float32))
            rows.append(
                row(f"`--bits {bits}`", found, expected, base_kl, f"{artifact.manifest.nbytes / opened.nbytes:.1%}")
            )
            print(rows[-1], flush=True)
    rows.append(row("the fine-tune itself", expected, expected, base_kl, "100%"))
    RESULTS.write_text(
        "# A trained mixture of experts\n\n"
        "A Qwen3-MoE of 3 layers, 8 experts of which a token gets 2, trained from scratch: its task is to go on with a "
        "sequence by one step, its fine-tune's by two steps in turn. Every weight was trained, routers too, which are "
        "kept whole. Held out: "
        f"{HELD_OUT} sequences of the fine-tune's task, tokens after the first {TOLD}. Routes are the pairs of token "
        "and layer whose experts are all the fine-tune's. Compressed with the defaults. The model is small, so that "
        "what is stored in 16 bit weighs much: sizes are of the fine-tune in fp32.\n\n"
        f"`python tests bench mixture`, {describe()}.\n\n"
        "| | size | KL | of the base's | same token | right | same routes |\n|---|---|---|---|---|---|---|\n"
        + "\n".join(rows)
        + "\n\nThat served tokens are those of such models is a test of its own (`tests/engine/test_truth.py`, "
        "Mixtral, Qwen3-MoE and OLMoE).\n"
    )


if __name__ == "__main__":
    main()
