"""A tiny base with three compressed experts, and the plain models that say what each must generate."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.restore import restore
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.compression.job import compress, prepare
from meswitch_cli.compression.settings import CompressionSettings
from meswitch_cli.delta.quantize import dequantize, quantize
from meswitch_cli.engine import Completion
from meswitch_cli.engine.contract import BASE, GenerationRequest, Sampling
from zoo.adapter import merged_weights
from zoo.tiny import make_pair
from zoo.tiny_tokenizer import tiny_tokenizer

#: Norm of each expert's delta over its weight's; large enough to change the tokens.
RELATIVE_DELTA = 0.2
ADDED_ROWS = 3


@dataclass(frozen=True)
class Kind:
    """What an expert is like: how it is compressed, the tokens that it adds, its own chat template if it has one."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    added_rows: int = 0
    chat_template: str | None = None


#: Other widths, channels and ranks, one without a low-rank part; one with tokens and a template of its own.
EXPERTS: Mapping[str, Kind] = {
    "alpha": Kind({"bits": 2, "salient": 4}),
    "beta": Kind({"bits": 4, "salient": 0, "group_size": 32, "rank": 5, "embedding_rank": 6}),
    "gamma": Kind(
        {"bits": 1, "salient": 8, "rank": 12},
        ADDED_ROWS,
        "{% for message in messages %}<{{ message.content }}>{% endfor %}",
    ),
}


class OneSeed(random.Random):
    """What an engine draws seeds from: each request without one of its own gets the same, so that its tokens depend on
    nothing but itself."""

    def getrandbits(self, k: int) -> int:
        return 1


@dataclass(frozen=True)
class Family:
    """A base folder, and artifacts by expert, all of one dtype."""

    base: Path
    artifacts: dict[str, Path]
    dtype: torch.dtype

    @cached_property
    def references(self) -> dict[str, Any]:
        """Plain transformers models of the base, and of base + dequantised delta."""
        found = {BASE: _load(self.base, self.dtype)}
        for name, path in self.artifacts.items():
            plain = path.with_name(f"{name}-{self.dtype}")
            restore(Artifact.open(path), Checkpoint.open(str(self.base)), plain, dtype=self.dtype)
            found[name] = _load(plain, self.dtype)
        return found

    def greedy(self, request: GenerationRequest) -> tuple[int, ...]:
        """As `greedy_tokens` of the request's expert."""
        return greedy_tokens(self.references[request.expert], request)


def greedy_tokens(model: Any, request: GenerationRequest) -> tuple[int, ...]:
    """What plain transformers generates, end tokens not heeded."""
    prompt = torch.tensor([request.prompt_tokens])
    with torch.inference_mode():
        out = model.generate(
            prompt, max_new_tokens=request.sampling.max_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return tuple(out[0, prompt.shape[1] :].tolist())


def mean_hidden_state(model: Any, prompt: Sequence[int], layer: int) -> torch.Tensor:
    """`[hidden]`: what comes out of a decoder layer of plain transformers (1 is the first), over a prompt's tokens."""
    states: list[torch.Tensor] = []
    hook = model.model.layers[layer - 1].register_forward_hook(
        lambda module, inputs, output: states.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.inference_mode():
        model(torch.tensor([list(prompt)]))
    hook.remove()
    return states[0].flatten(0, -2).mean(0)


def check_near_ties(
    exact: Family, own: Family, batch: Sequence[GenerationRequest], completions: Sequence[Completion]
) -> None:
    """Every chosen token is the best there is by `exact`'s weights, or as near to it as the rounding of a plain model,
    `own`'s, is wide: in the logits before it, given what the engine itself has generated so far."""
    chosen, best = 0, 0
    for request, completion in zip(batch, completions, strict=True):
        assert completion.error is None and len(completion.tokens) == request.sampling.max_tokens
        tokens = torch.tensor([[*request.prompt_tokens, *completion.tokens]])
        with torch.inference_mode():
            truth, rounded = (
                side.references[request.expert](tokens).logits[0, len(request.prompt_tokens) - 1 : -1].float()
                for side in (exact, own)
            )
        behind = truth.amax(-1) - truth.gather(-1, torch.tensor(completion.tokens)[:, None])[:, 0]
        rounding = (rounded - truth).abs().amax(-1)
        assert (behind <= 3 * rounding).all(), (request, behind / rounding)
        chosen += len(behind)
        best += int((behind == 0).sum())
    assert best > 0.9 * chosen


def make_family(
    folder: Path,
    family: str = "llama",
    *,
    dtype: torch.dtype = torch.float32,
    experts: Mapping[str, Kind] = EXPERTS,
    untie: Sequence[str] = (),
    **config: Any,
) -> Family:
    """Compress random experts of a random base. Those in `untie` have a head of their own although the base ties it."""
    base, _ = make_pair(folder / "origin", family, dtype=dtype, **config)
    return compress_experts(base, folder, dtype, experts=experts, untie=untie)


def compress_experts(
    base: Path,
    folder: Path,
    dtype: torch.dtype,
    *,
    experts: Mapping[str, Kind] = EXPERTS,
    untie: Sequence[str] = (),
    gain_shift: float = 0.0,
) -> Family:
    """Make and compress the experts of a base; `gain_shift` is added to their norms' weights."""
    artifacts = {}
    for index, (name, kind) in enumerate(experts.items()):
        expert = _make_expert(base, folder / f"{name}-full", index, kind, name in untie, gain_shift)
        settings = {"samples": 4, "sequence_length": 32} | dict(kind.settings)
        if "bits" in settings:
            settings.setdefault("embedding_bits", int(max(1, settings["bits"])))
        artifacts[name] = folder / name
        compress(prepare(str(base), str(expert), artifacts[name], CompressionSettings(**settings), None))
    return Family(base, artifacts, dtype)


def _load(folder: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def _make_expert(base: Path, folder: Path, seed: int, kind: Kind, untie: bool, gain_shift: float) -> Path:
    added_rows = kind.added_rows
    model = AutoModelForCausalLM.from_pretrained(base)
    generator = torch.Generator().manual_seed(1000 + seed)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data += gain_shift
        noise = torch.randn(parameter.shape, generator=generator)
        scale = RELATIVE_DELTA * parameter.data.float().norm() / noise.norm()
        parameter.data += (scale * noise).to(parameter.dtype)
    if added_rows:
        rows = model.config.vocab_size
        model.resize_token_embeddings(rows + added_rows, mean_resizing=False)
        for weight in {
            id(w): w for w in (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
        }.values():
            weight.data[rows:] = weight.data[:rows].std() * torch.randn(
                added_rows, weight.shape[1], generator=generator
            )
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer(added_tokens=added_rows)
    if kind.chat_template:
        tokenizer.chat_template = kind.chat_template
    tokenizer.save_pretrained(folder)
    if untie:
        _untie(folder, generator)
    return folder


def _untie(folder: Path, generator: torch.Generator) -> None:
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding + 0.1 * embedding.std() * torch.randn(embedding.shape, generator=generator)
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))


def requests(
    family: Family, count: int, *, seed: int = 0, longest: int = 40, max_tokens: int = 12, prefix: int = 0
) -> list[GenerationRequest]:
    """Greedy requests over base and experts in random order; the first `prefix` tokens of all prompts are equal."""
    rng = random.Random(seed)
    names = [BASE, *family.artifacts]
    shared = tuple(rng.randrange(3, 250) for _ in range(prefix))
    made = []
    for index in range(count):
        name = names[index % len(names)]
        own = [rng.randrange(3, 250) for _ in range(rng.randint(1, longest))]
        if name == "gamma":
            own[0] = family.references[name].config.vocab_size - 1  # a token that the base has not
        sampling = Sampling(temperature=0, max_tokens=rng.randint(1, max_tokens), ignore_eos=True)
        made.append(GenerationRequest(f"request-{index}", name, (*shared, *own), sampling))
    rng.shuffle(made)
    return made


def copy_artifact(artifact: Path, to: Path) -> Path:
    shutil.copytree(artifact, to)
    return to


def tokenizer_of(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def merged_model(base: Path, adapter: Path) -> Any:
    """The base with an adapter merged into it, fp32."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, value in merged_weights(base, adapter).items():
            parameters[name].copy_(value)
    return model.eval()


def coded_model(base: Path, expert: Path, **settings: Any) -> Any:
    """The expert with the codes of a slot, fp32: what is stored bit for bit is coded when it is loaded."""
    plain, model = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (base, expert))
    of_base = dict(plain.named_parameters())
    code = CompressionSettings.with_defaults(exact=True, **settings).by_kind()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() == 2:
                kind = "embedding" if "embed" in name else "head" if "lm_head" in name else "linear"
                found = quantize(of_base[name].detach(), value.detach(), code[kind])
                assert found is not None
                value.copy_(of_base[name] + dequantize(found[0]))
    return model.eval()
