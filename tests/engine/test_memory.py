"""What `meswitch plan` says is what the engine takes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import in_process
from engine.family import Family
from transformers import AutoConfig
from typer.testing import CliRunner

from meswitch_cli.app import build_app
from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.served import slot_entries
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.compression.job import compress, prepare
from meswitch_cli.compression.settings import CompressionSettings
from meswitch_cli.engine import EngineSettings, TransformersEngine
from meswitch_cli.engine.bank_layout import bank_layout
from meswitch_cli.engine.banks import Banks
from meswitch_cli.engine.base_model import load_base
from meswitch_cli.engine.memory import MemoryPlan, parse_bytes, plan_memory
from meswitch_cli.errors import CheckpointError, UsageError
from zoo.tiny import make_pair


@pytest.mark.parametrize(
    ("family", "options", "settings"),
    [
        ("llama", {}, {}),
        ("llama", {"tie_word_embeddings": True, "added_rows": 3}, {"bits": 4, "group_size": 32, "embedding_bits": 4}),
        ("llama", {"added_rows": 2, "dtype": torch.float32}, {"bits": 1, "salient": 0, "rank": 3}),
        ("qwen2", {}, {"salient": 3, "rank": 60}),  # more than the 48 rows of k and v
        ("gemma3", {}, {"bits": 1}),
        ("llama", {"added_rows": 2}, {"bits": 0.25, "salient": 2, "rank": 3}),
        ("qwen2", {}, {"bits": 1, "code": "trellis"}),
        ("phi", {"added_rows": 1}, {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value)) or "plain",
)
def test_plan_is_what_is_allocated(
    family: str, options: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    base, expert = make_pair(tmp_path, family, relative_delta=0.1, **options)
    compression = CompressionSettings(**settings)
    job = prepare(str(base), str(expert), tmp_path / "artifact", compression, None)
    compress(job)
    plan = plan_memory(
        Checkpoint.open(str(base)),
        compression.by_kind(),
        device_nbytes=10**8,
        experts=3,
        added_rows=options.get("added_rows", 0),
    )
    loaded = load_base(Checkpoint.open(str(base)), torch.device("cpu"), options.get("dtype", torch.bfloat16))
    weights = {tensor.data_ptr(): tensor.nbytes for tensor in loaded.model.state_dict().values()}
    plain = {id(norm.plain) for norm in loaded.norms.values()}
    extra = sum(p.nbytes for module in loaded.model.modules() if id(module) in plain for p in module.parameters())
    assert plan.base_nbytes == sum(weights.values()) - extra
    banks = Banks(loaded, bank_layout(loaded, [Artifact.open(job.out).manifest]), 3)
    assert banks.nbytes == plan.slots_nbytes


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True, "added_rows": 3}], ids=["plain", "tied"])
def test_plan_of_artifacts_is_what_is_allocated(options: dict[str, Any], tmp_path: Path) -> None:
    base, expert = make_pair(tmp_path, "qwen2", relative_delta=0.1, **options)
    artifacts = []
    kinds: dict[str, dict[str, Any]] = {
        "size": {"size": 60_000},
        "bits": {"bits": 1, "rank": 3},
        "exact": {"exact": True},
    }
    for name, chosen in kinds.items():
        settings = CompressionSettings.with_defaults(**chosen)
        compress(prepare(str(base), str(expert), tmp_path / name, settings, None))
        artifacts.append(Artifact.open(tmp_path / name).manifest)
    loaded = load_base(Checkpoint.open(str(base)), torch.device("cpu"), torch.bfloat16)
    for like, messages in itertools.product((artifacts[:1], artifacts[2:], artifacts), (False, True)):
        plan = plan_memory(
            Checkpoint.open(str(base)),
            CompressionSettings().by_kind(),
            device_nbytes=10**8,
            experts=3,
            like=like,
            messages=messages,
        )
        assert plan.slots_nbytes == Banks(loaded, bank_layout(loaded, like, messages=messages), 3).nbytes
        linears = [entry for item in like for entry in slot_entries(item) if entry.kind == "linear"]
        assert plan.bits == max(entry.bits if messages else entry.width for entry in linears)


@pytest.mark.parametrize(
    ("chosen", "options"),
    [
        ({"exact": True, "bits": 4}, ("--exact", "--bits", "4")),
        ({"bits": 0, "rank": 3}, ("--bits", "0", "--rank", "3")),
    ],
    ids=["exact", "products"],
)
def test_experts_without_codes_are_planned_without_an_artifact(
    chosen: dict[str, Any], options: tuple[str, ...], tmp_path: Path
) -> None:
    base, expert = make_pair(tmp_path, "qwen2", relative_delta=0.1)
    settings = CompressionSettings.with_defaults(**chosen)
    compress(prepare(str(base), str(expert), tmp_path / "artifact", settings, None), keep_weak=True)
    manifest = Artifact.open(tmp_path / "artifact").manifest
    told = ["--base", str(base), "--experts", "3", "--device-memory", "1GB", "--json"]
    by_options, by_artifact = (
        json.loads(in_process("plan", *told, *more).stdout)["slot_bytes"]
        for more in (options, ("--artifact", tmp_path / "artifact"))
    )
    assert by_options == by_artifact > 0
    assert manifest.exact is bool(chosen.get("exact"))
    assert {entry.bits for entry in manifest.tensors if entry.kind == "linear"} <= {0, chosen["bits"]}


@pytest.mark.parametrize(("bits", "share"), [(0.125, 1 / 8), (0.25, 1 / 4), (0.5, 1 / 2), (1, 1 / 2)])
def test_a_slot_of_a_gpu_holds_a_trellis_code_as_it_is_stored(bits: float, share: float, tmp_path: Path) -> None:
    """Of what it decodes to the share, and the same delta to the last bit; the CPU's slots hold the decoded codes."""
    base, expert = make_pair(tmp_path, "llama", relative_delta=0.1, hidden_size=256, intermediate_size=256)
    settings = CompressionSettings.with_defaults(bits=bits, code="trellis")
    compress(prepare(str(base), str(expert), tmp_path / "artifact", settings, None), keep_weak=True)
    artifact = Artifact.open(tmp_path / "artifact")
    loaded = load_base(Checkpoint.open(str(base)), torch.device("cpu"), torch.bfloat16)
    decoded, short = (
        Banks(loaded, bank_layout(loaded, [artifact.manifest], messages=messages), 2) for messages in (False, True)
    )
    for banks in (decoded, short):
        banks.load(1, artifact.manifest, artifact.read_all())
    name = "model.layers.0.self_attn.q_proj"
    sizes = [banks.banks[name].tensors.codes.nbytes for banks in (short, decoded)]
    assert sizes[0] == share * sizes[1]
    for module, bank in short.banks.items():
        assert torch.equal(bank.dequantize(1), decoded.banks[module].dequantize(1))


@pytest.mark.parametrize("slots", [1, 5])
def test_a_running_engine_has_the_slots_of_its_plan(
    slots: int, family: Family, start: Callable[..., TransformersEngine]
) -> None:
    """As many as were asked for: more than there are experts keep room for those that are loaded later."""
    engine = start(family, experts={"alpha": family.artifacts["alpha"]}, slots=slots)
    settings = CompressionSettings(bits=2, salient=4, embedding_bits=2)
    plan = plan_memory(
        Checkpoint.open(str(family.base)),
        settings.by_kind(),
        device_nbytes=10**8,
        experts=1,
        slots=slots,
        dtype="float32",
    )
    assert plan.slots == engine.statistics().slots == slots
    assert plan.slots_nbytes == engine._loader.banks.nbytes


def test_cache_is_what_the_plan_counts(family: Family, start: Callable[..., TransformersEngine]) -> None:
    engine = start(family, cache_tokens=1024, page_size=8)
    cache = engine._thread.batch_processor.cache
    plan = plan_memory(
        Checkpoint.open(str(family.base)), CompressionSettings().by_kind(), device_nbytes=10**8, experts=1
    )
    trash = 2 * cache.bytes_per_sector
    assert cache.cache_tensor.numel() - trash == 1024 * plan.token_nbytes


def test_pinned_copies_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meswitch_cli.engine.settings.choose_device", torch.device)
    monkeypatch.setattr("meswitch_cli.engine.settings.available_bytes", lambda device: 1000)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert EngineSettings(base="x", device="cuda:0").copies_nbytes == 500
    assert EngineSettings(base="x", device="cuda:0", host_bytes=7).copies_nbytes == 7
    assert EngineSettings(base="x", device="cpu").copies_nbytes == 0


def test_arithmetic_of_a_plan() -> None:
    plan = MemoryPlan(
        device_nbytes=1000,
        base_nbytes=400,
        slot_nbytes=100,
        shared_nbytes=10,
        slots=2,
        experts=5,
        context=10,
        token_nbytes=3,
    )
    assert (plan.slots_nbytes, plan.left_nbytes) == (210, 390)
    assert plan.cache_tokens == int(390 * 0.9) // 3 == 117
    assert plan.requests == 11
    assert plan.most_slots == (1000 - 400 - 10 - 34) // 100 == 5


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("80GB", 80 * 10**9), ("1.5 GiB", 3 << 29), ("512", 512), ("2kib", 2048), ("0.5TB", 5 * 10**11)],
)
def test_bytes(text: str, nbytes: int) -> None:
    assert parse_bytes(text, "--size") == nbytes


@pytest.mark.parametrize("text", ["", "GB", "80 XB", "-3GB", "1e9"])
def test_no_bytes(text: str) -> None:
    with pytest.raises(UsageError):
        parse_bytes(text, "--size")


MISTRAL_7B = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}


def plan_of(folder: Path, config: dict[str, Any], *more: str) -> tuple[int, Any]:
    (folder / "config.json").write_text(json.dumps(config))
    arguments = ["plan", "--base", str(folder), "--experts", "16", "--device-memory", "80GB", "--json", *more]
    said = CliRunner().invoke(build_app(arguments), arguments)
    return said.exit_code, json.loads(said.stdout) if said.stdout else said.exception


@pytest.mark.parametrize(
    ("family", "found"),
    [("mixtral", "mlp.gate.weight"), ("gpt2", "attn.c_attn.weight"), ("falcon_h1", "mamba.conv1d.weight")],
)
def test_a_base_whose_experts_no_layer_serves_is_not_planned(family: str, found: str, tmp_path: Path) -> None:
    AutoConfig.for_model(family, dtype="bfloat16").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{family} is served one request at a time at most.*{found}"):
        plan_memory(Checkpoint.describe(str(tmp_path)), CompressionSettings().by_kind(), experts=1, device_nbytes=1)


def test_a_config_alone_is_enough(tmp_path: Path) -> None:
    """Mistral-7B and the paper's 16 experts on 80 GB."""
    status, plan = plan_of(tmp_path, MISTRAL_7B | {"torch_dtype": "bfloat16"}, "--bits", "2", "--rank", "0")
    assert status == 0 and plan["base_bytes"] == 2 * 7_241_732_096
    assert plan["cache_token_bytes"] == 2 * 32 * 8 * 128 * 2
    # Two bits a weight, and at most a twentieth of it for steps and salient channels.
    assert 1 <= plan["slot_bytes"] / (7_241_732_096 / 4) < 1.05
    assert plan["base_bytes"] + plan["slots_bytes"] < 45e9
    assert plan["requests"] == int(0.9 * (80e9 - plan["base_bytes"] - plan["slots_bytes"])) // 131072 // 4096
    assert plan_of(tmp_path, MISTRAL_7B, "--dtype", "float32")[1]["base_bytes"] == 4 * 7_241_732_096
    status, error = plan_of(tmp_path, MISTRAL_7B)
    assert isinstance(error, UsageError) and "give --dtype" in str(error)


@pytest.mark.parametrize("bits", ["0.25", "1", "2", "4"])
def test_rank_is_counted(bits: str, tmp_path: Path) -> None:
    config = MISTRAL_7B | {"torch_dtype": "bfloat16"}

    def slot(*options: str) -> int:
        return plan_of(tmp_path, config, "--bits", bits, "--embedding-bits", "2", *options)[1]["slot_bytes"]

    # Rows and columns of a layer's seven linears, sixteen times in 16 bit; a slot's rank in each bank.
    layer = 2 * 16 * (4 * 4096 + 2 * (1024 + 4096) + 3 * (14336 + 4096)) + 4 * 7
    assert slot("--rank", "16", "--embedding-rank", "0") - slot("--rank", "0") == 32 * layer
    # Embedding and head.
    assert slot() - slot("--embedding-rank", "0") == 2 * (2 * 16 * (32000 + 4096) + 4)
    assert slot() == slot("--rank", "16") == slot("--embedding-rank", "16")


def test_slots_of_a_gpu_hold_trellis_codes_as_they_are_stored(tmp_path: Path) -> None:
    """A quarter of a bit on disk is one on the device, beside parts that are the same at all rates."""
    config = MISTRAL_7B | {"torch_dtype": "bfloat16"}

    def slot(*options: str) -> int:
        return plan_of(tmp_path, config, *options, "--rank", "16", "--embedding-bits", "2")[1]["slot_bytes"]

    linears = 32 * 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336)
    trellis = {bits: slot("--bits", bits, "--code", "trellis") for bits in ("0.125", "0.25", "0.5", "1")}
    for bits, own in trellis.items():
        assert own - trellis["0.125"] == (float(bits) - 0.125) * linears / 8
    assert slot("--bits", "1", "--code", "trellis") == slot("--bits", "1")
    assert 128 * trellis["0.25"] < 80e9 - 2 * linears - 4 * 32000 * 4096


def test_command(family: Family) -> None:
    runner = CliRunner()
    arguments = ["plan", "--base", str(family.base), "--experts", "4", "--device-memory", "10MB", "--context", "128"]
    said = runner.invoke(build_app(arguments), arguments)
    assert said.exit_code == 0 and "4 slots" in said.stdout and "at once" in said.stdout
    answer = json.loads(runner.invoke(build_app(arguments), [*arguments, "--json"]).stdout)
    assert answer["fits"] and answer["slots_bytes"] > 4 * 1000
    assert answer["base_bytes"] == Checkpoint.open(str(family.base)).nbytes
    for size, experts, way_out in (("300KB", "4", "not even one slot"), ("10MB", "5000", "lower --slots to")):
        little = ["plan", "--base", str(family.base), "--experts", experts, "--device-memory", size]
        refused = runner.invoke(build_app(little), little)
        assert refused.exit_code == 1 and f"does not fit: {way_out}" in refused.output
