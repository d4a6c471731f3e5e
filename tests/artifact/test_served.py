"""The code that an artifact says is made of it at loading; it comes from outside."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from compression.test_exact import exactly

from meswitch_cli.artifact.served import CODED, DEFAULT, served_code, settings_of, slot_entries
from meswitch_cli.compression.settings import CompressionSettings
from meswitch_cli.errors import ArtifactError, UsageError
from zoo.tiny import make_pair


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("exact")
    return exactly(make_pair(folder / "pair"), folder / "artifact").manifest


def test_it_is_what_the_artifact_was_made_with(exact: Any) -> None:
    assert served_code(exact) == CompressionSettings.with_defaults(exact=True).by_kind()
    asked = CompressionSettings.with_defaults(exact=True, bits=4, rank=3, embedding_bits=1).by_kind()
    told = replace(exact, settings=dict(exact.settings) | settings_of(asked))
    assert served_code(told) == asked
    held = {entry.name: entry for entry in slot_entries(told) if entry.kind != "dense"}
    assert {(entry.bits, entry.rank, entry.exact) for entry in held.values() if entry.kind == "linear"} == {(4, 3, 0)}
    assert all(entry.problem() is None for entry in held.values())


def test_artifacts_that_do_not_say(exact: Any) -> None:
    assert served_code(replace(exact, settings={"exact": True})) == dict.fromkeys(CODED, DEFAULT)


@pytest.mark.parametrize(
    "told",
    [
        3,
        {},
        {"linear": {"bits": 2}},
        {kind: {"bits": 3} for kind in CODED},
        {kind: {"bits": "2"} for kind in CODED},
        {kind: {"bits": 2, "salient": True} for kind in CODED},
        {kind: {"bits": 2, "salient": -1} for kind in CODED},
        {kind: {"bits": 2, "width": 2} for kind in CODED},
        {kind: {"bits": 2, "rank": 4} for kind in CODED},
        {kind: {"bits": 2, "steps": "layerwise"} for kind in CODED},
    ],
    ids=repr,
)
def test_what_it_cannot_be(told: Any, exact: Any) -> None:
    with pytest.raises(ArtifactError, match="served"):
        slot_entries(replace(exact, settings={"exact": True, "served": told}))


@pytest.mark.parametrize("wrong", [{"steps": "layerwise"}, {"steps": "output-unbiased"}, {"calibration": "0" * 64}])
def test_no_calibration_makes_it(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--exact"):
        CompressionSettings.with_defaults(exact=True, **wrong)
