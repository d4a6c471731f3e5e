import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

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
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_no_page_is_half_merged() -> None:
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        assert not re.search(r"^(<{7}|>{7}|={7}$)", page.read_text(), re.MULTILINE), page.name


def test_messages_of_the_troubleshooting_page_are_those_of_the_program() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r'^\| "([^"]+)"', page, re.MULTILINE)
    sources = [source.read_text() for source in (ROOT / "meswitch_cli").rglob("*.py")]
    assert len(messages) == 12
    for message in messages:
        assert any(message in source for source in sources), message
    for option in re.findall(r"`(--[a-z-]+)`", page):
        assert any(option in options.table(command) for command in COMMANDS), option


def pages(entry: object) -> Iterator[str]:
    """The files that a part of mkdocs.yml's `nav` names."""
    if isinstance(entry, str):
        yield entry
    elif isinstance(entry, list | dict):
        for part in entry.values() if isinstance(entry, dict) else entry:
            yield from pages(part)


def test_the_site_has_every_page_once() -> None:
    named = list(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    there = [str(page.relative_to(ROOT / "docs")) for page in ROOT.glob("docs/**/*.md")]
    assert sorted(named) == sorted(there)


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/**/*.md")), ids=lambda page: page.stem)
def test_commands_of_a_page_have_options_that_exist(page: Path) -> None:
    for block in re.findall(r"^```\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            words = line.split()
            if words[:1] == ["meswitch"] and len(words) > 1 and words[1] in COMMANDS:
                known = set(re.findall(r"--[a-z0-9-]+", options.table(words[1]))) | {"--help"}
                given = {word.split("=")[0] for word in words if word.startswith("--")}
                assert given <= known, f"{page.name}: {line}"
