"""The page of compressed fine-tunes, from figures made by hand; its rows are methods that there are."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.compression_report import COLUMNS, overview, page, table
from benchmarks.compression_rows import (
    BASE,
    BY_ITSELF,
    BY_SIZE,
    CODER_ROWS,
    DEFAULTS,
    EXPERT,
    KIND_ROWS,
    PRODUCTS,
    ROWS,
)
from meswitch_cli.compression.settings import CompressionSettings
from meswitch_cli.evaluation.baselines import parse_method
from zoo.finetunes import KINDS
from zoo.group import group_at

OURS = next(iter(DEFAULTS))


def row(kl: float, right: list[int], answers: str, nbytes: int = 2_000_000) -> dict[str, Any]:
    sums = {"tokens": [2, 8], "kl": [kl, 4 * kl], "loss": [1.0, 4.0]}
    return {"nbytes": nbytes, "sums": sums, "right": [float(part) for part in right], "answers": list(answers)}


MEASURED = {
    OURS: row(0.002, [1, 1, 0, 0], "abxe"),
    EXPERT: row(0.0, [1, 1, 1, 0], "abcd"),
    BASE: row(2.0, [0, 0, 0, 0], "----", 0),
}


def test_a_row_by_hand() -> None:
    lines = {line[0]: dict(zip(COLUMNS, line, strict=True)) for line in table(MEASURED)}
    assert list(lines) == [BASE, EXPERT, DEFAULTS[OURS]]
    ours = lines[DEFAULTS[OURS]]
    assert ours["KL, nats"] == "0.001" and ours["KL / base's, %"] == "0.1" and ours["MB"] == "2.0"
    assert (ours["right"], ours["same answer, %"], ours["lost, gained"]) == ("2 of 4", "50.0", "−1 +0")
    assert ours["difference, points"].startswith("-25.0 [") and ours["loss"] == "0.5000"
    assert lines[EXPERT]["same answer, %"] == "100.0" and lines[BASE]["lost, gained"] == "−3 +0"


def test_an_overview_by_hand() -> None:
    rival = {"delta-come:bits=1.2": row(0.4, [1, 1, 1, 0], "abcd", 1_000_000)}
    head, _, alone, ours, theirs = overview({"code": MEASURED, "logic": MEASURED | rival}).splitlines()
    assert head == "| KL, % of the base's; same answer, % | MB | code | logic |"
    assert alone == "| `compress`, no options | 2.0 | 0.10; 50.0 | 0.10; 50.0 |"
    assert ours == f"| {DEFAULTS[OURS]} | 2.0 | 0.10; 50.0 | 0.10; 50.0 |"
    assert theirs == "| Delta-CoMe, 1.2 bits | 1.0 |  | 20; 100.0 |"


def test_an_overview_knows_other_forms() -> None:
    """Of a fine-tune that is not stored in the default code, that code is not shown as what compress does."""
    alone = {next(iter(PRODUCTS)): row(0.2, [1, 1, 1, 0], "abcd", 500_000)}
    lines = overview({"lora16": MEASURED | alone, "reinforced": MEASURED, "code": MEASURED}).splitlines()
    assert lines[2] == "| `compress`, no options | 0.5 to 2.0 | 10; 100.0 |  | 0.10; 50.0 |"
    artifact = {BY_ITSELF: row(0.02, [1, 1, 1, 0], "abcd", 600_000)}
    lines = overview({"lora16": MEASURED | alone | artifact, "reinforced": MEASURED | artifact}).splitlines()
    assert lines[2] == "| `compress`, no options | 0.6 | 1.0; 100.0 | 1.0; 100.0 |"


def test_the_page_has_what_was_measured(tmp_path: Path) -> None:
    stored = {"key": {"items": 2, "answers": 4}, "machine": "a machine", "rows": MEASURED}
    (tmp_path / "code.json").write_text(json.dumps(stored))
    (tmp_path / "lora16.json").write_text(json.dumps(stored | {"rows": {BASE: MEASURED[BASE]}}))
    figures = group_at("kinds", tmp_path).figures_file("lora16")
    figures.parent.mkdir(parents=True)
    delta = {"relative_delta": 0.0123, "unchanged": 0.25, "leading_energy": 0.5}
    figures.write_text(json.dumps({"recipe": asdict(KINDS["lora16"]), "delta": delta}))
    text = page(tmp_path, tmp_path)
    measured = text[text.index("## strong: code") : text.index("## Weaker fine-tunes")]
    assert "## strong: code" in text and "## kinds: lora16\n\nSkill queries, method lora" in text
    assert (
        "1.2 % of the weights' norm, 25 % of the weights" in text
        and text.count("\n| base |") == 2
        and measured.count(f"| {DEFAULTS[OURS]} |") == 1
        and "a machine" in text
    )
    widths = {line.count("|") for line in measured.splitlines() if line.startswith("|")}
    assert widths == {len(COLUMNS) + 1}


def test_rows_are_methods_and_the_defaults_are_compress_s() -> None:
    assert len(set(ROWS)) == len(ROWS) and set(DEFAULTS) < set(KIND_ROWS) < set(ROWS) > set(CODER_ROWS)
    methods = {name: parse_method(name) for name in ROWS if name not in (BASE, EXPERT, BY_ITSELF, *BY_SIZE)}
    for bits, name in zip((1, 2, 4), DEFAULTS, strict=True):
        settings = CompressionSettings.with_defaults(bits=bits)
        options, quantizer = methods[name].options, settings.of("linear", unrelated=False)
        assert quantizer is not None
        assert (options["bits"], options["salient"], options["rank"]) == (bits, quantizer.salient, quantizer.rank)
        assert options["factor_bits"] == quantizer.factor_bits
        assert (options["channel_scale"], options["steps"]) == (quantizer.channel_scale, quantizer.steps)
        embedding = settings.of("embedding", unrelated=False)
        assert embedding is not None and options["embedding"] == embedding.bits
        assert options["embedding_rank"] == embedding.rank
    for name in PRODUCTS:
        rank, factor_bits = methods[name].options["rank"], methods[name].options["factor_bits"]
        alone = CompressionSettings.with_defaults(bits=0, rank=rank, factor_bits=factor_bits)
        assert methods[name].quantizer() == alone.linears()
