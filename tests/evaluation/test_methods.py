"""The models that methods make, on tiny pairs: bytes of every tensor, distilled scales, activations."""

import math
from pathlib import Path

import pytest
import torch

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.weights import ArtifactWeights
from meswitch_cli.calibration.data import read_calibration
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.compression.job import compress, prepare
from meswitch_cli.compression.settings import RANDOM, CompressionSettings
from meswitch_cli.evaluation.baselines import parse_method
from meswitch_cli.evaluation.baselines.activations import Activations
from meswitch_cli.evaluation.baselines.bitdelta import ScaleTraining, bitdelta, distil_scales
from meswitch_cli.evaluation.baselines.model import BaselineWeights
from meswitch_cli.evaluation.subjects import open_experts
from meswitch_cli.model.build import build_model
from meswitch_cli.model.weights import CheckpointWeights
from zoo.tiny import Pair, make_pair


def made(pair: Pair, spec: str, calibration: Path | None = None) -> BaselineWeights:
    base = CheckpointWeights(Checkpoint.open(str(pair[0])))
    expert = open_experts([str(pair[1])], base)[0]
    return BaselineWeights(parse_method(spec), base, expert, Activations(expert, calibration))


def read_all(weights: BaselineWeights | ArtifactWeights) -> dict[str, torch.Tensor]:
    return {name: weights.read(name) for name, item in weights.architecture.parameters.items() if not item.tied_to}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_every_tensor_is_the_base_s_plus_the_method_s_delta_and_is_counted(tmp_path: Path, family: str) -> None:
    pair = make_pair(tmp_path, family)
    weights = made(pair, "bitdelta:embedding=16")
    values, nbytes = read_all(weights), 0
    for item in weights.plan.tensors:
        base = weights.base.read(item.base.parameter.name).float()
        expert = weights.expert.weights.read(item.name)
        if item.kind == "linear":
            torch.testing.assert_close(values[item.name], base + bitdelta(expert.float() - base).delta)
            nbytes += item.shape[0] * math.ceil(item.shape[1] / 8) + 2
        else:
            assert torch.equal(values[item.name], expert)
            nbytes += 2 * expert.numel()
    assert weights.nbytes == nbytes


@pytest.mark.parametrize(("activations", "rank"), [("none", 0), ("random", 0), ("random", 3), ("file", 0)])
def test_the_meswitch_method_is_what_compress_writes(
    pair: Pair, tmp_path: Path, calibration_file: Path, activations: str, rank: int
) -> None:
    """The same tensors and the same bytes as the artifact, so the frontier compares what is really stored."""
    data = read_calibration(calibration_file) if activations == "file" else None
    source = {"none": None, "random": RANDOM, "file": data.sha256 if data else None}[activations]
    settings = CompressionSettings(bits=2, salient=4, rank=rank, calibration=source, samples=32, sequence_length=512)
    job = prepare(str(pair[0]), str(pair[1]), tmp_path / "art", settings, data)
    compress(job)
    artifact = Artifact.open(tmp_path / "art")
    weights = made(
        pair,
        f"meswitch:bits=2,salient=4,rank={rank},factor_bits=8,activations={activations}",
        data.path if data else None,
    )
    ours = read_all(weights)
    theirs = read_all(ArtifactWeights(artifact, weights.base))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name].float(), value.float(), rtol=1e-5, atol=1e-6)
    assert weights.nbytes == sum(entry.nbytes for entry in artifact.manifest.tensors)


@pytest.mark.parametrize("masks", [1, 2])
def test_distilled_scales_bring_the_logits_closer_and_nothing_else_moves(
    pair: Pair, calibration_file: Path, masks: int
) -> None:
    weights = made(pair, "bitdelta", calibration_file)
    expert = build_model(weights.expert.weights, torch.device("cpu"), torch.float32)
    linears = {}
    for item in weights.plan.tensors:
        if item.kind == "linear":
            base = weights.base.read(item.base.parameter.name).float()
            delta = weights.expert.weights.read(item.name).float() - base
            linears[item.name] = (base, 2 * delta)  # scales twice too large, so that there is something to learn
    student = build_model(weights, torch.device("cpu"), torch.float32)
    tokens = torch.randint(5, 260, (4, 64), generator=torch.Generator().manual_seed(0))

    def distance() -> float:
        with torch.no_grad():
            return float((student(tokens).logits - expert(tokens).logits).square().mean())

    distil_scales(student, expert, linears, masks, tokens, ScaleTraining(0, length=32))
    before = distance()
    deltas = distil_scales(student, expert, linears, masks, tokens, ScaleTraining(40, 2e-2, length=32))
    assert distance() < 0.9 * before
    for name, (_, delta) in linears.items():
        first, both = bitdelta(delta).delta, bitdelta(delta, masks).delta
        parts = torch.stack([first, both - first][:masks]).flatten(1).T  # one factor a mask for the whole matrix
        factors = torch.linalg.lstsq(parts, deltas[name].reshape(-1, 1)).solution
        torch.testing.assert_close((parts @ factors)[:, 0], deltas[name].flatten(), rtol=1e-4, atol=1e-6)
        assert 0.3 < float(factors[0]) < 1.1
    torch.testing.assert_close(student.model.norm.weight, expert.model.norm.weight)


def test_distilled_method_keeps_the_bytes(pair: Pair, calibration_file: Path) -> None:
    plain, trained = made(pair, "bitdelta"), made(pair, "bitdelta:distill=2", calibration_file)
    before, after = read_all(plain), read_all(trained)
    assert plain.nbytes == trained.nbytes
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(before[name], after[name])
    assert torch.equal(before["model.norm.weight"], after["model.norm.weight"])


@pytest.mark.parametrize("spec", ["delta-come:bits=2", "d-qrelo:rank=1"])
def test_calibrated_rounding_keeps_the_bytes_and_moves_linears_alone(
    pair: Pair, calibration_file: Path, spec: str
) -> None:
    plain, calibrated = made(pair, spec), made(pair, f"{spec},rounding=gptq", calibration_file)
    before, after = read_all(plain), read_all(calibrated)
    assert plain.nbytes == calibrated.nbytes
    for item in plain.plan.tensors:
        assert torch.equal(before[item.name], after[item.name]) == (item.kind != "linear")
