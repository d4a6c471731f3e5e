"""SmolLM2-135M and trained experts of it, of every kind, in one `vllm serve`; where `python tests zoo` built them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.family import coded_model, greedy_tokens, merged_model, tokenizer_of
from engine.vllm.conftest import NEEDS_VLLM
from engine.vllm.plain_server import PlainServer
from transformers import AutoModelForCausalLM

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.restore import restore
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.compression.job import compress, prepare
from meswitch_cli.compression.settings import CompressionSettings
from meswitch_cli.engine.contract import BASE, GenerationRequest, Sampling
from zoo.finetunes import KINDS
from zoo.group import checkpoint_file, group_at
from zoo.item import read_items
from zoo.lora import save_adapter

#: Who is compressed how: three strong fine-tunes, a sparse one, a merged LoRA, one saved in fp32, and a LoRA.
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "code": {"bits": 0.25},
    "maths": {"bits": 1},
    "logic": {"bits": 2},
    "reinforced": {"exact": True},
    "lora16": {"bits": 1},
    "fp32": {"bits": 0.25},
    "adapter": {},
}
SKILLS = ("maths", "code", "logic")
#: Whose skill is not the one of its name.
SKILL_OF = {"reinforced": "code", "lora16": "code", "fp32": "code", "adapter": "code", "lora": "code"}
TOKENS = 16
SLOTS = 3

STRONG, OTHERS = group_at("strong"), group_at("kinds")
FOLDERS = {name: (STRONG if name in SKILLS else OTHERS).folder / "experts" / name for name in SETTINGS}
LORA = checkpoint_file(KINDS["lora16"])
MISSING = [str(path) for name, path in FOLDERS.items() if name != "adapter" and not path.exists()]
MISSING += [] if LORA.exists() else [str(LORA)]

pytestmark = [
    NEEDS_VLLM,
    pytest.mark.skipif(bool(MISSING), reason=f"not built by `python tests zoo build`: {', '.join(MISSING)}"),
]


@dataclass(frozen=True)
class Experts:
    """What is served, and the greedy tokens that plain transformers gives each request."""

    adapters: Mapping[str, Path]
    wanted: Sequence[tuple[GenerationRequest, tuple[int, ...]]]


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Experts:
    """Compress everything, and ask one model after another: together they would take 5 GB."""
    folder = tmp_path_factory.mktemp("real")
    lora = save_adapter(LORA, STRONG.base, folder / "lora")
    adapters = {"lora": lora}
    for name, settings in SETTINGS.items():
        source, adapters[name] = lora if name == "adapter" else FOLDERS[name], folder / name
        chosen = CompressionSettings.with_defaults(**settings)
        compress(prepare(str(STRONG.base), str(source), adapters[name], chosen, None))
    wanted = []
    for name in (BASE, *adapters):
        model = _plain_model(name, adapters, folder / "restored")
        wanted += [(request, greedy_tokens(model, request)) for request in _requests(name)]
    return Experts(adapters, wanted)


def _plain_model(name: str, adapters: Mapping[str, Path], folder: Path) -> Any:
    """Transformers' model, fp32, of base + dequantised delta."""
    if name == BASE:
        return AutoModelForCausalLM.from_pretrained(STRONG.base, dtype=torch.float32).eval()
    if name == "lora":
        return merged_model(STRONG.base, adapters[name])
    if SETTINGS[name].get("exact"):
        return coded_model(STRONG.base, FOLDERS[name])
    restore(Artifact.open(adapters[name]), Checkpoint.open(str(STRONG.base)), folder, dtype=torch.float32)
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    finally:
        shutil.rmtree(folder)


def _requests(name: str) -> list[GenerationRequest]:
    """A question of each skill, in the chat template that all share."""
    tokenizer = tokenizer_of(STRONG.base)
    made = []
    for skill in SKILLS:
        question = read_items(STRONG.items_file(skill, "report"))[0]["prompt"]
        turns = [{"role": "user", "content": question}]
        tokens = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        sampling = Sampling(temperature=0, max_tokens=TOKENS, ignore_eos=True)
        made.append(GenerationRequest(f"{name}-{skill}", name, tuple(tokens), sampling))
    return made


@pytest.fixture(scope="module", params=["compiled", "pipeline", "with-lora"])
def served(
    request: pytest.FixtureRequest, experts: Experts, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[PlainServer, Experts]]:
    """All of them over fewer slots: compiled by Inductor, in one worker or two; and beside the LoRA as it was trained,
    where vLLM compiles nothing on a CPU."""
    folder = tmp_path_factory.mktemp("served")
    options = ["--max-loras", str(SLOTS), "--max-lora-rank", "16", "--enable-prefix-caching"]
    adapters = dict(experts.adapters)
    environment = {"VLLM_CACHE_ROOT": str(folder / "cache"), "VLLM_CPU_CI_ENV": "0"}
    if request.param != "with-lora":
        del adapters["lora"]
        options += ["--additional-config", '{"meswitch": {"loras": false}}']
    if request.param == "pipeline":
        options += ["--pipeline-parallel-size", "2"]
    wanted = [(asked, tokens) for asked, tokens in experts.wanted if asked.expert in (BASE, *adapters)]
    with PlainServer(STRONG.base, adapters, folder, *options, environment=environment) as server:
        yield server, Experts(adapters, wanted)


def test_every_expert_says_what_the_base_does_not(experts: Experts) -> None:
    """Otherwise the base's tokens would pass for an expert's."""
    of = {(request.expert, request.id.rpartition("-")[2]): tokens for request, tokens in experts.wanted}
    for name in experts.adapters:
        skill = SKILL_OF.get(name, name)
        assert of[name, skill] != of[BASE, skill], name


def test_greedy_tokens_equal_plain_models(served: tuple[PlainServer, Experts]) -> None:
    """Twice: the second time every prompt's beginning is cached."""
    server, experts = served
    compiled = "DYNAMO_TRACE_ONCE" in server.log.read_text(errors="replace")
    assert compiled == ("lora" not in experts.adapters)
    for _ in range(2):
        with ThreadPoolExecutor(len(experts.wanted)) as pool:
            told = list(pool.map(lambda item: server.complete(item[0]), experts.wanted))
        wrong = [request.id for (request, wanted), tokens in zip(experts.wanted, told, strict=True) if tokens != wanted]
        assert not wrong, wrong
    hits = [
        float(line.rpartition(" ")[2])
        for line in server.get("/metrics").text.splitlines()
        if line.startswith("vllm:prefix_cache_hits_total")
    ]
    assert sum(hits) > 0
