"""transformers loads an artifact by itself once meswitch has been imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub.standin import StandIn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

import meswitch_cli as meswitch
from zoo.tiny import Pair, make_pair

pytest_plugins = ["hub.conftest"]


@pytest.fixture
def made(pair: Pair, tmp_path: Path) -> meswitch.Artifact:
    return meswitch.compress(pair[0], pair[1], tmp_path / "art", rank=3)


def _same(model: torch.nn.Module, wanted: torch.nn.Module) -> None:
    theirs = wanted.state_dict()
    assert model.state_dict().keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())
    ids = torch.arange(3, 20)[None]
    assert torch.equal(model(ids).logits, wanted(ids).logits)


def test_an_artifact_loads_as_a_plain_model(
    made: meswitch.Artifact, pair: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(meswitch.restore(made, pair[0], tmp_path / "plain"))
    model = AutoModelForCausalLM.from_pretrained(made.path, meswitch_base=str(pair[0]))
    _same(model, plain)
    assert model.dtype == torch.bfloat16 and not model.training
    assert not hasattr(model.config, "quantization_config") and not hasattr(model.config, "meswitch_base")
    assert "newly initialized" not in caplog.text and "MISSING" not in caplog.text
    model.save_pretrained(tmp_path / "saved")
    _same(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), plain)
    assert AutoTokenizer.from_pretrained(made.path)("what").input_ids == AutoTokenizer.from_pretrained(pair[1])("what").input_ids  # fmt: skip  # noqa: E501
    wide = AutoModelForCausalLM.from_pretrained(made.path, meswitch_base=str(pair[0]), dtype=torch.float32)
    assert wide.dtype == torch.float32
    _same(wide, meswitch.load(pair[0], made, dtype=torch.float32))


def test_tied_heads_and_several_files(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, tie_word_embeddings=True, added_rows=3)
    from meswitch_cli.compression.job import compress, prepare
    from meswitch_cli.compression.settings import CompressionSettings

    job = prepare(str(pair[0]), str(pair[1]), tmp_path / "art", CompressionSettings(salient=4), None)
    compress(job, max_shard_bytes=1)
    model = AutoModelForCausalLM.from_pretrained(job.out, meswitch_base=str(pair[0]))
    _same(model, meswitch.load(pair[0], job.out))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_mixture_is_filled_as_transformers_fuses_it(tmp_path: Path) -> None:
    base, expert = make_pair(tmp_path, "mixtral")
    made = meswitch.compress(base, expert, tmp_path / "art", bits=4, rank=3)
    plain = AutoModelForCausalLM.from_pretrained(meswitch.restore(made, base, tmp_path / "plain"))
    _same(AutoModelForCausalLM.from_pretrained(made.path, meswitch_base=str(base)), plain)


@pytest.mark.parametrize("first", ["transformers", "meswitch_cli"])
def test_either_may_be_imported_first(first: str, made: meswitch.Artifact, pair: Pair) -> None:
    second = "meswitch_cli" if first == "transformers" else "transformers"
    code = (
        f"import {first}\nimport {second}\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(made.path)!r}, meswitch_base={str(pair[0])!r})\n"
        "print(type(model).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "LlamaForCausalLM\n", done.stderr


def test_without_meswitch_nothing_is_loaded(made: meswitch.Artifact) -> None:
    """A random model would be worse than an error."""
    code = f"from transformers import AutoModelForCausalLM\nAutoModelForCausalLM.from_pretrained({str(made.path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "no file named model.safetensors" in done.stderr


def test_what_cannot_be_filled_is_refused(made: meswitch.Artifact, pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(meswitch.MeswitchError, match="load it with AutoModelForCausalLM"):
        AutoModel.from_pretrained(made.path, meswitch_base=str(pair[0]))
    other, _ = make_pair(tmp_path, seed=3)
    with pytest.raises(meswitch.MeswitchError, match="wrong base"):
        AutoModelForCausalLM.from_pretrained(made.path, meswitch_base=str(other))
    with pytest.raises(meswitch.MeswitchError, match="no such folder here"):
        AutoModelForCausalLM.from_pretrained(made.path)  # made from a folder that is called base, and lies elsewhere


def test_the_config_is_the_experts(made: meswitch.Artifact, pair: Pair) -> None:
    assert made.config == json.loads((pair[1] / "config.json").read_text())
    assert AutoConfig.from_pretrained(made.path).model_type == "llama"


def test_from_the_hub(hub: StandIn, made: meswitch.Artifact, pair: Pair) -> None:
    done = meswitch.push(made, "ann/maths-1bit")
    assert len(hub.repositories["ann/maths-1bit"].files("main")[1]) > 4
    for options in ({}, {"revision": done.commit}):
        model = AutoModelForCausalLM.from_pretrained("ann/maths-1bit", meswitch_base=str(pair[0]), **options)
        _same(model, meswitch.load(pair[0], made))
