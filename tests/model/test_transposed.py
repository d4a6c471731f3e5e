"""A family that keeps its linears as `[in, out]`: GPT-2 with its Conv1D."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.restore import restore
from meswitch_cli.artifact.weights import ArtifactWeights
from meswitch_cli.calibration.data import read_calibration
from meswitch_cli.calibration.stream import stream_statistics
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.compression.job import compress, prepare
from meswitch_cli.compression.settings import RANDOM, CompressionSettings
from meswitch_cli.delta.quantize import dequantize
from meswitch_cli.model.build import build_model
from meswitch_cli.model.weights import CheckpointWeights
from zoo.tiny_tokenizer import tiny_tokenizer

WIDTH = 96
NAME = "transformer.h.1.mlp.c_fc.weight"
IDS = torch.arange(4, 40)[None]
CPU = torch.device("cpu")

Pair = tuple[Path, Path]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder, generator = tmp_path_factory.mktemp("gpt2"), torch.Generator().manual_seed(0)
    config = AutoConfig.for_model("gpt2", n_embd=WIDTH, n_layer=2, n_head=4, n_positions=128, vocab_size=268)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for size, name in ((0.1, "base"), (0.002, "expert")):
        for parameter in model.parameters():
            parameter.data += size * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return folder / "base", folder / "expert"


def _weights(path: Path) -> CheckpointWeights:
    return CheckpointWeights(Checkpoint.open(str(path)))


def _stored(path: Path) -> torch.Tensor:
    return safetensors.torch.load_file(path / "model.safetensors")[NAME]


def test_everybody_sees_out_by_in(gpt2: Pair) -> None:
    weights = _weights(gpt2[1])
    assert _stored(gpt2[1]).shape == (WIDTH, 4 * WIDTH)
    assert weights.architecture.parameters[NAME].shape == (4 * WIDTH, WIDTH)
    assert torch.equal(weights.read(NAME), _stored(gpt2[1]).T)
    item = weights.architecture.parameters[NAME]
    assert torch.equal(item.to_stored(item.from_stored(_stored(gpt2[1]))), _stored(gpt2[1]))


def test_a_built_model_is_transformers_own(gpt2: Pair) -> None:
    plain = AutoModelForCausalLM.from_pretrained(gpt2[1], dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(build_model(_weights(gpt2[1]), CPU, torch.float32)(IDS).logits, plain(IDS).logits)


def test_calibration_sees_its_inputs(gpt2: Pair) -> None:
    plain = AutoModelForCausalLM.from_pretrained(gpt2[1], dtype=torch.float32).eval()
    seen: list[torch.Tensor] = []
    module = plain.get_submodule(NAME.removesuffix(".weight"))
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, WIDTH)))
    with torch.no_grad():
        plain(IDS)
    found = dict(stream_statistics(_weights(gpt2[1]), IDS))
    assert len(found[1]) == 4 and len(found[0]) == 4
    torch.testing.assert_close(found[1][NAME].energy, seen[0].square().sum(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings", [{"calibration": RANDOM, "steps": "output-unbiased"}, {"steps": "distill"}], ids=str
)
def test_it_is_compressed_and_comes_back_as_it_lay(
    gpt2: Pair, tmp_path: Path, calibration_file: Path, settings: dict[str, str]
) -> None:
    data = read_calibration(calibration_file) if settings["steps"] == "distill" else None
    chosen = CompressionSettings(
        salient=4, samples=4, sequence_length=32, **({"calibration": data.sha256} if data else {}) | settings
    )
    compress(prepare(str(gpt2[0]), str(gpt2[1]), tmp_path / "a", chosen, data))
    artifact, base = Artifact.open(tmp_path / "a"), _weights(gpt2[0])
    assert len(list(artifact.verify())) == len(artifact.manifest.shards) + len(artifact.manifest.files)
    entry = next(entry for entry in artifact.manifest.tensors if entry.name == NAME)
    assert entry.kind == "linear" and entry.shape == (4 * WIDTH, WIDTH)
    assert entry.weight_error is not None and entry.weight_error < 0.3
    restore(artifact, base.checkpoint, tmp_path / "back", dtype=torch.float32)
    expected = base.read(NAME) + dequantize(artifact.shard(entry.shard).delta(NAME))
    assert torch.equal(_stored(tmp_path / "back"), expected.T)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32).eval()
    with torch.no_grad():
        ours = build_model(ArtifactWeights(artifact, base), CPU, torch.float32)(IDS).logits
        assert torch.equal(ours, back(IDS).logits)
