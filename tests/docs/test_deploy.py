"""The files of docs/deploy say what the server does: its options, its metrics, its paths."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from meswitch_cli.app import build_app
from meswitch_cli.engine.contract import EngineStatistics
from meswitch_cli.server.metrics import LABELS, Metrics

DEPLOY = Path(__file__).parents[2] / "docs" / "deploy"


class IdleEngine:
    """An engine whose figures are zeros: names of metrics are wanted here, not values."""

    def statistics(self) -> EngineStatistics:
        return EngineStatistics(**dict.fromkeys(EngineStatistics.__dataclass_fields__, 0))

    def experts(self) -> list[Any]:
        return []


def serve_options() -> set[str]:
    command = get_command(build_app(["serve"])).commands["serve"]  # type: ignore[attr-defined]
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


def names_of_metrics() -> set[str]:
    metrics = Metrics(IdleEngine())  # type: ignore[arg-type]
    metrics.requests.labels("other", "200", *[""] * len(LABELS))
    for histogram in (metrics.first_token, metrics.inter_token, metrics.request, metrics.queue, metrics.router):
        histogram.labels(*[""] * len(LABELS))
    for counter in (metrics.prompt_tokens, metrics.completion_tokens):
        counter.labels(*[""] * len(LABELS))
    return set(re.findall(r"^(meswitch_\w+)", metrics.text().decode(), re.MULTILINE))


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.cuda", "meswitch.service", "kubernetes.yaml"])
def test_options_are_those_of_serve(name: str) -> None:
    text = (DEPLOY / name).read_text()
    if name == "kubernetes.yaml":
        found = re.findall(r"- (--[a-z-]+)=", text)
    elif name == "meswitch.service":
        found = re.findall(r"(--[a-z-]+) ", next(line for line in text.splitlines() if line.startswith("ExecStart")))
    else:
        found = re.findall(r'"(--[a-z-]+)"', text)
    assert found and set(found) <= serve_options()


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    known = names_of_metrics()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            asked = set(re.findall(r"meswitch_\w+", target["expr"]))
            assert asked and asked <= known, (panel["title"], asked - known)
    places = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)


def test_the_cluster_is_told_the_servers_paths_and_ports() -> None:
    deployment, service = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    probes = {kind: container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
    assert probes == {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}
    drain = next(int(word.partition("=")[2]) for word in container["args"] if word.startswith("--drain-seconds"))
    assert pod["spec"]["terminationGracePeriodSeconds"] > drain
    assert deployment["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"] == service["spec"]["selector"]
    assert container["ports"][0]["containerPort"] == int(pod["metadata"]["annotations"]["prometheus.io/port"]) == 8000
    (scraped,) = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())["scrape_configs"]
    assert scraped["static_configs"][0]["targets"] == ["127.0.0.1:8000"]


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(DEPLOY / "meswitch.service")
    drain = int(re.search(r"--drain-seconds (\d+)", unit["Service"]["ExecStart"])[1])  # type: ignore[index]
    assert int(unit["Service"]["TimeoutStopSec"]) > drain
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    # A program of that path is not on this machine; `true` stands for it.
    text = (DEPLOY / "meswitch.service").read_text().replace("/opt/meswitch/bin/meswitch", "/bin/true")
    own = tmp_path / "meswitch.service"
    own.write_text(text)
    result = subprocess.run(["systemd-analyze", "verify", "--man=no", str(own)], capture_output=True, text=True)
    complaints = [line for line in result.stderr.splitlines() if "meswitch.service" in line]
    assert not complaints, result.stderr
