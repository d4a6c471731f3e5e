"""Which families pass the proof at start, in batches or one request at a time, and which are refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from command_line import fails, in_process
from engine.proving import (
    BLOOM,
    ELECTRA,
    GPT_NEO,
    LARGE,
    MOE,
    ONE_BY_ONE,
    OPT,
    SIZES,
    UNGROUPED,
    check,
    config_of,
    save,
    why,
)

from meswitch_cli.engine import (
    EngineSettings,
    TransformersEngine,
    attention,
    generate,
    proof,
    transformers_engine,
)
from meswitch_cli.engine.contract import BASE, EngineError, GenerationRequest, Sampling
from meswitch_cli.engine.proof import prove
from meswitch_cli.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("nothing_proven_before")


@pytest.mark.parametrize(
    "config",
    [
        LARGE,
        config_of("llama", num_key_value_heads=1, tie_word_embeddings=True),
        config_of("gemma2", head_dim=32, num_hidden_layers=4),
        config_of("mistral", sliding_window=4096),
        config_of("phi", partial_rotary_factor=0.5),
        config_of("stablelm"),
        config_of("nemotron"),
        config_of("qwen3_moe", **MOE),
        config_of("glm4_moe", n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16),
        {"model_type": "opt", **OPT},
        {"model_type": "biogpt", **UNGROUPED},
    ],
    ids=lambda config: config["model_type"],
)
def test_families_that_are_served(config: dict[str, Any]) -> None:
    check(config)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "bloom", **BLOOM}, "does not serve bloom: logits of .* differ by .* from plain transformers'"),
        ({"model_type": "gpt_neo", **GPT_NEO}, "does not serve gpt_neo: its attention is of its own kind"),
        ({"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2}, "mamba"),
        (
            config_of("opt", ffn_dim=96, word_embed_proj_dim=64),
            r"does not serve opt: its OPTAttention computes in a way that the engine was not made for \(RuntimeError",
        ),
        (config_of("gpt_oss", num_local_experts=4, head_dim=16), "keeps model.layers.0.*experts.* in a GptOssExperts"),
        ({"model_type": "jetmoe", **UNGROUPED}, "keeps model.layers.0.mlp.* in a JetMoe"),
        ({"model_type": "bert-generation", **UNGROUPED}, "keeps lm_head.bias in a BertGenerationOnlyLMHead"),
    ],
    ids=[
        "bloom",
        "gpt_neo",
        "mamba",
        "opt-whose-config-names-key-heads",
        "biases-of-experts",
        "jetmoe",
        "head-that-is-no-linear",
    ],
)
def test_families_that_are_refused(config: dict[str, Any], reason: str) -> None:
    with pytest.raises((EngineError, CheckpointError), match=f"^base: .*{reason}") as caught:
        check(config)
    assert "\n" not in str(caught.value)


def test_mixtures_are_for_a_cpu() -> None:
    """No card is needed to be refused one."""
    with pytest.raises(
        EngineError, match=r"^base: .* qwen3_moe: it is a mixture of experts, which is served in batches on a CPU only"
    ):
        prove(config_of("qwen3_moe", **MOE), "base", torch.device("cuda"), torch.float32)


def test_what_is_not_served_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: Any) -> None:
        raise AssertionError("the base is loaded")

    for way in ("load_base", "load_plain_base"):
        monkeypatch.setattr(transformers_engine, way, load)
    base = save(tmp_path / "base", "electra", **ELECTRA)
    engine = TransformersEngine(EngineSettings(base=str(base)))
    refused = "does not serve electra: its ElectraGeneratorPredictions .*; nor one request at a time: logits of"
    with pytest.raises(EngineError, match=refused):
        engine.start()


@pytest.mark.parametrize("kind", ONE_BY_ONE)
def test_families_that_are_served_one_request_at_a_time(kind: str) -> None:
    """Among them linears whose weights are read by others (Mamba), stacks of matrices (gpt-oss), convolutions."""
    reason = why(ONE_BY_ONE[kind])
    assert reason is not None
    with pytest.raises(EngineError, match=re.escape(reason)):
        check(ONE_BY_ONE[kind])


def test_a_family_that_batches_take_is_served_in_batches() -> None:
    assert why(config_of("llama")) is None


@pytest.mark.parametrize(
    "config",
    [
        LARGE,
        config_of("mistral", sliding_window=4096),
        config_of("gemma2", head_dim=32, attn_logit_softcapping=1.0),
        config_of("gemma3_text", head_dim=32, sliding_window=512),
        config_of("phi3"),
        config_of("stablelm"),
    ],
    ids=lambda config: config["model_type"],
)
def test_families_are_proven_over_pages_for_a_card(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """No card is needed: the arithmetic is a CPU's, the cache is a card's."""
    pages = []
    attend_pages = attention._attend_pages

    def noted(*arguments: Any) -> torch.Tensor:
        pages.append(len(arguments[4]))
        return attend_pages(*arguments)

    monkeypatch.setattr(attention, "_attend_pages", noted)
    prove(config, "base", torch.device("cuda"), torch.bfloat16)
    assert pages

    def shifted(layer: Any, query: torch.Tensor, *arguments: Any) -> torch.Tensor:
        return attend_pages(layer, query.roll(1, 2), *arguments)

    proof._problem.cache_clear()
    monkeypatch.setattr(attention, "_attend_pages", shifted)
    with pytest.raises(EngineError, match="differ"):
        prove(config, "base", torch.device("cuda"), torch.bfloat16)


def test_a_model_that_is_no_language_model_is_refused() -> None:
    with pytest.raises(CheckpointError, match="not a causal language model"):
        check({"model_type": "clip"})


@pytest.mark.parametrize(
    ("kind", "entries"),
    [("stablelm", SIZES), ("opt", OPT)],
    ids=["stablelm", "opt"],
)
def test_layers_that_drop_the_cache_are_served(kind: str, entries: dict[str, Any], tmp_path: Path) -> None:
    base = save(tmp_path / "base", kind, **entries)
    plain = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    engine = TransformersEngine(EngineSettings(str(base), max_model_len=64, cache_tokens=512, page_size=8))
    sampling = Sampling(temperature=0, max_tokens=8, ignore_eos=True)
    batch = [
        GenerationRequest(f"{index}", BASE, tuple(range(8 + 5 * index, 8 + 5 * index + length)), sampling)
        for index, length in enumerate((5, 11, 19, 30))
    ]
    engine.start()
    try:
        completions = generate(engine, batch)
    finally:
        engine.stop()
    for request, completion in zip(batch, completions, strict=True):
        prompt = torch.tensor([request.prompt_tokens])
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        assert completion.tokens == tuple(plain.generate(prompt, **options)[0, prompt.shape[1] :].tolist())


def test_serve_and_chat_refuse_in_a_sentence(tmp_path: Path) -> None:
    base = save(tmp_path / "base", "electra", **ELECTRA)
    for command in (("serve", "--base", base, "--port", 0), ("chat", "--base", base)):
        fails(in_process(*command), 1, "does not serve electra", "ElectraGeneratorPredictions", "one request at a time")
