"""Data as text: JSON that reads back, YAML in the few shapes that commands print."""

import json

import pytest

from planner.report.text.formats import as_json, as_yaml

DATA = {
    "name": "a card",
    "sizes": [1, 2.5, None],
    "none": None,
    "on": True,
    "empty": {"list": [], "mapping": {}},
    "nested": {"deep": {"deeper": "9.0"}},
    "cards": [{"key": "a", "rates": {"x": 1e16}}, {"key": "b: c", "rates": {}}],
    "lists": [[1, 2], []],
}
YAML = """\
name: a card
sizes: [1, 2.5, null]
none: null
"on": true
empty:
  list: []
  mapping: {}
nested:
  deep:
    deeper: "9.0"
cards:
  - key: a
    rates:
      x: 1.0e+16
  - key: "b: c"
    rates: {}
lists:
  - [1, 2]
  - []"""


def test_yaml_is_blocks_of_plain_lines():
    assert as_yaml(DATA) == YAML


def test_json_reads_back():
    assert json.loads(as_json(DATA)) == DATA


@pytest.mark.parametrize(
    "value, text",
    [("plain text", "plain text"), ("NVIDIA H200 (SXM)", "NVIDIA H200 (SXM)"), ("", '""'), ("null", '"null"'),
     ("No", '"No"'), ("true", '"true"'), ("~", '"~"'), ("12", '"12"'), ("1e3", '"1e3"'), (" a", '" a"'),
     ("a ", '"a "'), ("a\n", r'"a\n"'), ("a #b", '"a #b"'), ("- a", '"- a"'), ('say "a"', r'"say \"a\""'),
     ("\x85", r'"\U00000085"'), ("\U0001f600", r'"\U0001F600"'), ("a:", '"a:"'),
     ("2026-11-21", '"2026-11-21"'), (1e-5, "1.0e-05"), (1.5e-5, "1.5e-05"), (0.1, "0.1"), (-3, "-3"),
     (True, "true"), (None, "null"),
     ([], "[]"), ({}, "{}"), (["a", "no"], '[a, "no"]'), ([{"a": 1}], "- a: 1")],
)  # pairs (value, text)  # fmt: skip
def test_text_that_yaml_would_take_for_something_else_is_quoted(value, text):
    assert as_yaml(value) == text


@pytest.mark.parametrize("write", [as_json, as_yaml])
def test_output_is_ascii_and_has_no_nan(write):
    assert write({"a": "\xe4\U0001f600\u2028"}).isascii()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write({"a": float("nan")})
