"""What is written for given weights, byte for byte: an artifact that is made anew does not change.

Weights and deltas are small integers over a power of two, so that every sum is exact, whatever order a machine takes.
A low-rank part comes out of LAPACK: there the writer alone is held to its bytes, for given codes.
"""

import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.manifest import MANIFEST_FILE, FileEntry, Manifest, ModelReference
from meswitch_cli.artifact.shard import Shard, encode_shard
from meswitch_cli.delta.stored import StoredDelta, TensorEntry
from zoo.tiny import make_pair

UNIT = 2.0**-6


def integers(shape: tuple[int, ...], low: int, high: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=generator).float()


def integer_delta(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """-7 to 7, a few columns eight times as large."""
    delta = integers(shape, -7, 8, generator)
    if len(shape) == 2:
        delta[:, torch.randperm(shape[1], generator=generator)[:3]] *= 8
    return delta


def scaled_delta(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """±1, ±2 or ±4 by column, so many of each that the scales of the columns are 1/2, 1 and 2 exactly."""
    delta = 2 * integers(shape, 0, 2, generator) - 1
    if len(shape) == 2:
        sizes = torch.ones(shape[1]) * 2
        sizes[: shape[1] // 3], sizes[shape[1] // 3 : shape[1] // 2] = 1, 4
        delta *= sizes[torch.randperm(shape[1], generator=generator)]
    return delta


def integer_pair(folder: Path, delta_of: Callable[..., torch.Tensor], **options: Any) -> tuple[Path, Path]:
    """A tiny Llama and a fine-tune of it, in bf16; the expert leaves some tensors as they are."""
    base, expert = make_pair(folder, **options)
    generator = torch.Generator().manual_seed(1)
    given: dict[str, torch.Tensor] = {}
    for file in (base / "model.safetensors", expert / "model.safetensors"):
        tensors = safetensors.torch.load_file(file)
        for name in sorted(tensors):
            shape = tuple(tensors[name].shape)
            if name not in given:
                given[name] = integers(shape, -8, 9, generator)
                value = given[name]
            else:
                own = given[name]
                value = integers(shape, -8, 9, generator)
                value[: len(own)] = own
                if "layers.1.mlp.up" not in name and "layers.0.input" not in name:
                    value[: len(own)] += delta_of(tuple(own.shape), generator)
            tensors[name] = (value * UNIT).to(torch.bfloat16)
            assert torch.equal(tensors[name].float(), value * UNIT)
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    return base, expert


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def manifest_digest(text: str) -> str:
    """Without what depends on the version, the place or, in the last digits of an error, the machine."""
    value = json.loads(text)
    del value["created_with"], value["files"], value["base"]["id"], value["expert"]["id"]
    for entry in value["tensors"]:
        for name in ("delta_energy", "weight_error", "output_error"):
            entry[name] = entry[name] and float(f"{entry[name]:.4g}")
    return digest(json.dumps(value).encode())


#: By name: how the pair is made, how it is compressed.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bits 1": ({}, {"bits": 1, "salient": 3}),
    "bits 2": ({}, {"bits": 2, "salient": 3}),
    "bits 4": ({}, {"bits": 4, "salient": 3, "embedding_bits": 4}),
    "least squares": ({}, {"bits": 2, "salient": 3, "steps": "least-squares"}),
    "output-unbiased": ({}, {"bits": 1, "salient": 3, "steps": "output-unbiased", "embedding_bits": 1}),
    "groups": ({}, {"bits": 2, "salient": 3, "group_size": 32}),
    "groups of 1 bit": ({}, {"bits": 1, "salient": 0, "group_size": 64, "steps": "least-squares"}),
    "no salient": ({}, {"bits": 4, "salient": 0}),
    "tied, added rows": ({"tie_word_embeddings": True, "added_rows": 3}, {"bits": 2, "salient": 1}),
    "added rows": ({"added_rows": 5}, {"bits": 4, "salient": 2, "embedding_bits": 1, "group_size": 32}),
    "channel scale": ({"delta_of": scaled_delta}, {"bits": 1, "salient": 0, "channel_scale": "rms"}),
    "trellis": ({}, {"bits": 0.25, "salient": 3}),
    "trellis, four levels": ({"added_rows": 3}, {"bits": 1, "code": "trellis", "salient": 2, "steps": "least-squares"}),
    "channel scale, groups": (
        {"delta_of": scaled_delta},
        {"bits": 2, "salient": 0, "channel_scale": "rms", "group_size": 32, "steps": "least-squares"},
    ),
}
#: By case: the manifest, then the shards.
WRITTEN: dict[str, list[str]] = {
    "bits 1": ["65d883ce73d23f05", "8d76a30a6f36100b", "7fef78e73c830dcd", "e7d6bd46eb60442a"],
    "bits 2": ["a01b87e729569aa1", "64aea807ac604c55", "19b5e595fd233e08", "e7d6bd46eb60442a"],
    "bits 4": ["47a60b3856d96709", "57f429a5edcd2328", "cfbb7dcc2e9971ac", "fb45483c8afbd8c0"],
    "least squares": ["e170c259a0172906", "29b9d10faea504b9", "ff765fc181e28e4e", "63e97d4d9001795b"],
    "output-unbiased": ["5c6e1832db514215", "8d76a30a6f36100b", "7fef78e73c830dcd", "a4209d3016583a8e"],
    "groups": ["ab9ce25bf076fe66", "e55a450a62d9953e", "5eff372173920de8", "fb91ab823c1a3d63"],
    "groups of 1 bit": ["35d422ddc30b3028", "62709efb01c03586", "4fff8778b7132a96", "72a401ccc3a74c8f"],
    "no salient": ["1eff84b1cf5e21dc", "2101b3cb412e6d03", "fd122f8c30ba3ce3", "fa8ec6b51fe584b1"],
    "tied, added rows": ["5a0c8d8f9f3f7cda", "fbe116a2fbc1c42a", "aa6823d458931891", "9b0c2ffbd531ac99"],
    "added rows": ["7028516127fc2a01", "a641737a44a50552", "fae21c00b1374c14", "9c910581acbe4f0e"],
    "channel scale": ["e3241b11074fea8e", "d28790f9fb44430f", "39f62297c4bb09d2", "4bd58ba38b9db53d"],
    "trellis": ["1dced46a6e26d81e", "b7e4b2cd9f49a04e", "46c4e97a590e3ff9", "e7d6bd46eb60442a"],
    "trellis, four levels": ["4f550b3d4a30be57", "d7a0c17ab2217ebf", "51ff07dcebe28407", "1394b90edf01aeea"],
    "channel scale, groups": ["6a0b1b13fc1cf983", "df21faa291b7c430", "3453fb159ad5076b", "2cbe4729c023da9a"],
}


@pytest.mark.parametrize("case", CASES)
def test_compress_writes_the_same_bytes(case: str, make_artifact: Callable[..., Artifact], tmp_path: Path) -> None:
    options, settings = CASES[case]
    pair = integer_pair(tmp_path, **{"delta_of": integer_delta} | options)
    artifact = make_artifact(pair, max_shard_bytes=1, **settings)
    found = [manifest_digest((artifact.path / MANIFEST_FILE).read_text())]
    found += [digest((artifact.path / shard.name).read_bytes()) for shard in artifact.manifest.shards]
    assert found == WRITTEN[case]


ROWS, COLUMNS = 20, 72


def given_delta(
    bits: int, salient: int, group_size: int, channel_scale: bool, rank: int, generator: torch.Generator
) -> StoredDelta:
    """Any codes, steps and values."""

    def words(rows: int, width: int) -> torch.Tensor:
        return torch.randint(-(1 << 31), 1 << 31, (rows, -(-width // 32)), generator=generator).to(torch.int32)

    groups = -(-COLUMNS // group_size) if group_size else 1
    steps = integers((ROWS, groups), 1, 100, generator) * UNIT
    parts = {"codes": words(ROWS, COLUMNS * bits), "steps": steps.half() if group_size else steps}
    index = torch.randperm(COLUMNS, generator=generator)[:salient].sort().values.to(torch.int32)
    residual = (integers((ROWS, salient), -99, 100, generator) * UNIT).half()
    if salient:
        parts |= {"salient_index": index, "salient_value": residual}
    if channel_scale:
        parts["channel_scale"] = (integers((COLUMNS,), 1, 100, generator) * UNIT).half()
    for side, length in (("left", ROWS), ("right", COLUMNS)) if rank else ():
        parts[f"{side}_codes"] = words(rank, length * 4)
        parts[f"{side}_steps"] = integers((rank, 1), 1, 100, generator) * UNIT
    return StoredDelta(bits=bits, in_features=COLUMNS, group_size=group_size, **parts)


#: By rank: the manifest, then the shards of 1, 2 and 4 bits.
ENCODED: dict[int, list[str]] = {
    0: ["7a8568f18ccb6e20", "afeac70551864375", "5481c5981a99a59f", "5f2dd07c982bfdb9"],
    3: ["4f1e538d99ebeb2d", "e6243d68c48338a8", "e82640ea303d8306", "fac8301eddf75cd0"],
}


@pytest.mark.parametrize("rank", [0, 3])
def test_the_writer_writes_the_same_bytes(rank: int, tmp_path: Path) -> None:
    """Every combination of parts, and what was written is read."""
    generator = torch.Generator().manual_seed(2)
    shards: list[bytes] = []
    entries: list[TensorEntry] = []
    given: dict[str, StoredDelta] = {}
    for index, bits in enumerate((1, 2, 4)):
        shard = f"delta-{index + 1:05d}-of-00003.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        for salient, group_size, scale, added in itertools.product((0, 3), (0, 32), (False, True), (0, 2)):
            name = f"{bits}.{salient}.{group_size}.{scale}.{added}.weight"
            delta = given_delta(bits, salient, group_size, scale, rank, generator)
            if added:
                rows = integers((added, COLUMNS), -9, 10, generator).to(torch.bfloat16)
                delta = replace(delta, added_rows=rows)
            given[name] = delta
            entries.append(
                TensorEntry(
                    name=name,
                    kind="linear",
                    shape=(ROWS + added, COLUMNS),
                    base=name,
                    base_shape=(ROWS, COLUMNS),
                    layer=index,
                    shard=shard,
                    **delta.stored_as,
                    delta_energy=2.0,
                    weight_error=0.25,
                    output_error=None if scale else 0.5,
                )
            )
            tensors |= delta.named(name)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            name = f"{bits}.{dtype}.bias"
            given[name] = StoredDelta(value=integers((ROWS,), -9, 10, generator).to(dtype))
            entries.append(
                TensorEntry(
                    name=name,
                    kind="dense",
                    shape=(ROWS,),
                    base=name,
                    base_shape=(ROWS,),
                    shard=shard,
                    **given[name].stored_as,
                )
            )
            tensors |= given[name].named(name)
        shards.append(encode_shard(tensors))
    manifest = Manifest(
        base=ModelReference("base", None, f"sha256:{'0' * 64}"),
        expert=ModelReference("expert", "main", f"sha256:{'1' * 64}"),
        model_type="llama",
        num_layers=2,
        dtype="bfloat16",
        settings={"bits": 2},
        tensors=tuple(entries),
        unchanged=("norm.weight",),
        shards=tuple(
            FileEntry(f"delta-{index + 1:05d}-of-00003.safetensors", len(data), hashlib.sha256(data).hexdigest())
            for index, data in enumerate(shards)
        ),
        files=(),
        config_differences={"rope_theta": [1, 2]},
        created_with="meswitch",
    )
    assert [manifest_digest(manifest.to_json()), *map(digest, shards)] == ENCODED[rank]
    for file, data in zip(manifest.shards, shards, strict=True):
        (tmp_path / file.name).write_bytes(data)
        own = [entry for entry in entries if entry.shard == file.name]
        shard = Shard(tmp_path / file.name, own)
        at_once = shard.read_all()
        assert list(at_once) == list(shard.check_values()) == [entry.name for entry in own]
        for entry in own:
            for found in (shard.delta(entry.name), at_once[entry.name]):
                wanted = given[entry.name]
                assert found.tensors.keys() == wanted.tensors.keys()
                assert replace(found, **dict.fromkeys(found.tensors)) == replace(
                    wanted, **dict.fromkeys(wanted.tensors)
                )
                for part, tensor in wanted.tensors.items():
                    assert torch.equal(found.tensors[part], tensor)
