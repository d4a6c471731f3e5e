"""Artifacts in vLLM's own API server: `vllm serve --enable-lora --lora-modules`, its processes and all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.family import Family, Kind, compress_experts, requests, tokenizer_of
from engine.vllm.conftest import NEEDS_VLLM
from engine.vllm.plain_server import PlainServer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from meswitch_cli.engine.contract import BASE, GenerationRequest, Sampling

pytestmark = NEEDS_VLLM

LORA_RANK = 4


@pytest.fixture(scope="session")
def served(family: Family) -> Family:
    """The experts that have no tokens of their own."""
    return part(family, {name: family.artifacts[name] for name in ("alpha", "beta")}, {})


@pytest.fixture(scope="session")
def lora(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of PEFT's format for some projections, large enough to change the tokens."""
    folder = tmp_path_factory.mktemp("lora")
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for name, weight in family.references[BASE].state_dict().items():
        if name.endswith(("q_proj.weight", "down_proj.weight")):
            out_features, in_features = weight.shape
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(LORA_RANK, in_features, generator=generator) / 5
            tensors[f"{stem}.lora_B.weight"] = torch.randn(out_features, LORA_RANK, generator=generator) / 5
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        f'{{"peft_type": "LORA", "r": {LORA_RANK}, "lora_alpha": {2 * LORA_RANK}, "bias": "none", '
        '"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}'
    )
    return folder


def part(family: Family, adapters: dict[str, Path], models: dict[str, Any]) -> Family:
    """A family of other adapters, with the plain models that there are, and further ones."""
    made = replace(family, artifacts=adapters)
    made.__dict__["references"] = family.references | models
    return made


def with_lora(family: Family, lora: Path) -> Any:
    """Plain transformers' model of the base with the adapter merged into it, with factor 2."""
    model = AutoModelForCausalLM.from_pretrained(family.base, dtype=torch.float32).eval()
    tensors = load_file(lora / "adapter_model.safetensors")
    for name in {name.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight") for name in tensors}:
        weight = model.get_parameter(name.removeprefix("base_model.model.") + ".weight")
        weight.data += 2 * tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
    return model


@pytest.fixture(scope="module")
def server(served: Family, lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PlainServer]:
    options = ("--max-loras", "2", "--max-lora-rank", "8", "--enable-prefix-caching")
    with PlainServer(served.base, served.artifacts | {"lora": lora}, tmp_path_factory.mktemp("plain"), *options) as it:
        yield it


def test_mixed_traffic_equals_plain_models(server: PlainServer, served: Family, lora: Path) -> None:
    """Base, two experts and a LoRA, over two slots, with a beginning that all share and the cache keeps."""
    own = part(served, served.artifacts | {"lora": lora}, {"lora": with_lora(served, lora)})
    batch = requests(own, 24, seed=1, prefix=64)
    assert len({own.greedy(replace(batch[0], expert=name)) for name in (BASE, "alpha", "beta", "lora")}) == 4
    server.check(own, batch)
    server.check(own, batch)
    names = {item["id"] for item in server.get("/v1/models").json()["data"]}
    assert names == {BASE, "alpha", "beta", "lora"}


def test_chats_go_by_the_experts_own_template(server: PlainServer, served: Family, tmp_path: Path) -> None:
    template = "{% for message in messages %}[{{ message.content }}]{% endfor %}"
    kinds = {"templated": Kind({"bits": 2}, 0, template)}
    own = compress_experts(served.base, tmp_path, torch.float32, experts=kinds).artifacts["templated"]
    loaded = server.post("/v1/load_lora_adapter", {"lora_name": "templated", "lora_path": str(own)})
    assert loaded.status_code == 200, loaded.text
    told = {}
    for name in ("beta", "templated"):
        messages = [{"role": "user", "content": "abc"}]
        body = {"model": name, "messages": messages, "max_tokens": 1, "return_token_ids": True}
        response = server.post("/v1/chat/completions", body)
        assert response.status_code == 200, response.text
        told[name] = response.json()["prompt_token_ids"]
    assert told["templated"] != told["beta"]
    assert told["templated"] == tokenizer_of(served.base)("[abc]", add_special_tokens=False)["input_ids"]
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "templated"}).status_code == 200


def test_what_cannot_be_served_is_refused_when_it_is_loaded(
    server: PlainServer, family: Family, served: Family, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(served.artifacts["alpha"], damaged)
    shard = next(damaged.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    foreign = tmp_path / "foreign"
    shutil.copytree(served.artifacts["alpha"], foreign)
    manifest = foreign / "meswitch.json"
    fingerprint = json.loads(manifest.read_text())["base"]["fingerprint"]
    manifest.write_text(manifest.read_text().replace(fingerprint, fingerprint[:-4] + "0000"))
    for path, problem in (
        (family.artifacts["gamma"], "has 3 tokens of its own"),
        (damaged, "SHA-256"),
        (foreign, "wrong base"),
        (tmp_path / "absent", "No adapter found"),
    ):
        response = server.post("/v1/load_lora_adapter", {"lora_name": "refused", "lora_path": str(path)})
        assert response.status_code >= 400 and problem in response.text, response.text
    request = GenerationRequest("after", "alpha", (5, 6, 7), Sampling(temperature=0, max_tokens=4, ignore_eos=True))
    server.check(served, [request])


def test_an_artifact_that_changed_under_its_name_is_refused(
    server: PlainServer, served: Family, tmp_path: Path
) -> None:
    """What was cached of the first must not be taken for the second's."""
    path = tmp_path / "changing"
    shutil.copytree(served.artifacts["alpha"], path)
    load = {"lora_name": "changing", "lora_path": str(path)}
    assert server.post("/v1/load_lora_adapter", load).status_code == 200
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "changing"}).status_code == 200
    shutil.rmtree(path)
    shutil.copytree(served.artifacts["beta"], path)
    evict = [{"lora_name": f"evict-{i}", "lora_path": str(served.artifacts["alpha"])} for i in range(2)]
    assert all(server.post("/v1/load_lora_adapter", item).status_code == 200 for item in evict)
    response = server.post("/v1/load_lora_adapter", load)
    assert response.status_code >= 400 and "has changed since it was taken in" in response.text, response.text


def test_an_artifact_that_is_damaged_while_it_is_served_fails_its_requests_alone(
    server: PlainServer, served: Family, tmp_path: Path
) -> None:
    """It has lost its slot to others, and would be read again."""
    path = tmp_path / "fragile"
    shutil.copytree(served.artifacts["alpha"], path)
    assert server.post("/v1/load_lora_adapter", {"lora_name": "fragile", "lora_path": str(path)}).status_code == 200
    body = {"model": "fragile", "prompt": [5, 6, 7], "max_tokens": 2}
    assert server.post("/v1/completions", body).status_code == 200
    shard = next(path.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    greedy = Sampling(temperature=0, max_tokens=4, ignore_eos=True)
    others = [GenerationRequest(name, name, (5, 6, 7), greedy) for name in ("alpha", "beta")]
    server.check(served, others)
    response = server.post("/v1/completions", body)
    assert response.status_code == 400 and "'fragile'" in response.text and "have changed" in response.text
    server.check(served, others)
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "fragile"}).status_code == 200


def test_an_experts_own_ends_of_text_end_its_texts() -> None:
    from vllm import SamplingParams

    from meswitch_cli.engine.vllm.plain import add_ends

    params = SamplingParams(stop_token_ids=[9])
    params.update_from_generation_config({}, 1)
    add_ends(params, {1, 7})
    assert params.stop_token_ids == [7, 9] and params.all_stop_token_ids == {1, 7, 9}
    heedless = SamplingParams(ignore_eos=True)
    heedless.update_from_generation_config({}, 1)
    add_ends(heedless, {7})
    assert not heedless.stop_token_ids and heedless.all_stop_token_ids == {1}


def test_log_probabilities_of_prompts_beside_experts(server: PlainServer, served: Family) -> None:
    """vLLM asks for logits of other rows than those that predict."""
    for name in (BASE, "alpha"):
        tokens = [5, 80, 7, 11, 40]
        body = {"model": name, "prompt": tokens, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        response = server.post("/v1/completions", body)
        assert response.status_code == 200, response.text
        told = [next(iter(item.values()))["logprob"] for item in response.json()["choices"][0]["prompt_logprobs"][1:]]
        with torch.inference_mode():
            logits = served.references[name](torch.tensor([tokens])).logits[0].log_softmax(-1)
        wanted = [float(logits[place, token]) for place, token in enumerate(tokens[1:])]
        assert told == pytest.approx(wanted, abs=1e-4)
