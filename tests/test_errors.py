"""What an error says first, and nested settings as a flat list."""

import pytest
import yaml

from ldm.errors import first_line, kind_and_line
from ldm.plain import leaves


def test_the_first_line_of_an_error() -> None:
    assert first_line(ValueError("\n one \n two")) == "one"
    assert first_line(ValueError("x" * 300)) == "x" * 200 and first_line(ValueError("abc"), 2) == "ab"
    assert first_line(ValueError()) == kind_and_line(ValueError("  ")) == "ValueError"
    assert kind_and_line(OSError("no route\nto the host")) == "OSError: no route"


def test_of_yaml_the_problem_is_said_and_not_what_it_was_doing() -> None:
    with pytest.raises(yaml.YAMLError) as caught:
        yaml.safe_load("a: [1, 2")
    assert first_line(caught.value).startswith("expected ',' or ']'")


def test_leaves() -> None:
    plain = {"a": {"b": {"c": 1}, "empty": {}}, "d": [{"e": 2}], "f": None}
    assert list(leaves(plain)) == [("a.b.c", 1), ("d", [{"e": 2}]), ("f", None)]
