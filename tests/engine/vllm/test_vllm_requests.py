"""What is decided before vLLM is asked: none of it needs vLLM."""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.family import Family

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.engine import EngineSettings
from meswitch_cli.engine.bank_layout import Layout, bank_layout
from meswitch_cli.engine.base_model import load_base
from meswitch_cli.engine.contract import EngineError, InvalidRequestError, Sampling
from meswitch_cli.engine.expert import ServedModel
from meswitch_cli.engine.vllm.arguments import engine_arguments
from meswitch_cli.engine.vllm.artifacts import Files
from meswitch_cli.engine.vllm.engine import VllmEngine
from meswitch_cli.engine.vllm.names import WorkerConfig, base_names, layout_of, worker_config
from meswitch_cli.engine.vllm.parent import tell_of_exceptions, tell_parent, told_by_children
from meswitch_cli.engine.vllm.sampling import GRAMMAR_KEY, generator_seed, sampling_options
from meswitch_cli.engine.vllm.version import check_vllm
from meswitch_cli.model.architecture import architecture
from zoo.tiny import make_pair

MODEL = ServedModel(
    name="alpha", path=Path("/artifacts/alpha"), digest="abc", tokenizer=None, vocabulary=300, end_ids=frozenset({1, 7})
)  # type: ignore[arg-type]


@pytest.mark.parametrize("found", ["0.31.0", "0.34.0", "0.33.1", "1.0", "0.32", "0.32.1", "0.32.0+cpu", "dev", ""])
def test_only_versions_that_were_read_are_accepted(found: str) -> None:
    if found.startswith(("0.32", "0.33")):
        check_vllm(found)
        return
    with pytest.raises(EngineError, match=r">=0\.32,<0\.34"):
        check_vllm(found)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_engine_says_how_to_install_it(family: Family) -> None:
    with pytest.raises(EngineError, match=r"not installed: pip install 'meswitch\[vllm\]'"):
        VllmEngine(EngineSettings(base=str(family.base), experts=family.artifacts))


#: Every member of `Sampling`, and what vLLM is told of it.
TOLD: dict[str, tuple[Any, dict[str, Any]]] = {
    "temperature": (0.5, {"temperature": 0.5}),
    "top_p": (0.9, {"top_p": 0.9}),
    "top_k": (5, {"top_k": 5}),
    "min_p": (0.1, {"min_p": 0.1}),
    "repetition_penalty": (1.2, {"repetition_penalty": 1.2}),
    "frequency_penalty": (0.3, {"frequency_penalty": 0.3}),
    "presence_penalty": (-0.4, {"presence_penalty": -0.4}),
    "logit_bias": ({5: 2.0}, {"logit_bias": {5: 2.0}}),
    "stop": (("end",), {}),  # `Generation` ends the request at them
    "shown_tokens": ((9,), {}),  # `Generation` shows them
    "stop_token_ids": ((9,), {"stop_token_ids": [1, 7, 9]}),
    "seed": (3, {"seed": generator_seed(3)}),
    "max_tokens": (40, {"max_tokens": 40}),
    "min_tokens": (2, {"min_tokens": 2}),
    "ignore_eos": (True, {"stop_token_ids": []}),
    "logprobs": (4, {"logprobs": 4}),
    "json_schema": ({"type": "array"}, {"extra_args": {GRAMMAR_KEY: "array"}}),
    "json_object": (True, {"extra_args": {GRAMMAR_KEY: None}}),
    "structural_tag": ({"type": "structural_tag", "format": {}}, {"extra_args": {GRAMMAR_KEY: None}}),
}
#: Members that are refused, and the parameter that the refusal names.
REFUSED = {"prompt_logprobs": (1, "echo")}


@pytest.mark.parametrize("member", [field.name for field in dataclasses.fields(Sampling)])
def test_no_parameter_is_dropped(member: str) -> None:
    if member in REFUSED:
        asked, parameter = REFUSED[member]
        with pytest.raises(InvalidRequestError) as caught:
            sampling_options(Sampling(**{member: asked}), MODEL)
        assert caught.value.parameter == parameter
        return
    value, told = TOLD[member]
    plain = sampling_options(Sampling(), MODEL)
    assert plain["ignore_eos"] is True and plain["stop_token_ids"] == [1, 7] and plain["detokenize"] is False
    options = sampling_options(Sampling(**{member: value}), MODEL)
    if GRAMMAR_KEY in told.get("extra_args", {}):
        grammar = options["extra_args"][GRAMMAR_KEY]
        assert grammar["end_ids"] == [1, 7] and grammar["vocabulary"] == 300 and grammar["path"] == "/artifacts/alpha"
        wanted = told["extra_args"][GRAMMAR_KEY]
        assert (grammar["schema"] and json.loads(grammar["schema"])["type"]) == wanted
        assert bool(grammar["structural_tag"]) == (member == "structural_tag")
        return
    assert {key: item for key, item in options.items() if plain[key] != item} == told


def test_greedy_and_the_temperatures_that_vllm_would_change() -> None:
    assert sampling_options(Sampling(temperature=1e-6), MODEL)["temperature"] == 0.0
    for temperature in (1e-4, 0.0099, 2.01, 1000.0):
        with pytest.raises(InvalidRequestError) as caught:
            sampling_options(Sampling(temperature=temperature), MODEL)
        assert caught.value.parameter == "temperature" and "2" in str(caught.value)


def test_any_seed_is_one_that_generators_take() -> None:
    seeds = [generator_seed(seed) for seed in (-1, 0, 1, 2**80, -(2**70))]
    assert len(set(seeds)) == 5 and all(0 <= seed < 2**62 for seed in seeds)


def test_a_shard_that_changes_in_place_is_noticed(family: Family, tmp_path: Path) -> None:
    path = tmp_path / "alpha"
    shutil.copytree(family.artifacts["alpha"], path)
    before = Files.of(path)
    assert before == Files.of(path) and len(before.listed) >= 2
    shard = next(path.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")  # as many bytes
    assert Files.of(path) != before
    assert Files.of(tmp_path / "absent").listed == ()


def test_a_process_tells_the_server_that_started_it_why_it_cannot_begin() -> None:
    def told_by_a_process(reason: str) -> None:
        code = f"from meswitch_cli.engine.vllm.parent import tell_parent; tell_parent({reason!r})"
        subprocess.run([sys.executable, "-c", code], check=True)

    with told_by_children() as refusal:
        assert refusal.reason is None
        told_by_a_process("no layer of the base's")
        assert refusal.reason == "no layer of the base's"
    told_by_a_process("nobody listens")
    assert refusal.reason is None


def fails_at_its_start(first: str | None) -> None:
    tell_of_exceptions()
    if first is not None:
        tell_parent(first)
    log = logging.getLogger("vllm.v1.engine.core")
    log.error("no exception")
    for error in (AttributeError("'Lfm2Config' object has no attribute 'x'\nat all"), RuntimeError("See above")):
        try:
            raise error
        except Exception:
            log.exception("EngineCore failed to start.")


@pytest.mark.parametrize(
    ("first", "known"),
    [(None, "AttributeError: 'Lfm2Config' object has no attribute 'x'"), ("our own words", "our own words")],
    ids=["vllm", "ours"],
)
def test_what_vllm_logs_where_it_cannot_begin_is_told(first: str | None, known: str) -> None:
    process = multiprocessing.get_context("fork").Process(target=fails_at_its_start, args=(first,))
    with told_by_children() as refusal:
        process.start()
        process.join()
        assert (process.exitcode, refusal.reason) == (0, known)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "phi"])
def test_names_are_those_of_the_loaded_base(name: str, tmp_path: Path) -> None:
    base, _ = make_pair(tmp_path, name, dtype=torch.float32)
    checkpoint = Checkpoint.open(str(base))
    loaded = load_base(checkpoint, torch.device("cpu"), torch.float32)
    names = base_names(architecture(checkpoint.config, str(base)))
    assert names.linears == loaded.linears.keys() and names.norms == loaded.norms.keys()
    assert (names.embedding_name, names.head_name) == (loaded.embedding_name, loaded.head_name)
    assert names.vocabulary == loaded.vocabulary


def test_a_mixture_is_refused_by_name(tmp_path: Path) -> None:
    base, _ = make_pair(tmp_path, "mixtral")
    with pytest.raises(EngineError, match=r"mixtral is a mixture of experts, such as .*, which --engine vllm"):
        base_names(architecture(Checkpoint.open(str(base)).config, str(base)))


def test_a_family_that_vllm_computes_otherwise_is_refused(family: Family) -> None:
    described = architecture(Checkpoint.open(str(family.base)).config, str(family.base))
    with pytest.raises(EngineError, match=r"cohere2 is computed otherwise by vLLM than by transformers; use --engine"):
        base_names(dataclasses.replace(described, model_type="cohere2"))


def test_the_layout_reaches_the_workers(family: Family) -> None:
    checkpoint = Checkpoint.open(str(family.base))
    described = architecture(checkpoint.config, str(family.base))
    names = base_names(described)
    layout = bank_layout(names, [Artifact.open(path).manifest for path in family.artifacts.values()])
    assert layout_of(json.loads(json.dumps(worker_config(layout)))) == layout
    arguments = engine_arguments(
        EngineSettings(base=str(family.base), max_running=4, cache_tokens=1000, page_size=32, prefix_sharing=False),
        checkpoint,
        described,
        names,
        layout,
        slots=2,
        dtype=torch.float32,
        max_model_len=64,
        seed=1,
    )
    assert arguments["hf_overrides"] == {"vocab_size": 271}
    extra = arguments["model_loader_extra_config"]
    assert extra == {"vocabulary": 271, "names": ["lm_head.weight", "model.embed_tokens.weight"]}
    assert arguments["kv_cache_memory_bytes"] >= 1000 * 2 * 2 * 2 * names_width(described) * 4
    assert not arguments["enable_prefix_caching"] and arguments["max_loras"] == 2 and arguments["dtype"] == "float32"
    config = WorkerConfig.of(json.loads(json.dumps(arguments["additional_config"])))
    assert config == WorkerConfig(layout=layout.joined(Layout({}, names.norms)), host_bytes=None)
    assert config.checked and not config.loras
    assert layout.holds(Layout({}, frozenset()))


def names_width(described: Any) -> int:
    """Width of a key head, by the shape of its projection of two heads."""
    return int(described.parameters["model.layers.0.self_attn.k_proj.weight"].shape[0] // 2)
