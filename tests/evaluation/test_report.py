"""Figures of a row by hand, limits, and pages that hold what they are given and nothing else."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from meswitch_cli.evaluation.figures import (
    COLUMNS,
    QUANTITIES,
    TokenFigures,
    against_base,
    base_row,
    interval,
    model_row,
    plus_minus,
)
from meswitch_cli.evaluation.figures import FIGURES as ALL
from meswitch_cli.evaluation.html import page
from meswitch_cli.evaluation.job import judge
from meswitch_cli.evaluation.markdown import fidelity_table, markdown
from meswitch_cli.evaluation.plots import figures, flips
from meswitch_cli.evaluation.report import Report


def tokens(kl: list[float], loss: list[float], reference: list[float], agreed: list[float]) -> TokenFigures:
    columns = [torch.tensor(values, dtype=torch.float64) for values in (kl, loss, reference, agreed)]
    return dict(zip(QUANTITIES, [*columns, torch.full_like(columns[0], 0.1)], strict=True))


FIGURES = [
    tokens([0.1, 0.3], [2.0, 1.0], [1.9, 1.2], [1, 0]),
    tokens([0.2], [1.5], [1.4], [1]),
    tokens([0.0, 0.4, 0.2], [3.0, 1.0, 0.5], [2.8, 1.1, 0.5], [1, 1, 1]),
]
BASE = [
    tokens([1.0, 2.0], [3.0, 2.0], [1.9, 1.2], [0, 0]),
    tokens([1.5], [2.5], [1.4], [0]),
    tokens([1.0, 1.0, 1.0], [4.0, 2.0, 1.5], [2.8, 1.1, 0.5], [1, 0, 0]),
]


def test_a_row_is_what_its_words_say() -> None:
    row = model_row(FIGURES)
    assert (row["items"], row["tokens"]) == (3, 6)
    assert row["kl_mean"] == pytest.approx(1.2 / 6) and row["kl_max"] == 0.4
    assert row["kl_p99"] == pytest.approx(np.quantile([0.1, 0.3, 0.2, 0.0, 0.4, 0.2], 0.99))
    assert row["top1_agreement"] == pytest.approx(5 / 6) and row["rms_delta_p"] == pytest.approx(0.1)
    assert row["ln_ppl_ratio"] == pytest.approx(math.log(math.exp(9 / 6) / math.exp(8.9 / 6)))
    residuals = np.array([0.4, 0.2, 0.6]) - 0.2 * np.array([2, 1, 3])
    assert row["kl_mean_se"] == pytest.approx(math.sqrt(3 / 2 * np.square(residuals).sum()) / 6)


def test_gap_recovered_and_share() -> None:
    row = against_base(FIGURES, BASE)
    assert row["gap_recovered"] == pytest.approx((15 - 9.0) / (15 - 8.9))
    assert row["kl_share"] == pytest.approx(1.2 / 7.5)
    low, high = row["gap_recovered_low"], row["gap_recovered_high"]
    assert low is not None and high is not None and low <= row["gap_recovered"] <= high
    none = against_base(FIGURES, FIGURES)  # this "base" is hardly worse than the expert: there is no gap to recover
    assert none["gap_recovered"] is None and none["gap_recovered_low"] is None


def test_the_base_has_the_same_figures() -> None:
    row = base_row(BASE)
    assert row["base_kl_mean"] == pytest.approx(7.5 / 6) and row["base_kl_max"] == 2
    assert row["base_ln_ppl"] == pytest.approx(15 / 6) and row["base_ln_ppl_ratio"] == pytest.approx((15 - 8.9) / 6)
    assert row["base_top1_agreement"] == pytest.approx(1 / 6) and row["base_kl_mean_se"] > 0
    assert row["base_kl_p99"] == pytest.approx(np.quantile([1, 2, 1.5, 1, 1, 1], 0.99))
    assert not any("expert" in name or "items" in name for name in row)


def test_a_single_document_has_no_interval() -> None:
    row = model_row(FIGURES[:1]) | against_base(FIGURES[:1], BASE[:1])
    for name in ("kl_mean_se", "kl_mean_low", "kl_p99_high", "gap_recovered_low", "kl_share_high"):
        assert row[name] is None


def report(**changes: Any) -> Report:
    row = {"expert": "e", "model": "<b>m</b>", "kind": "artifact", "set": "s|et", "nbytes": 10}
    row |= model_row(FIGURES) | base_row(BASE) | against_base(FIGURES, BASE)
    machine = {"meswitch": "0", "python": "3", "packages": {"torch": "2"}, "device": "cpu", "device_name": "x"}
    machine |= {"dtype": "float32", "mode": "resident", "threads": 1}
    identity = {"id": "b", "revision": None, "fingerprint": "sha256:" + "0" * 64, "nbytes": 5, "parameters": 1}
    found = Report(
        0,
        {},
        machine,
        identity,
        [{"label": "e"} | identity],
        [{"label": "<b>m</b>", "expert": "e", "kind": "artifact"}],
    )
    found.sets = [
        {
            "name": "s|et",
            "expert": "e",
            "owner": None,
            "kind": "responses",
            "sha256": "0",
            "items": 3,
            "tokens": 6,
            "skipped": 1,
        }
    ]
    found.fidelity = [row]
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def test_pages_escape_what_comes_from_outside_and_load_nothing() -> None:
    flip = {"change": "lost", "task": "t", "model": "m", "against": "e", "document": 3}
    flip |= {"prompt": "<script>alert(1)</script>", "target": "4", "answer": "5", "expert_answer": "4"}
    value = report(flips=[flip], errors=[{"where": "x", "message": "<img src=http://evil>"}]).to_dict()
    text = page(value)
    assert "<script>" not in text and "&lt;script&gt;alert(1)&lt;/script&gt;" in text and "<img" not in text
    assert "&lt;b&gt;m&lt;/b&gt;" in text and "<b>m</b>" not in text.replace("&lt;", "")
    assert text.count("<svg") == 1 and "1 skipped as too long" in text and "INCOMPLETE" in text
    assert "s\\|et" not in markdown(value).split("\n")[4] and "Lost answers" in text


def test_all_three_models_have_every_figure_that_they_can_have() -> None:
    value = report().to_dict()
    header, lines = fidelity_table(value["fidelity"], 5_000_000)
    assert [line[0] for line in lines] == ["base", "full expert", "<b>m</b>"] and lines[1][1] == "5.0"
    for line in lines:
        assert len(line) == len(header) and all(line)
    assert lines[0][header.index("KL max")] == "2.0000" and "±" in lines[0][header.index("RMS Δp, %")]


def test_every_figure_is_a_member_and_has_the_column_that_it_says() -> None:
    row, base = model_row(FIGURES), base_row(BASE)
    assert [name for name in row if name in {figure.name for figure in ALL}] == [figure.name for figure in ALL]
    assert {f"base_{figure.name}" for figure in ALL if figure.of_base} <= base.keys()
    header, lines = fidelity_table(report().to_dict()["fidelity"])
    assert header == ["model", "MB", *(figure.title for figure in COLUMNS)]
    assert lines[1][2:] == [figure.full_expert for figure in COLUMNS]


def test_lost_and_gained_documents_are_drawn() -> None:
    row = {"role": "full expert", "model": "m", "task": "t", "documents": 90, "lost": 7, "gained": 2}
    svg = flips([row | {"verdict": "n too small"}, row | {"model": "k", "lost": 0, "verdict": "better"}])
    assert "−7 +2 of 90: n too small" in svg and "−0 +2 of 90: better" in svg and "k: t" in svg
    other = row | {"role": "base", "verdict": "worse"}
    captions = [caption for caption, _ in figures(report(comparisons=[other]).to_dict())]
    assert not any("lost" in caption for caption in captions)


def test_the_report_is_json_without_nan_and_is_replaced_whole(tmp_path: Path) -> None:
    found = report(gates=[{"value": float("nan")}])
    found.save(tmp_path)
    value = json.loads((tmp_path / "report.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert value["gates"] == [{"value": None}] and value["schema_version"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize(
    ("max_kld", "min_recovery", "passed"),
    [(0.21, None, True), (0.19, None, False), (None, 0.98, True), (None, 0.99, False), (0.21, 0.99, False)],
)
def test_limits(max_kld: float | None, min_recovery: float | None, passed: bool) -> None:
    evaluation = SimpleNamespace(
        report=report(), request=SimpleNamespace(max_kld=max_kld, min_recovery=min_recovery), candidates=[]
    )
    assert judge(evaluation) is passed  # type: ignore[arg-type]


def test_a_limit_that_cannot_be_checked_is_missed() -> None:
    found = report(sets=[], fidelity=[])
    evaluation = SimpleNamespace(report=found, request=SimpleNamespace(max_kld=1.0, min_recovery=None), candidates=[])
    assert judge(evaluation) is False  # type: ignore[arg-type]
    assert found.errors[0]["where"] == "--max-kld"
    unclear = report()
    unclear.fidelity[0]["gap_recovered"] = None
    evaluation = SimpleNamespace(report=unclear, request=SimpleNamespace(max_kld=None, min_recovery=0.5), candidates=[])
    assert judge(evaluation) is False  # type: ignore[arg-type]


def test_small_figures_keep_two_digits() -> None:
    """KLs of strong fine-tunes lie below what five decimals show."""
    strong = {"kl": 3.21e-8, "kl_low": 2.9e-8, "kl_high": 4.04e-8}
    assert interval(strong, "kl") == "0.000000032 [0.000000029, 0.000000040]"
    assert plus_minus({"kl": 6.7e-6, "kl_se": 1e-6}, "kl") == "0.0000067 ± 0.0000020"
    assert interval({"kl": 0.25}, "kl") == "0.25000" and interval({"kl": 0.0}, "kl") == "0.00000"
    assert interval({"kl": math.inf}, "kl") == "inf"
