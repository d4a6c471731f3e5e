"""`meswitch compress --size` and `--target-bits`: settings of every tensor that keep within so many bytes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.manifest import Manifest
from meswitch_cli.artifact.restore import restore
from meswitch_cli.calibration.data import read_calibration
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.compression import choice
from meswitch_cli.compression.job import compress, prepare
from meswitch_cli.compression.plan import Job
from meswitch_cli.compression.settings import CompressionSettings
from meswitch_cli.errors import ArtifactError, UsageError
from zoo.tiny import Pair, make_pair

SIZE = 60_000


def _job(pair: Pair, out: Path, **settings: Any) -> Job:
    return prepare(str(pair[0]), str(pair[1]), out, CompressionSettings.with_defaults(**settings), None)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _rates(manifest: Manifest) -> set[tuple[float, str, int, int]]:
    return {(entry.bits, entry.code, entry.rank, entry.salient) for entry in manifest.tensors if entry.bits}


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory, pair: Pair) -> Artifact:
    out = tmp_path_factory.mktemp("chosen") / "artifact"
    compress(_job(pair, out, size=SIZE))
    return Artifact.open(out)


def test_the_shards_fill_the_size_and_no_more(chosen: Artifact) -> None:
    on_disk = sum((chosen.path / shard.name).stat().st_size for shard in chosen.manifest.shards)
    assert 0.98 * SIZE <= on_disk <= SIZE


def test_tensors_have_settings_of_their_own_that_the_manifest_tells(chosen: Artifact) -> None:
    assert len(_rates(chosen.manifest)) > 3
    assert chosen.manifest.settings["size"] == SIZE
    assert not {"bits", "rank", "salient", "embedding_bits"} & set(chosen.manifest.settings)
    expected = chosen.manifest.settings["expected"]
    assert 0 < expected["least_kl"] <= expected["kl"] <= 1.1 * expected["least_kl"]
    assert sum(expected["by_projection"].values()) == pytest.approx(expected["kl"], rel=0.01)
    for _ in chosen.verify():
        pass


def test_the_expert_is_restored(chosen: Artifact, pair: Pair, tmp_path: Path) -> None:
    restore(chosen, Checkpoint.open(str(pair[0])), tmp_path / "restored")
    restored, expert, base = (Checkpoint.open(str(path)) for path in (tmp_path / "restored", pair[1], pair[0]))
    name = "model.layers.0.self_attn.v_proj.weight"
    own, wanted, old = (checkpoint.read(name).float() for checkpoint in (restored, expert, base))
    assert torch.nn.functional.cosine_similarity((own - old).flatten(), (wanted - old).flatten(), 0) > 0.3


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Of weights that are as many as a small model's."""
    width = {"hidden_size": 288, "intermediate_size": 320, "num_attention_heads": 4, "num_key_value_heads": 4}
    return make_pair(tmp_path_factory.mktemp("larger"), **width)


@pytest.mark.parametrize("size", [150_000, 250_000, 400_000])
def test_what_is_not_measured_would_not_be_chosen(
    larger: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    measured: dict[str, list[int]] = {}
    costs = choice._costs_of

    def counted(job: Job, item: Any, *rest: Any) -> Any:
        found = costs(job, item, *rest)
        if item.kind == "linear" and found:
            measured.setdefault(item.name, []).append(sum(cost is not None for cost in found))
        return found

    monkeypatch.setattr(choice, "_costs_of", counted)
    for out, margin in (("some", choice.MARGIN), ("every", 1e9)):
        monkeypatch.setattr(choice, "MARGIN", margin)
        compress(_job(larger, tmp_path / out, size=size))
    assert _bytes(tmp_path / "some") == _bytes(tmp_path / "every")
    assert all(2 * some < every for some, every in measured.values())


@pytest.mark.parametrize("threads", [1, 2])
def test_a_further_run_gives_the_same_bytes(chosen: Artifact, pair: Pair, tmp_path: Path, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compress(_job(pair, tmp_path / "again", size=SIZE))
    finally:
        torch.set_num_threads(before)
    assert _bytes(tmp_path / "again") == _bytes(chosen.path)


class _Stop(Exception):
    """Ends a run from its progress callback."""


@pytest.mark.parametrize(("what", "after"), [("measure", 2), ("compress", 1)])
def test_an_interrupted_run_goes_on(chosen: Artifact, pair: Pair, tmp_path: Path, what: str, after: int) -> None:
    def stop(doing: str, _nbytes: int, units: int) -> None:
        if doing == what and units >= after:
            raise _Stop

    with pytest.raises(_Stop):
        compress(_job(pair, tmp_path / "cut", size=SIZE), on_progress=stop)
    kept = tmp_path / ".cut.partial"
    assert len(list(kept.glob("measured-*.json"))) >= after
    assert (kept / "choice.json").exists() == (what == "compress")
    doing: list[str] = []
    compress(_job(pair, tmp_path / "cut", size=SIZE), on_progress=lambda name, *_: doing.append(name))
    assert ("measure" in doing) == (what == "measure")
    assert _bytes(tmp_path / "cut") == _bytes(chosen.path)


def test_another_size_is_another_work(pair: Pair, tmp_path: Path) -> None:
    def stop(doing: str, *_: Any) -> None:
        if doing == "compress":
            raise _Stop

    with pytest.raises(_Stop):
        compress(_job(pair, tmp_path / "a", size=SIZE), on_progress=stop)
    with pytest.raises(ArtifactError, match=r"size: 60000 -> 70000.*--force"):
        compress(_job(pair, tmp_path / "a", size=70_000))


def test_more_bytes_are_expected_to_cost_less_and_do(chosen: Artifact, pair: Pair, tmp_path: Path) -> None:
    more = compress(_job(pair, tmp_path / "more", size=2 * SIZE))
    assert SIZE < more.nbytes <= 2 * SIZE
    assert more.settings["expected"]["kl"] < 0.9 * chosen.manifest.settings["expected"]["kl"]

    def error(manifest: Manifest) -> float:
        return sum((entry.weight_error or 0.0) * (entry.delta_energy or 0.0) for entry in manifest.tensors)

    assert error(more) < error(chosen.manifest)


def test_target_bits_are_of_the_whole_model(pair: Pair, tmp_path: Path) -> None:
    job = _job(pair, tmp_path / "a", target_bits=2)
    weights = sum(tensor.numel() for tensor in (item.expert.read(job.expert) for item in job.plan.tensors))
    manifest = compress(job)
    assert 1.95 <= 8 * manifest.nbytes / weights <= 2


def test_calibration_data_may_say_what_matters(pair: Pair, tmp_path: Path, calibration_file: Path) -> None:
    data = read_calibration(calibration_file)
    settings = CompressionSettings.with_defaults(size=SIZE, calibration=data.sha256, samples=4, sequence_length=32)
    manifest = compress(prepare(str(pair[0]), str(pair[1]), tmp_path / "a", settings, data))
    assert 0.98 * SIZE <= manifest.nbytes <= SIZE


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("qwen2", {"tie_word_embeddings": True, "added_rows": 3}),
        ("gemma2", {"relative_delta": 0.1}),
        ("llama", {"equal": ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"]}),
    ],
)
def test_tied_added_and_equal_tensors(tmp_path: Path, family: str, config: dict[str, Any]) -> None:
    pair = make_pair(tmp_path, family, **config)
    manifest = compress(_job(pair, tmp_path / "a", size=SIZE))
    assert 0.98 * SIZE <= manifest.nbytes <= SIZE
    assert set(config.get("equal", ())) <= set(manifest.unchanged)
    for _ in Artifact.open(tmp_path / "a").verify():
        pass


def test_too_few_bytes_are_refused_and_nothing_stays(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--size: 5,000 bytes are too few: the smallest settings take [\d,]+ \("):
        compress(_job(pair, tmp_path / "a", size=5000))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 1000, "target_bits": 0.3}, "exclude each other"),
        ({"size": 0}, "--size must be more than 0"),
        ({"target_bits": -0.5}, "--target-bits must be more than 0, not -0.5"),
        ({"size": 1000, "bits": 2}, "--bits: a size or target bits choose that"),
        ({"target_bits": 0.3, "embedding_bits": 2}, "--embedding-bits: a size"),
        ({"size": 1000, "calibration": None}, "--calibration none"),
        ({"size": 1000, "group_size": 64}, "no --group-size"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CompressionSettings.with_defaults(**settings)
