"""Event streams as the HTML standard allows them, cut into pieces anywhere."""

from __future__ import annotations

import random

import pytest

from meswitch_cli.client.events import Event, EventDecoder


def decoded(stream: bytes, sizes: list[int]) -> list[Event]:
    """The events of a stream that arrives in pieces of these sizes, and then the rest at once."""
    decoder, found = EventDecoder(), []
    for size in sizes:
        found += decoder.push(stream[:size])
        stream = stream[size:]
    return [*found, *decoder.push(stream)]


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        ("data: a\n\n", [("message", "a")]),
        ("data:a\n\n", [("message", "a")]),
        ("data:  a\n\n", [("message", " a")]),
        ("data: a\r\n\r\ndata: b\r\n\r\n", [("message", "a"), ("message", "b")]),
        ("data: a\r\rdata: b\r\r", [("message", "a"), ("message", "b")]),
        ("data: a\r\n\ndata: b\r\r\n", [("message", "a"), ("message", "b")]),
        ("data: a\ndata: b\ndata:\ndata\n\n", [("message", "a\nb\n\n")]),
        (": a comment\n\n:\ndata: a\n: another\n\n", [("message", "a")]),
        ("\ufeffdata: a\n\n", [("message", "a")]),
        ("\ufeff\ufeffdata: a\n\ndata: b\n\n", [("message", "b")]),  # the second is part of a name that means nothing
        ("event: error\ndata: a\n\ndata: b\n\n", [("error", "a"), ("message", "b")]),
        ("event: ping\n\ndata: b\n\n", [("message", "b")]),
        ("id: 3\nretry: 10\nother: x\nDATA: y\ndata: a\n\n", [("message", "a")]),
        ("data: a\n\ndata: unfinished\n", [("message", "a")]),
        ("\n\n\r\n", []),
        ("data: a\u2028b\u0085c\x0bd\x1ce\n\n", [("message", "a\u2028b\u0085c\x0bd\x1ce")]),
        ("data: 日本 🙂\n\n", [("message", "日本 🙂")]),
        ('data: {"a":\ndata: 1}\n\n', [("message", '{"a":\n1}')]),
    ],
)
def test_events(stream: str, expected: list[tuple[str, str]]) -> None:
    raw = stream.encode()
    events = [Event(*item) for item in expected]
    assert decoded(raw, []) == events
    assert decoded(raw, [1] * len(raw)) == events
    draw = random.Random(0)
    for _ in range(20):
        assert decoded(raw, [draw.randint(0, 4) for _ in range(len(raw))]) == events


def test_what_is_not_utf8_is_replaced() -> None:
    assert decoded(b"data: \xff!\n\n", []) == [Event("message", "\ufffd!")]


def test_an_event_is_there_with_its_empty_line_though_more_may_follow() -> None:
    decoder = EventDecoder()
    assert list(decoder.push(b"data: a\r\r")) == [Event("message", "a")]
    assert list(decoder.push(b"\n")) == []
    assert list(decoder.push(b"data: b\r\n\r")) == [Event("message", "b")]
    assert list(decoder.push(b"\ndata: c\n\n")) == [Event("message", "c")]
