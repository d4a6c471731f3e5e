import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from meswitch_cli.app import COMMANDS

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("docs_options", Path(__file__).parent / "options.py")
assert _spec and _spec.loader
options = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(options)


@pytest.mark.parametrize("command", list(COMMANDS))
def test_option_tables_are_those_of_the_commands(command: str) -> None:
    page = (ROOT / "docs" / "commands" / f"{command}.md").read_text()
    assert options.table(command) in page, "run: python tests/docs/options.py"


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_commands_of_the_readme_run(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "base").symlink_to(pair[0])
    (tmp_path / "expert").symlink_to(pair[1])
    use = (ROOT / "README.md").read_text().split("## Use")[1].split("```")[1]
    lines = [line for line in use.strip().splitlines() if line.startswith("meswitch ")]
    assert [line.split()[1] for line in lines] == ["compress", "inspect", "verify", "restore"]
    for line in lines:
        done = subprocess.run(
            [sys.executable, "-m", "meswitch_cli", *line.split()[1:]],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert (tmp_path / "restored" / "model.safetensors").exists()
