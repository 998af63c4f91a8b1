"""YAML within bounds, with lines."""

from __future__ import annotations

import pytest

from mesh.kube.documents import MAX_DEPTH, Chunk, MalformedDocument, parse_chunk, parse_json, resolve_plain, split_documents
from mesh.kube.objects import SourceMapping, SourceSequence


def parse(text: str) -> list[object]:
    return [value for chunk in split_documents(text) for value in parse_chunk(chunk)]


def test_documents_are_cut_at_their_separators_and_empty_ones_left_out() -> None:
    text = "# head\n%YAML 1.2\n---\na: 1\n---\n# nothing\n---   # comment\nb: |\n  ---x\n  --- y\n...\n---\n"
    chunks = list(split_documents(text))
    assert [(chunk.line, text[chunk.offset :].startswith(chunk.text)) for chunk in chunks] == [(2, True), (6, True)]
    assert parse(text) == [{"a": 1}, {"b": "---x\n--- y\n"}]


def test_every_key_and_item_knows_its_line() -> None:
    (value,) = parse("\n# c\na:\n  - x\n  -\n    b: {c: 1,\n        d: 2}\n")
    assert isinstance(value, SourceMapping)
    assert value.lines == {"a": 2}
    items = value["a"]
    assert isinstance(items, SourceSequence)
    assert items.lines == [3, 5]
    inner = items[1]
    assert isinstance(inner, SourceMapping)
    assert isinstance(inner["b"], SourceMapping)
    assert inner["b"].lines == {"c": 5, "d": 6}


def test_plain_scalars_mean_what_kubectl_takes_them_for() -> None:
    meant = {"yes": True, "off": False, "Null": None, "~": None, "12": 12, "-3": -3, "1.5": 1.5, "1e3": 1000.0}
    for text, value in meant.items():
        assert resolve_plain(text) == value
    for text in ("010", "0x10", "2020-01-01", "1.2.3.4", "10:30", "1_000", "yEs", "12345678901234567890123"):
        assert resolve_plain(text) == text


def test_aliases_and_merge_keys_are_understood() -> None:
    text = "base: &base {a: 1, b: 2}\nx: *base\ny:\n  <<: *base\n  b: 3\nz: {<<: [{a: 5}, *base]}\n"
    assert parse(text) == [{"base": {"a": 1, "b": 2}, "x": {"a": 1, "b": 2}, "y": {"a": 1, "b": 3}, "z": {"a": 5, "b": 2}}]


@pytest.mark.parametrize(("text", "line", "message"), [
    ("a: 1\nb: 2\na: 3\n", 3, "key 'a' is given twice, first in line 1"),
    ("a: [1, 2\nb: 3\n", 2, "expected ',' or ']'"),
    ("a: b: c\n", 1, "mapping values are not allowed here"),
    ("a: 'x\n", 2, "unexpected end of stream"),
    ("\ta: 1\n", 1, "'\\t'"),
    ("a: &a [*a]\n", 1, "alias *a stands inside the value it names"),
    ("a: *b\n", 1, "alias *b names no anchor"),
    ("? [a]\n: b\n", 1, "a key must be a plain value"),
    ("a: !!python/object/apply:os.system [x]\n", 1, "is not understood"),
    ("a: !secret x\n", 1, "the tag !secret is not understood"),
    ("<<: 3\n", 1, "'<<' takes a mapping"),
    ("a: \x01\n", 1, "special characters are not allowed"),
    ("a: " + "[" * 200 + "]" * 200, 1, f"nested deeper than {MAX_DEPTH} levels"),
    ("a: " + "{b: " * 200, 1, f"nested deeper than {MAX_DEPTH} levels"),
])  # fmt: skip
def test_what_cannot_be_read_is_told_with_its_line(text: str, line: int, message: str) -> None:
    with pytest.raises(MalformedDocument) as caught:
        parse_chunk(Chunk(text, line=10))
    assert message in caught.value.message
    assert caught.value.line == line + 10
    assert caught.value.column >= 1


def test_an_alias_bomb_is_refused_before_it_explodes() -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(20))
    with pytest.raises(MalformedDocument, match="more than 200000 values"):
        parse_chunk(Chunk(bomb))


def test_aliases_cannot_nest_deeper_than_anything_else() -> None:
    chain = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 100))
    with pytest.raises(MalformedDocument, match="nested deeper"):
        parse_chunk(Chunk(chain))


def test_json_is_read_fast_and_with_the_same_strictness() -> None:
    assert parse_json('{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]}
    for text, message in (('{"a": 1, "a": 2}', "key 'a' is given twice"), ('{"a": ', "Expecting value"), ("[" * 100_000, "recursion")):
        with pytest.raises(MalformedDocument, match=message):
            parse_json(text)
