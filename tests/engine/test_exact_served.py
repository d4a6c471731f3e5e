"""Experts that are stored bit for bit, served: coded when they are loaded, beside others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from engine.family import EXPERTS, Family, coded_model, make_family, requests

from meswitch_cli.compression.job import compress, prepare
from meswitch_cli.compression.settings import CompressionSettings
from meswitch_cli.engine import TransformersEngine, generate


def test_tokens_are_those_of_the_code(tmp_path: Path, start: Callable[..., TransformersEngine]) -> None:
    """Two artifacts of one expert: with the code that they have by themselves, and with one that was asked for."""
    own = make_family(tmp_path, experts={"alpha": EXPERTS["alpha"]})
    full, artifacts, references = tmp_path / "alpha-full", dict(own.artifacts), dict(own.references)
    for name, code in (("exact", {}), ("finer", {"bits": 4, "rank": 0, "salient": 3, "group_size": 32})):
        artifacts[name] = tmp_path / name
        settings = CompressionSettings.with_defaults(exact=True, **code)
        compress(prepare(str(own.base), str(full), artifacts[name], settings, None))
        references[name] = coded_model(own.base, full, **code)
    own = Family(own.base, artifacts, own.dtype)
    vars(own)["references"] = references
    for slots in (1, 2):
        batch = requests(own, 9, seed=slots)
        for request, completion in zip(batch, generate(start(own, slots=slots), batch), strict=True):
            assert completion.error is None
            assert completion.tokens == own.greedy(request), request.expert
