"""The proof at start: what passes it, what does not, and that it sees an engine that computes wrongly."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from command_line import fails, in_process
from engine.family import Family

from meswitch_cli.engine import (
    EngineSettings,
    TransformersEngine,
    attention,
    generate,
    plain_layers,
    proof,
    transformers_engine,
)
from meswitch_cli.engine.batch import Batch
from meswitch_cli.engine.contract import BASE, EngineError, GenerationRequest, Sampling
from meswitch_cli.engine.decoding import Decoding
from meswitch_cli.engine.mixture import ExpertRouter
from meswitch_cli.engine.modules import ExpertEmbedding, ExpertHead, ExpertLinear, GainedNorm, kernels
from meswitch_cli.engine.own_parameters import OwnParameters
from meswitch_cli.engine.proof import prove, why_one_by_one
from meswitch_cli.engine.runner import Runner
from meswitch_cli.engine.small import VOCABULARY, as_wide, narrowed, small_config, special_ids, with_short_mlps
from meswitch_cli.errors import CheckpointError
from zoo.tiny_tokenizer import tiny_tokenizer

CPU = torch.device("cpu")
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 268,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
#: Of families whose heads all have keys of their own.
UNGROUPED = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
OPT = UNGROUPED | {"ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 128}
GPT_NEO = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 268, "max_position_embeddings": 512} | {
    "attention_types": [[["global", "local"], 1]],
    "bos_token_id": 0,
    "eos_token_id": 1,
}
ELECTRA = UNGROUPED | {"embedding_size": 32, "is_decoder": True}
BLOOM = {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 268}
#: A Llama of 70 billion parameters.
LARGE = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
}


@pytest.fixture(autouse=True)
def _nothing_proven_before() -> Iterator[None]:
    proof._problem.cache_clear()
    yield
    proof._problem.cache_clear()


def config_of(kind: str, **entries: Any) -> dict[str, Any]:
    return {"model_type": kind, **SIZES, **entries}


def check(config: dict[str, Any]) -> None:
    prove(config, "base", CPU, torch.float32)


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


def why(config: dict[str, Any]) -> str | None:
    return why_one_by_one(config, "base", CPU, torch.float32)


ONE_BY_ONE = {
    "bloom": {"model_type": "bloom", **BLOOM},
    "gpt_neo": {"model_type": "gpt_neo", **GPT_NEO},
    "mamba": {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2},
    "gpt_oss": config_of("gpt_oss", num_local_experts=4, head_dim=16),
    "granitemoe": config_of("granitemoe", num_local_experts=4),
    "jetmoe": {"model_type": "jetmoe", **UNGROUPED},
    "qwen3_5_text": config_of("qwen3_5_text", layer_types=["linear_attention", "full_attention"]),
    "falcon_h1": config_of("falcon_h1"),
}


@pytest.mark.parametrize("kind", ONE_BY_ONE)
def test_families_that_are_served_one_request_at_a_time(kind: str) -> None:
    """Among them linears whose weights are read by others (Mamba), stacks of matrices (gpt-oss), convolutions."""
    reason = why(ONE_BY_ONE[kind])
    assert reason is not None
    with pytest.raises(EngineError, match=re.escape(reason)):
        check(ONE_BY_ONE[kind])


def test_a_family_that_batches_take_is_served_in_batches() -> None:
    assert why(config_of("llama")) is None


def never_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OwnParameters, "_put", lambda self, slot: None)


def always_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    put = OwnParameters._put
    monkeypatch.setattr(OwnParameters, "_put", lambda self, slot: put(self, proof.SLOT))


def one_cache_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[str, Any] = {}
    init = Decoding.__init__

    def shared(self: Decoding, *arguments: Any) -> None:
        init(self, *arguments)
        (name,) = self._kept.keys() & {"past_key_values", "cache"}  # the second since transformers 5.24
        self._kept = self._kept | {name: kept.setdefault("cache", self._kept[name])}

    monkeypatch.setattr(Decoding, "__init__", shared)


def unchanged_linears(monkeypatch: pytest.MonkeyPatch) -> None:
    unchanged(ExpertLinear)(monkeypatch)


def with_their_weights_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_layers, "_read_directly", lambda model: [])


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("qwen3_5_text", never_placed, "logits of an expert differ"),
        ("qwen3_5_text", always_placed, "differ"),
        ("gpt_neo", one_cache_for_all, "differ"),
        ("mamba", with_their_weights_read, "logits of an expert differ"),
        ("gpt_neo", unchanged_linears, "logits of an expert differ"),
    ],
    ids=["never-placed", "always-placed", "cache", "weights-read", "linears"],
)
def test_a_wrong_engine_is_seen_one_request_at_a_time(
    kind: str, change: Callable[[pytest.MonkeyPatch], None], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert why(ONE_BY_ONE[kind])
    proof._problem.cache_clear()
    change(monkeypatch)
    with pytest.raises(EngineError, match=f"nor one request at a time: .*{reason}"):
        why(ONE_BY_ONE[kind])


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


def without_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "attending", lambda *_: contextlib.nullcontext())


def without_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GainedNorm, "gained", lambda self, y, gain_rows, shape: y)
    init = proof.replace_layers

    def unfused(*arguments: Any) -> Any:
        base = init(*arguments)
        for norm in base.norms.values():
            norm.rms_norm = None
        return base

    monkeypatch.setattr(proof, "replace_layers", unfused)


def everyone_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    def set_slots(self: Runner, batch: list[Any]) -> None:
        self.mixed = False

    monkeypatch.setattr(Runner, "set_slots", set_slots)


def base_as_the_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    set_slots = Runner.set_slots

    def shifted(self: Runner, batch: list[Any]) -> None:
        set_slots(self, batch)
        self.mixed = True
        self.slot_of_token.fill_(proof.SLOT)

    monkeypatch.setattr(Runner, "set_slots", shifted)


def unchanged(kind: type[Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Experts have no part in a kind of layer."""

    def change(monkeypatch: pytest.MonkeyPatch) -> None:
        original = kind.forward

        def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
            bank, self.bank = self.bank, None
            try:
                result: torch.Tensor = original(self, x)
            finally:
                self.bank = bank
            return result

        monkeypatch.setattr(kind, "forward", forward)

    return change


def mixed_as_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrices of mixtures have no banks, whatever the batch."""
    monkeypatch.setattr(
        ExpertLinear, "product", lambda self, rows, *of_batch: torch.nn.functional.linear(rows, self.weight)
    )


def routed_as_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ExpertRouter, "forward", lambda self, x: self.base(x))


def without_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    attend_one = attention._attend_one
    monkeypatch.setattr(
        attention, "_attend_one", lambda q, k, v, scale, window, cap: attend_one(q, k, v, scale, None, cap)
    )


def without_softcaps(monkeypatch: pytest.MonkeyPatch) -> None:
    attend_one = attention._attend_one
    monkeypatch.setattr(
        attention, "_attend_one", lambda q, k, v, scale, window, cap: attend_one(q, k, v, scale, window, None)
    )


@pytest.mark.parametrize(
    ("kind", "entries", "change", "reason"),
    [
        ("stablelm", {}, without_cache, "requests see each other's prompts"),
        ("llama", {}, without_gains, "logits of an expert differ"),
        ("llama", {}, everyone_the_base, "logits of an expert differ"),
        ("llama", {}, base_as_the_expert, "logits of the base differ"),
        ("llama", {}, unchanged(ExpertLinear), "logits of an expert differ"),
        ("llama", {}, unchanged(ExpertHead), "logits of an expert differ"),
        ("llama", {}, unchanged(ExpertEmbedding), "logits of an expert differ"),
        ("qwen3_moe", MOE, mixed_as_the_base, "logits of an expert differ"),
        ("qwen3_moe", MOE, routed_as_the_base, "logits of an expert differ"),
        ("mistral", {"sliding_window": 4096}, without_windows, "differ"),
        ("gemma2", {"head_dim": 32, "attn_logit_softcapping": 1.0}, without_softcaps, "differ"),
    ],
    ids=[
        "cache",
        "gains",
        "base-for-all",
        "expert-for-all",
        "linear",
        "head",
        "embedding",
        "mixture",
        "router",
        "window",
        "softcap",
    ],
)
def test_a_wrong_engine_is_seen(
    kind: str,
    entries: dict[str, Any],
    change: Callable[[pytest.MonkeyPatch], None],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check(config_of(kind, **entries))
    proof._problem.cache_clear()
    change(monkeypatch)
    with pytest.raises(EngineError, match=reason):
        check(config_of(kind, **entries))


def test_a_config_is_proven_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    small_model = proof.small_model

    def noted(config: dict[str, Any], dtype: torch.dtype) -> Any:
        made.append(config["model_type"])
        return small_model(config, dtype)

    monkeypatch.setattr(proof, "small_model", noted)
    for where in ("here", "there"):
        prove(config_of("llama"), where, CPU, torch.bfloat16)
    assert made == ["llama"]
    with pytest.raises(EngineError, match=r"^here: .*gpt_neo"):
        prove({"model_type": "gpt_neo", **GPT_NEO}, "here", CPU, torch.float32)
    with pytest.raises(EngineError, match=r"^there: .*gpt_neo"):
        prove({"model_type": "gpt_neo", **GPT_NEO}, "there", CPU, torch.float32)
    assert made == ["llama", "gpt_neo"]


def test_the_process_is_left_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    threads, verbosity = threading.active_count(), transformers.logging.get_verbosity()
    check(config_of("llama"))
    with pytest.raises(EngineError):
        check({"model_type": "gpt_neo", **GPT_NEO})
    assert torch.equal(torch.rand(4), expected)
    assert (threading.active_count(), transformers.logging.get_verbosity()) == (threads, verbosity)
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
    assert capfd.readouterr() == ("", "")


def test_small_configs_keep_what_a_family_is() -> None:
    first, *others = (small_config(LARGE, narrow) for narrow in (narrowed, with_short_mlps, as_wide))
    assert (first["num_attention_heads"], first["num_key_value_heads"], first["head_dim"]) == (4, 2, 16)
    assert (first["hidden_size"], first["intermediate_size"], first["num_hidden_layers"]) == (64, 96, 2)
    assert first["vocab_size"] == VOCABULARY and max(special_ids(first)) < VOCABULARY
    assert len(special_ids(first)) == 4
    assert [item["hidden_size"] for item in others] == [8192, 8192]
    assert [item["intermediate_size"] for item in others] == [96, 28672]


def test_small_configs_keep_every_kind_of_layer() -> None:
    first = small_config({"model_type": "gemma3_text", "num_hidden_layers": 26})
    assert first["layer_types"] == ["sliding_attention", "full_attention"]
    smollm = small_config({"model_type": "smollm3", "num_hidden_layers": 36, "no_rope_layer_interval": 4})
    assert smollm["no_rope_layers"] == [1, 0] and smollm["num_hidden_layers"] == 2


def test_small_configs_narrow_the_ropes_lists() -> None:
    factors = [1.0] * 48
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": factors, "long_factor": factors}
    config = {
        "model_type": "phi3",
        "hidden_size": 3072,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 32,
        "original_max_position_embeddings": 4096,
        "max_position_embeddings": 131072,
        "rope_parameters": rope,
    }
    first = small_config(config)
    assert len(first["rope_parameters"]["short_factor"]) == 8
    check(config)


def save(folder: Path, kind: str, **entries: Any) -> Path:
    torch.manual_seed(5)
    config = transformers.AutoConfig.for_model(kind, **entries)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = 1.5 * parameter.shape[-1] ** -0.5 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


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


def test_verify_proves_the_family(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = family.artifacts["alpha"]
    proven = in_process("verify", artifact, "--base", family.base, "--full")
    assert proven.returncode == 0 and proven.stdout.count("ok:") == 3
    fails(in_process("verify", artifact, "--full"), 2, "--base")
    assert "one request at a time" not in proven.stdout
    proof._problem.cache_clear()
    without_gains(monkeypatch)
    result = in_process("verify", artifact, "--base", family.base, "--full")
    assert result.returncode == 0
    assert re.search("one request at a time; not in batches: .*logits of an expert differ", result.stdout)
    proof._problem.cache_clear()
    never_placed(monkeypatch)
    result = in_process("verify", artifact, "--base", family.base, "--full")
    assert result.returncode == 1 and "logits of an expert differ" in result.stderr


def test_kernels_are_given_a_row_for_each_token() -> None:
    """Electra's head is computed of the tokens that predict alone, by layers that are not the head."""
    config = {"model_type": "electra", **ELECTRA}
    with pytest.raises(
        EngineError,
        match=r"ElectraGeneratorPredictions computes in a way .* \(ValueError: a layer is given 4 rows for 32 tok",
    ):
        check(config)
    slots = torch.tensor([-1, 0, 0, 1], dtype=torch.int32)
    batch = Batch(slots, slots[1::2], 2, kernels(CPU, torch.float32))
    assert batch.of_tokens(4)[0] is batch.of_rows(4)[0] is slots
    assert batch.of_rows(2)[0].tolist() == [0, 1]
    for look in (batch.of_tokens, batch.of_rows):
        with pytest.raises(ValueError, match="3 rows for 4 tokens"):
            look(3)


def test_unknown_classes_are_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model without a kind of layer that the large one has proves nothing."""
    config = config_of("deepseek_v3", first_k_dense_replace=2, num_hidden_layers=4, n_routed_experts=4)
    monkeypatch.setattr("meswitch_cli.engine.small._DENSE_FIRST", "")
    with pytest.raises(EngineError, match="it would lack Deepseek"):
        check(config)
