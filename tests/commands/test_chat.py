"""The terminal side of `chat`: commands, Markdown as it comes, lines and their history. Answers: tests/server."""

from __future__ import annotations

import io
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import Terminal, unstyled

from meswitch_cli.client.client import Endpoint
from meswitch_cli.client.conversation import Conversation
from meswitch_cli.commands.chat_lines import history_file, line_reader
from meswitch_cli.commands.chat_markdown import MarkdownStream, PlainStream, split_blocks
from meswitch_cli.commands.chat_talk import HELP, Talk, _percent

NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def talk() -> Talk:
    return Talk(Conversation(Endpoint(NOBODY), "maths"), ["maths", "code", "base"], markdown=False)


def typed(talk: Talk, *lines: str | type[BaseException]) -> None:
    """Run it on these lines; an exception is one that reading a line ends with."""
    waiting = iter(lines)

    def read(prompt: str) -> str:
        assert prompt == f"{talk.conversation.model}> "
        line = next(waiting, EOFError)
        if isinstance(line, str):
            return line
        raise line

    talk.run(read)
    assert next(waiting, None) is None


def test_commands(talk: Talk, capsys: pytest.CaptureFixture[str]) -> None:
    talk.conversation.messages.append({"role": "user", "content": "x"})
    typed(talk, "/expert", "/expert law", "/expert code", "/model base", "", "/new", "/stats", "/nonsense", "/help")
    told = capsys.readouterr()
    assert told.out == "" and talk.conversation.model == "base" and talk.conversation.messages == []
    for words in (
        *("maths answers; there are maths, code, base", "there is no 'law'; there are maths, code, base"),
        *("0 answers, 0 tokens\n", "there is no /nonsense; /help names what there is", *HELP),
    ):
        assert words in told.err


@pytest.mark.parametrize("end", ["/exit", "/quit", EOFError])
def test_ends(talk: Talk, end: Any) -> None:
    typed(talk, end)


def test_a_key_that_interrupts_ends_nothing(talk: Talk, capsys: pytest.CaptureFixture[str]) -> None:
    typed(talk, KeyboardInterrupt, "/expert code", "/exit")
    assert talk.conversation.model == "code" and "Ctrl-D or /exit ends" in capsys.readouterr().err


def test_an_answer_that_fails_is_said_and_the_conversation_goes_on(
    talk: Talk, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(talk, "hello", "/stats")
    told = capsys.readouterr().err
    assert f"error: {NOBODY}" in told and "0 answers" in told and talk.conversation.messages == []


def test_blocks_end_at_empty_lines_outside_fences() -> None:
    assert split_blocks("one\ntwo") == ([], "one\ntwo")
    assert split_blocks("one\n\ntwo\n\nthr") == (["one\n\n", "two\n\n"], "thr")
    assert split_blocks("```python\na\n\nb") == ([], "```python\na\n\nb")
    assert split_blocks("```python\na\n\nb\n```\n\nend") == (["```python\na\n\nb\n```\n\n"], "end")
    assert split_blocks("````\n```\n\n````\n\n~~~\n```\n\n") == (["````\n```\n\n````\n\n"], "~~~\n```\n\n")


def test_markdown_comes_out_whole_however_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """What remains on the screen is the same for a text in one piece and in single characters."""
    text = "# Sum\n\nIt is **twelve**.\n\n1. first\n2. second\n\n```python\nx = 1\n\ny = 2\n```\n\nDone \x1b[31m`now`."
    monkeypatch.setenv("COLUMNS", "60")
    screens = []
    for pieces in ([text], list(text)):
        stream = io.StringIO()
        monkeypatch.setattr(sys, "stdout", stream)
        with MarkdownStream() as screen:
            for piece in pieces:
                screen.write(piece)
        screens.append(stream.getvalue())
    whole = unstyled(screens[0])
    assert screens[0] == screens[1]
    assert all(words in whole for words in ("It is twelve.", "1 first", "x = 1", "y = 2", "now"))
    assert "**" not in whole and "```" not in whole and "\x1b[31m" not in screens[0]


def test_an_answer_that_breaks_off_is_shown_as_far_as_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(KeyboardInterrupt), MarkdownStream() as screen:
        screen.write("half of *it")
        raise KeyboardInterrupt
    assert unstyled(stream.getvalue()).rstrip().endswith("half of *it")


def test_plain_text_is_as_it_comes(capsys: pytest.CaptureFixture[str]) -> None:
    with PlainStream() as screen:
        screen.write("**a")
        screen.write("**\n")
    assert capsys.readouterr().out == "**a**\n\n"


def test_piped_lines_are_read_without_a_prompt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo"))
    read = line_reader([], keep=True)
    assert [read("a> "), read("a> "), read("a> ")] == ["one\n", "\n", "two"]
    with pytest.raises(EOFError):
        read("a> ")
    assert capsys.readouterr().out == ""


def test_lines_are_edited_completed_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("prompt_toolkit")
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(sys, "stdout", Terminal())

    def lines(keys: str, count: int, *, keep: bool = True) -> list[str]:
        with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
            pipe.send_text(keys)
            read = line_reader(["/help", "/expert code"], keep=keep)
            return [read("> ") for _ in range(count)]

    assert lines("helo\x1b[Dl\r", 1) == ["hello"]  # left, then an l
    assert lines("\x1b[A\r", 1) == ["hello"]  # up: of the conversation before
    assert lines("one\x1b\rtwo\r", 1) == ["one\ntwo"]
    assert stat.S_IMODE(history_file().stat().st_mode) == 0o600
    before = history_file().read_text()
    assert lines("secret\r", 1, keep=False) == ["secret"] and history_file().read_text() == before
    with pytest.raises(EOFError):
        lines("\x04", 1)
    with pytest.raises(KeyboardInterrupt):
        lines("x\x03", 1)


def test_a_history_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("prompt_toolkit")
    from prompt_toolkit.history import InMemoryHistory

    from meswitch_cli.commands.chat_lines import _history

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert isinstance(_history(True), InMemoryHistory)


def test_markdown_keeps_the_answers_own_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    with MarkdownStream() as screen:
        screen.write("20+26=46\n46+48=94\n\n**Done**")
    assert [line.rstrip() for line in unstyled(stream.getvalue()).splitlines()] == ["20+26=46", "46+48=94", "", "Done"]


@pytest.mark.parametrize(
    ("share", "told"), [(1.0, "100 %"), (0.9999, "99.9 %"), (0.997, "99.7 %"), (0.914, "91 %"), (0.034, "3.4 %")]
)
def test_what_is_not_certain_is_not_called_so(share: float, told: str) -> None:
    assert _percent(share) == told
