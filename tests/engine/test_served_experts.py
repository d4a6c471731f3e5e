"""Experts come and go under their names; what is damaged, or of another base, is not served."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from engine.family import Family, copy_artifact, requests
from engine.traffic import Start, Traffic, assert_idle, one

from meswitch_cli.artifact.manifest import MANIFEST_FILE
from meswitch_cli.engine import generate
from meswitch_cli.engine.contract import (
    BASE,
    EngineError,
    UnknownExpertError,
)
from meswitch_cli.errors import ArtifactError


def test_load_and_unload_under_traffic(family: Family, start: Start, tmp_path: Path) -> None:
    """The new experts need wider codes, more channels and rows than the slots had, and a rank."""
    engine = start(family, experts={"alpha": family.artifacts["alpha"]}, slots=2)
    traffic = Traffic(engine)
    for index in range(10):
        traffic.submit(one("alpha", index, tokens=30))
    engine.load_expert("new/gamma", family.artifacts["gamma"])
    engine.load_expert("beta", family.artifacts["beta"])
    batch = [request for request in requests(family, 12, seed=3) if request.expert in ("beta", BASE)]
    for request, completion in zip(batch, generate(engine, batch), strict=True):
        assert completion.tokens == family.greedy(request)
    generate(engine, [one("new/gamma")])
    with pytest.raises(EngineError, match="served already"):
        engine.load_expert("beta", family.artifacts["alpha"])
    engine.unload_expert("beta")
    with pytest.raises(UnknownExpertError):
        traffic.submit(one("beta"))
    # The name comes back with other weights: nothing of the old ones' cache is found.
    engine.load_expert("beta", family.artifacts["alpha"])
    (completion,) = generate(engine, [one("beta", "again")])
    assert completion.tokens == family.greedy(one("alpha"))
    assert {item.tokens for item in traffic.wait().values()} == {family.greedy(one("alpha", tokens=30))}
    with pytest.raises(EngineError, match="base"):
        engine.unload_expert(BASE)
    assert_idle(engine)


def test_no_room_for_wider_slots_leaves_everything_as_it_was(
    family: Family, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(family, experts={"alpha": family.artifacts["alpha"]}, slots=2)

    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("meswitch_cli.engine.loader.Banks", full)
        with pytest.raises(EngineError, match="no room for wider slots"):
            engine.load_expert("beta", family.artifacts["beta"])
    assert not engine.serves("beta")
    (completion,) = generate(engine, [one("alpha")])
    assert completion.tokens == family.greedy(one("alpha"))
    engine.load_expert("beta", family.artifacts["beta"])
    (completion,) = generate(engine, [one("beta")])
    assert completion.tokens == family.greedy(one("beta"))


def test_unloading_waits_for_what_runs(family: Family, start: Start) -> None:
    engine = start(family)
    traffic = Traffic(engine)
    for index in range(6):
        traffic.submit(one("alpha", index, tokens=30))
    engine.unload_expert("alpha")
    assert all(len(completion.tokens) == 30 for completion in traffic.wait().values())
    assert "alpha" not in {status.name for status in engine.experts()}
    assert [engine.serves(name) for name in ("alpha", "beta", BASE)] == [False, True, True]


def test_an_expert_is_known_by_its_name_and_digest(family: Family, start: Start) -> None:
    engine = start(family)
    assert [engine.serves(name) for name in ("alpha", BASE, "nobody")] == [True, True, False]
    manifest = (family.artifacts["alpha"] / MANIFEST_FILE).read_bytes()
    assert engine.digest("alpha") == hashlib.sha256(manifest).hexdigest()
    assert engine.digest(BASE) == ""
    with pytest.raises(UnknownExpertError):
        engine.digest("nobody")


def test_same_name_other_artifact_shares_no_prefix(family: Family, start: Start) -> None:
    engine = start(family, experts={"x": family.artifacts["alpha"]})
    generate(engine, [one("x", 0)])
    engine.unload_expert("x")
    engine.load_expert("x", family.artifacts["beta"])
    (completion,) = generate(engine, [one("x", 1)])
    assert completion.cached_tokens == 0
    assert completion.tokens == family.greedy(one("beta"))


def damage(artifact: Path) -> Path:
    shard = sorted(artifact.glob("delta-*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-20] ^= 1
    shard.write_bytes(data)
    return artifact


def test_corrupt_artifact_at_start_and_at_load(family: Family, start: Start, tmp_path: Path) -> None:
    broken = damage(copy_artifact(family.artifacts["beta"], tmp_path / "broken"))
    engine = start(family, experts={"alpha": family.artifacts["alpha"], "beta": broken})
    assert set(engine.failed) == {"beta"} and "SHA-256" in engine.failed["beta"]
    with pytest.raises(ArtifactError, match="SHA-256"):
        engine.load_expert("beta", broken)
    with pytest.raises(ArtifactError, match="not an artifact"):
        engine.load_expert("beta", tmp_path)
    (completion,) = generate(engine, [one("alpha")])
    assert completion.tokens == family.greedy(one("alpha"))
    with pytest.raises(UnknownExpertError):
        engine.submit(one("beta"), lambda chunk: None)


def test_no_expert_left_stops_the_start(family: Family, start: Start, tmp_path: Path) -> None:
    broken = damage(copy_artifact(family.artifacts["beta"], tmp_path / "broken"))
    with pytest.raises(EngineError, match="no expert can be served"):
        start(family, experts={"beta": broken})
    with pytest.raises(ArtifactError):
        start(family, experts={"alpha": family.artifacts["alpha"], "beta": broken}, strict=True)


def test_artifact_lost_after_the_start_fails_its_requests_alone(family: Family, start: Start, tmp_path: Path) -> None:
    gone = copy_artifact(family.artifacts["beta"], tmp_path / "gone")
    engine = start(family, experts={"alpha": family.artifacts["alpha"], "beta": gone}, slots=1)
    for shard in gone.glob("delta-*"):
        shard.unlink()
    lost, kept = generate(engine, [one("beta"), one("alpha")])
    assert lost.finish_reason == "error" and "delta-" in (lost.error or "")
    assert kept.tokens == family.greedy(one("alpha"))
    assert_idle(engine)


def test_another_base_is_refused(family: Family, start: Start, tmp_path: Path) -> None:
    from zoo.tiny import make_pair

    other, _ = make_pair(tmp_path, "llama", seed=5)
    with pytest.raises(EngineError, match="wrong base"):
        start(Family(other, family.artifacts, {}))
