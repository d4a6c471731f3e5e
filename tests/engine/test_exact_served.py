"""Experts that are stored bit for bit, served: coded when they are loaded, beside others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from engine.family import EXPERTS, Family, coded_model, make_family, requests

from meswitch_cli.compression.job import compress, prepare
from meswitch_cli.compression.settings import CompressionSettings
from meswitch_cli.engine import TransformersEngine, generate


def test_tokens_are_those_of_the_code(tmp_path: Path, start: Callable[..., TransformersEngine]) -> None:
    own = make_family(tmp_path, experts={"alpha": EXPERTS["alpha"]})
    settings = CompressionSettings.with_defaults(exact=True)
    artifact = tmp_path / "exact"
    compress(prepare(str(own.base), str(tmp_path / "alpha-full"), artifact, settings, None))
    references = own.references | {"exact": coded_model(own.base, tmp_path / "alpha-full")}
    own = Family(own.base, own.artifacts | {"exact": artifact}, own.dtype)
    vars(own)["references"] = references
    for slots in (1, 2):
        batch = requests(own, 9, seed=slots)
        for request, completion in zip(batch, generate(start(own, slots=slots), batch), strict=True):
            assert completion.error is None
            assert completion.tokens == own.greedy(request), request.expert
