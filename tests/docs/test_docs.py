import importlib.util
import re
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
