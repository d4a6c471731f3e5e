"""Names, config entries and messages from outside are shown as they are, whatever Rich would make of them."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from command_line import Terminal
from typer.testing import CliRunner, Result

from meswitch_cli.app import build_app
from meswitch_cli.commands import report
from meswitch_cli.commands.bench import _table
from meswitch_cli.commands.console import console, progress_bar, table, working
from meswitch_cli.commands.router_tables import print_decision, print_edit, print_report
from meswitch_cli.plot_labels import plain_label
from meswitch_cli.router.decide.router import RouteDecision
from meswitch_cli.router.train.editing import Edit

COMMANDS = Path(__file__).parents[2] / "meswitch_cli" / "commands"
#: A style, an end without a beginning, an emoji, a link, an escaped bracket, a formula.
ODD = ("maths [final]", "m[bold]x", "m[/]", "a:smile:b", "[link=x]y[/link]", r"back\[slash]", "cost $5 $x_{$")


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "240")
    monkeypatch.setenv("NO_COLOR", "1")


def meswitch(*arguments: object) -> Result:
    words = [str(argument) for argument in arguments]
    return CliRunner().invoke(build_app(words), words, catch_exceptions=False)


def named(path: Path, to: Path, **config: Any) -> Path:
    """A link to a checkpoint's files from a folder of another name, with config entries of its own."""
    to.mkdir(parents=True)
    for file in path.iterdir():
        if file.name != "config.json":
            (to / file.name).symlink_to(file)
    (to / "config.json").write_text(json.dumps(json.loads((path / "config.json").read_text()) | config))
    return to


@pytest.mark.parametrize("name", ODD)
def test_an_expert_of_any_name_is_compressed_and_inspected(pair: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    expert = named(pair[1], tmp_path / name, stop_words=[name, "[/INST]"])
    out = tmp_path / "out[/x]"
    made = meswitch("compress", "--base", pair[0], "--expert", expert, "--out", out, "--salient", 4)
    assert made.exit_code == 0, made.output
    title = f"{expert.name} against base"
    assert made.stdout.count(title) == 1 and made.stderr.count(title) == 1 and f"expert  {expert}\n" in made.stderr
    assert f"config differs: stop_words: base None, expert {[name, '[/INST]']!r}" in made.stderr
    assert str(out) in made.stdout.splitlines()[-1]
    shown = meswitch("inspect", out, "--plot", tmp_path / "picture.svg")
    assert shown.exit_code == 0 and title in shown.stdout
    assert (tmp_path / "picture.svg").stat().st_size > 1000


def test_rows_of_every_table(capsys: pytest.CaptureFixture[str]) -> None:
    name = "".join(ODD)
    times = {"p50": 1.0, "p99": 2.0}
    row = {"requests": 2, "failed": 0, "tokens_per_second": 3.0, "ttft_ms": times, "itl_ms": times}
    console().print(_table(row | {"seconds": 1.0, "concurrency": 1, "experts": {name: row}}))
    probabilities = {name: 0.9, "x": 0.1}
    print_decision(RouteDecision(name, 0.9, probabilities, "routed", 1.0))
    measured = {"value": 0.5, "low": 0.4, "high": 0.6, "of": 10}
    edit: Any = {"manifest": None, "model": None, "store": None, "known": (), "added": None}
    recalls = {name: measured}
    print_edit(Edit(**edit, before=recalls, after=recalls, feature_seconds=0.1, refit_seconds=0.1))
    print_report({"test": {"confusion": {name: {name: 3}}}, "baselines": {name: {"failed": name}}})
    with progress_bar() as bar:
        bar.add_task(name)
    told = re.sub(r"\s*│?\n│?\s*", "", capsys.readouterr().out)
    assert told.count(name) >= 7


def test_no_other_console_is_made() -> None:
    for file in COMMANDS.glob("*.py"):
        if file.name != "console.py":
            assert not re.search(r"\b(Console|Table|Progress|TextColumn)\(", file.read_text()), file


@pytest.mark.parametrize("name", [*ODD, "_hidden", "$a$", "$$", "$"])
def test_labels_of_a_picture(name: str) -> None:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], label=plain_label(name))
    shown = axes.legend().get_texts()
    assert [text.get_text().replace(r"\$", "$").strip() for text in shown] == [name]
    FigureCanvasSVG(figure).draw()  # a formula that is none would raise


def test_an_error_beyond_the_delta_is_said_in_words(make_artifact: Any, pair: Any, capsys: Any) -> None:
    manifest = make_artifact(pair).manifest
    report.print_summary(manifest)
    assert "x delta" not in capsys.readouterr().out
    far = dataclasses.replace(
        manifest,
        tensors=tuple(
            dataclasses.replace(entry, weight_error=25.3) if entry.bits else entry for entry in manifest.tensors
        ),
    )
    report.print_summary(far)
    report.print_worst_layers(far)
    told = " ".join(capsys.readouterr().out.split())
    assert "25.3 x delta" in told and "2530" not in told
    assert "farther from the expert's weights than the base's" in told and "--bits 4" in told
    assert report.summary(far)["errors"]["q_proj"]["weight_error"] == pytest.approx(25.3)


@pytest.mark.parametrize(
    ("settings", "shown"),
    [({"bits": 0.25, "salient": 2}, "0.25 trellis"), ({"bits": 1, "code": "trellis"}, "1 trellis")],
)
def test_a_trellis_code_is_told_and_its_noise_is_no_warning(
    make_artifact: Any, pair: Any, capsys: Any, settings: dict[str, Any], shown: str
) -> None:
    manifest = make_artifact(pair, **settings).manifest
    assert max(entry.weight_error or 0.0 for entry in manifest.tensors) > (1 if manifest.settings["bits"] < 1 else 0.2)
    report.print_summary(manifest)
    said = " ".join(capsys.readouterr().out.split())
    assert shown in said and "beyond the delta" not in said


def test_work_is_told_in_a_line_and_moves_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, terminal = io.StringIO(), Terminal()
    for stream in (plain, terminal):
        monkeypatch.setattr("sys.stderr", stream)
        with working("loading ./base[x]"):
            pass
    assert plain.getvalue() == "loading ./base[x]\n"
    assert terminal.getvalue().startswith("loading ./base[x]\n") and "0:00:00" in terminal.getvalue()


def test_text_stands_left_in_a_table_and_figures_right(capsys: pytest.CaptureFixture[str]) -> None:
    shown = table("t", "expert", "similarity", "prompt", text=("prompt",))
    shown.add_row("a long name", "0.5", "hi")
    shown.add_row("a", "0.25", "a long prompt")
    console().print(shown)
    assert "│ a long name │        0.5 │ hi            │" in capsys.readouterr().out
