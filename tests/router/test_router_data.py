import json
from pathlib import Path

import pytest

from meswitch_cli.errors import RouterError
from meswitch_cli.router.decide.conversation import HISTORY_CHARACTERS, clip_characters, clip_tokens, routing_text
from meswitch_cli.router.decide.labels import check_fallback
from meswitch_cli.router.train.data import (
    Example,
    gather,
    only_known_domains,
    read_examples,
    thinned,
    without_duplicates,
)
from meswitch_cli.router.train.split import PARTS, part_hash, split


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_reads_prompts_messages_and_null(tmp_path: Path) -> None:
    path = write(
        tmp_path / "data.jsonl",
        {"prompt": "two plus two", "domain": "maths", "group": 7, "response": "four"},
        "",
        {"messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}], "domain": None},
    )
    first, second = read_examples(path)
    assert (first.text, first.domain, first.group, first.response) == ("two plus two", "maths", "7", "four")
    assert (second.text, second.domain, second.where) == ("hi", None, f"{path}: line 3")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ("[1]", "not an object"),
        ({"domain": "maths"}, 'needs "prompt", "messages" or "text"'),
        ({"prompt": "x"}, 'has no "domain"'),
        ({"prompt": "  ", "domain": "maths"}, "the prompt is empty"),
        ({"messages": [{"role": "system", "content": "x"}], "domain": "maths"}, "the prompt is empty"),
        ({"prompt": "a\u0000b", "domain": "maths"}, "binary data"),
        ({"prompt": "\ufffd" * 9 + "text", "domain": "maths"}, "binary data"),
        ('{"prompt": "\\ud800", "domain": "maths"}', "binary data"),
        ({"prompt": "x", "domain": 3}, "must be a name or null"),
        ({"prompt": "x", "domain": "base"}, "cannot be an expert's name"),
        ({"prompt": "x", "domain": "../etc"}, "cannot be an expert's name"),
        ({"messages": [{"role": "wizard"}], "domain": "maths"}, '"messages" must be'),
    ],
)
def test_refuses_a_bad_line_by_its_number(tmp_path: Path, line: object, said: str) -> None:
    path = write(tmp_path / "data.jsonl", {"prompt": "fine", "domain": "maths"}, line)
    with pytest.raises(RouterError, match="line 2") as caught:
        read_examples(path)
    assert said in str(caught.value)


def test_refuses_files_that_are_no_data(tmp_path: Path) -> None:
    with pytest.raises(RouterError, match="no line with data"):
        read_examples(write(tmp_path / "empty.jsonl", ""))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "ok", "domain": "a"}\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(RouterError, match="line 2: not UTF-8"):
        read_examples(tmp_path / "latin.jsonl")
    with pytest.raises(RouterError, match="No such file"):
        read_examples(tmp_path / "nothing.jsonl")


def test_a_file_given_for_one_expert_has_no_other_domain(tmp_path: Path) -> None:
    path = write(tmp_path / "maths.jsonl", {"prompt": "x"}, {"prompt": "y", "domain": "code"})
    with pytest.raises(RouterError, match="unknown domain 'code'"):
        read_examples(path, domain="maths")


def make(domain: str | None, count: int, group: str | None = None) -> list[Example]:
    return [Example(f"{domain} prompt {index}", domain, f"line {index}", group) for index in range(count)]


def test_duplicates_are_dropped_and_contradictions_refused() -> None:
    twice = [Example("Two  plus two", "maths", "a:1"), Example("two plus TWO", "maths", "a:2")]
    assert without_duplicates(twice) == ([twice[0]], 1)
    with pytest.raises(RouterError, match=r"b:9: the same prompt is 'code' here and 'maths' at a:1"):
        without_duplicates([*twice, Example("two plus two", "code", "b:9")])
    with pytest.raises(RouterError, match="is None here and 'maths'"):
        without_duplicates([*twice, Example("two plus two", None, "b:9")])


def test_one_domain_and_too_few_prompts_are_refused() -> None:
    with pytest.raises(RouterError, match="at least two domains; the data has 'maths'"):
        gather([*make("maths", 30), *make(None, 30)])
    with pytest.raises(RouterError, match="domain 'code' has 4 different prompts; at least 5"):
        gather([*make("maths", 30), *make("code", 4)])
    with pytest.raises(RouterError, match="unknown domain 'law'; this router knows code, maths"):
        only_known_domains(make("law", 1), ("code", "maths"))
    with pytest.raises(RouterError, match="fallback 'law' is not one of base, code, maths"):
        check_fallback("law", ("code", "maths"))


def test_split_is_stratified_disjoint_and_the_same_twice() -> None:
    data = gather([*make("maths", 100), *make("code", 40), *make(None, 20)])
    parts = split(data.examples, seed=3)
    assert parts == split(data.examples, seed=3)
    assert part_hash(parts["test"]) == part_hash(list(reversed(parts["test"])))
    assert part_hash(parts["test"]) != part_hash(split(data.examples, seed=4)["test"])
    assert sum(map(len, parts.values())) == 160
    assert len({item.text for members in parts.values() for item in members}) == 160
    for part, share in zip(PARTS, (0.55, 0.15, 0.15, 0.15), strict=True):
        for domain, count in (("maths", 100), ("code", 40)):
            assert abs(sum(item.domain == domain for item in parts[part]) - share * count) <= 1
    assert [sum(item.domain is None for item in parts[part]) for part in PARTS] == [8, 0, 6, 6]


def test_of_few_prompts_nearly_all_are_for_the_head() -> None:
    parts = split(gather([*make("maths", 5), *make("code", 40)]).examples, seed=0)
    assert [sum(item.domain == "maths" for item in parts[part]) for part in PARTS] == [4, 0, 0, 1]
    assert [sum(item.domain == "code" for item in parts[part]) for part in PARTS] == [22, 6, 6, 6]


def test_many_prompts_are_thinned_evenly_over_their_groups() -> None:
    large = [Example(f"maths {group} {index}", "maths", "", f"g{group}") for group in range(4) for index in range(50)]
    data = gather([*large, *make("code", 30)])
    thin, counts = thinned(data, 40, seed=1)
    assert counts == {"maths": 200}
    assert [sum(item.group == f"g{group}" for item in thin.examples) for group in range(4)] == [10] * 4
    assert sum(item.domain == "code" for item in thin.examples) == 30
    assert thinned(data, 40, seed=1)[0] == thin and thinned(data, 40, seed=2)[0] != thin
    assert thinned(data, 500, seed=1) == (data, {})


def test_groups_stay_whole() -> None:
    grouped = [
        Example(f"{domain} {group} {index}", domain, "", f"group {group}")
        for domain in ("maths", "code")
        for group in range(12)
        for index in range(3)
    ]
    parts = split(gather(grouped).examples, seed=0)
    groups = [{(item.domain, item.group) for item in parts[part]} for part in PARTS]
    assert all(not groups[a] & groups[b] for a in range(4) for b in range(a))
    with pytest.raises(RouterError, match="groups cannot be dealt"):
        split([*make("maths", 30, "one template"), *make("code", 30)], seed=0)


def test_conversations_keep_the_newest_user_turn() -> None:
    long = "How many apples are left when " + "Ann eats one and " * 20 + "Bob two?"
    turns = [
        {"role": "system", "content": "You are a lawyer."},
        {"role": "user", "content": "Write a loop."},
        {"role": "assistant", "content": "for x in y: pass"},
        {"role": "tool", "content": "exit status 0"},
    ]
    assert routing_text([*turns, {"role": "user", "content": long}]) == long
    short = routing_text([*turns, {"role": "user", "content": "And a second?"}])
    assert short == "Write a loop.\n\nfor x in y: pass\n\nAnd a second?"
    huge = routing_text([{"role": "user", "content": "x" * 10_000}, {"role": "user", "content": "And now?"}])
    assert huge.endswith("\n\nAnd now?") and len(huge) == HISTORY_CHARACTERS + 10
    parts = [{"type": "text", "text": "What is"}, {"type": "image_url"}, {"type": "text", "text": "this?"}]
    assert routing_text([{"role": "user", "content": parts}]) == "What is\nthis?"
    assert routing_text(turns[:1]) == routing_text([]) == routing_text("  ") == ""


def test_clipping_keeps_both_ends() -> None:
    assert clip_tokens(range(10), 5) == [0, 1, 2, 8, 9]
    assert clip_tokens(range(5), 5) == [0, 1, 2, 3, 4]
    text = "a" * 5000 + "b" * 5000
    assert clip_characters(text, 100) == "a" * 800 + "b" * 800
    assert clip_characters("short", 100) == "short"
