"""The proof at start sees an engine that computes wrongly, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from command_line import fails, in_process
from engine.family import Family
from engine.proving import CPU, ELECTRA, GPT_NEO, MOE, ONE_BY_ONE, check, config_of, why

from meswitch_cli.engine import (
    attention,
    plain_layers,
    proof,
)
from meswitch_cli.engine.batch import Batch
from meswitch_cli.engine.contract import EngineError
from meswitch_cli.engine.decoding import Decoding
from meswitch_cli.engine.mixture import ExpertRouter
from meswitch_cli.engine.modules import ExpertEmbedding, ExpertHead, ExpertLinear, GainedNorm, kernels
from meswitch_cli.engine.own_parameters import OwnParameters
from meswitch_cli.engine.proof import prove
from meswitch_cli.engine.runner import Runner

pytestmark = pytest.mark.usefixtures("nothing_proven_before")


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
