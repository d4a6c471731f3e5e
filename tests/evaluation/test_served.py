"""Artifacts that are stored bit for bit: what an engine makes of them is measured beside what is stored."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import in_process
from compression.test_exact import sparse_pair

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.coding import ServedWeights
from meswitch_cli.artifact.weights import ArtifactWeights
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.commands.eval_tables import judgements
from meswitch_cli.compression.job import compress, prepare
from meswitch_cli.compression.settings import CompressionSettings
from meswitch_cli.evaluation.routing import routed_artifacts
from meswitch_cli.evaluation.subjects import Candidate
from meswitch_cli.model.weights import CheckpointWeights
from zoo.tiny import Pair, make_pair


@pytest.fixture(scope="module", params=["sparse", "added rows"])
def own_pair(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    if request.param == "sparse":
        return sparse_pair(folder)
    return make_pair(folder, added_rows=3, tie_word_embeddings=True)


def compressed(pair: Pair, out: Path, **options: object) -> Artifact:
    settings = CompressionSettings.with_defaults(**options)  # type: ignore[arg-type]
    compress(prepare(str(pair[0]), str(pair[1]), out, settings, None), keep_weak=True)
    return Artifact.open(out)


def test_what_is_served_is_what_the_same_code_stores(own_pair: Pair, tmp_path: Path) -> None:
    base = CheckpointWeights(Checkpoint.open(str(own_pair[0])))
    exact = compressed(own_pair, tmp_path / "exact", exact=True, bits=2, embedding_bits=2)
    code = {"bits": 2, "salient": 0, "steps": "unbiased", "factor_bits": 16, "calibration": None}
    code |= {"embedding_bits": 2, "embedding_rank": 0}
    served, coded = ServedWeights(exact, base), ArtifactWeights(compressed(own_pair, tmp_path / "code", **code), base)
    expert = CheckpointWeights(Checkpoint.open(str(own_pair[1])))
    differ = 0
    for name, item in served.architecture.parameters.items():
        if item.tied_to is None:
            found = served.read(name)
            assert torch.equal(found, coded.read(name).to(found.dtype)), name
            differ += not torch.equal(found.float(), expert.read(name).float())
    assert differ


def test_eval_measures_both(own_pair: Pair, tmp_path: Path) -> None:
    text = tmp_path / "sums.jsonl"
    text.write_text("\n".join(json.dumps({"prompt": f"what is {n}", "response": f"it is {n}"}) for n in range(4)))
    artifact = compressed(own_pair, tmp_path / "art", exact=True)
    told = ("--base", own_pair[0], "--expert", own_pair[1], "--artifact", artifact.path, "--text", f"expert={text}")
    done = in_process("eval", *told, "--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    stored, served = report["fidelity"]
    assert [(item["label"], item["served"]) for item in report["models"]] == [("art", False), ("art-served", True)]
    assert (stored["model"], served["model"]) == ("art", "art-served")
    assert stored["kl_mean"] < 1e-9 < 1e-7 < served["kl_mean"] and stored["nbytes"] == served["nbytes"]
    of_stored, of_served = judgements(report)
    assert of_stored.startswith("art is hardly") and of_served.startswith("art-served, as an engine codes it")
    limit = (stored["kl_mean"] + served["kl_mean"]) / 2  # which what is stored would keep
    missed = in_process("eval", *told, "--out", tmp_path / "limited", "--max-kld", limit)
    assert missed.returncode == 1 and "art-served on sums has" in missed.stderr


def test_a_router_chooses_among_what_is_served() -> None:
    weights: Any = None
    one, two = {"manifest_sha256": "1"}, {"manifest_sha256": "2"}
    candidates = [
        Candidate("rtn", "maths", "baseline", weights),
        Candidate("art", "maths", "artifact", weights, one),
        Candidate("art-served", "maths", "artifact", weights, one, served=True),
        Candidate("other", "maths", "artifact", weights, two),
        Candidate("other-served", "maths", "artifact", weights, two, served=True),
        Candidate("code", "code", "artifact", weights, {}),
    ]
    evaluation: Any = SimpleNamespace(candidates=candidates)
    found = {expert: item.label for expert, item in routed_artifacts(evaluation).items()}
    assert found == {"maths": "art-served", "code": "code"}
