"""The grammar of prompts: each row as the user interfaces read it, unless ours is said to differ."""

from __future__ import annotations

import contextlib
import random
import time

import pytest

from ldm.errors import UserError
from ldm.jobs import Ask, grammar

ROWS = [
    ("a (red) cat", "a |red*1.1| cat"),
    ("((a))", "a*1.21"),
    ("[a]", "a*0.909091"),
    ("(a:1.3)", "a*1.3"),
    ("(a: 1.3 )", "a*1.3"),
    ("( a :1.3)", " a *1.3"),
    ("((a:1.3))", "a*1.43"),
    ("(a (b:0.5) c:2)", "a *2|b| c*2"),
    ("(a:-1)", "a*-1"),
    ("(a:+.5)", "a*0.5"),
    ("(a:0)", "a*0"),
    ("(unbalanced", "unbalanced*1.1"),
    ("unbalanced)", "unbalanced)"),
    ("a] b [c", "a] b |c*0.909091"),
    (r"\(a\)", "(a)"),
    (r"(a\)", "a)*1.1"),
    (r"\\(a)", "\\|a*1.1"),
    (r"a\b", "ab"),
    ("(a:1.2.3)", "a:1.2.3*1.1"),  # others raise an error
    ("(a:.)", "a:.*1.1"),
    ("(a:b)", "a:b*1.1"),
    ("(a:b:1.3)", "a:b*1.3"),
    ("16:9", "16:9"),
    (":) smile", ":) smile"),
    (":D (:3)", ":D "),
    (">:( angry", ">:| angry*1.1"),
    (":3)", ":3)"),
    ("(a:1.3", "a:1.3*1.1"),
    ("[a:1.3)", "a:1.3)*0.909091"),
    ("([a)]", "a"),
    ("()", ""),
    ("", ""),
    ("(a)(b)", "ab*1.1"),
    ("(a:1e2)", "a:1e2*1.1"),
    ("(a:1,3)", "a:1,3*1.1"),
    ("a BREAK b", "a BREAK b"),
    ("aBREAKb", "aBREAKb"),
    ("a BREAK BREAK b", "a BREAK  BREAK b"),
    ("BREAK b", " BREAK b"),
    ("(a BREAK b:1.2)", "a*1.2 BREAK b*1.2"),  # elsewhere the word is read there
    ("(😀:1.4) ok", "😀*1.4| ok"),
    ("[(a:2)]", "a*1.81818"),
    ("(a:1.3))", "a*1.3|)"),
    ("{a}", "{a}"),
]


def written(prompt: str) -> str:
    """Parts as in the rows above: text*weight, | between parts."""
    return " BREAK ".join(
        "|".join(part.text + (f"*{part.weight:.6g}" if abs(part.weight - 1) > 1e-12 else "") for part in chunk)
        for chunk in grammar.chunks(prompt)
    )


@pytest.mark.parametrize(("prompt", "parts"), ROWS)
def test_brackets_escapes_and_breaks(prompt: str, parts: str) -> None:
    assert written(prompt) == parts


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("a :1.2 AND b:-0.5", [("a", 1.2), (" b", -0.5)]),
        ("a AND b", [("a", 1.0), (" b", 1.0)]),
        ("cat ANDroid", [("cat ANDroid", 1.0)]),
        ("a clock at 10:10", [("a clock at 10:10", 1.0)]),  # elsewhere its weight is 10
        ("16:9 AND a", [("16", 9.0), (" a", 1.0)]),
        ("(a:1.3) AND b : +2. ", [("(a:1.3)", 1.0), (" b", 2.0)]),
        ("(a AND b)", [("(a", 1.0), (" b)", 1.0)]),
        ("a AND", [("a", 1.0), ("", 1.0)]),
    ],
)
def test_prompts_joined_by_and(prompt: str, found: list[tuple[str, float]]) -> None:
    assert grammar.clauses(prompt) == found


def test_clauses_of_a_batch_stand_side_by_side() -> None:
    asks = [Ask("a AND b:2", weighted=True), Ask("c", weighted=True), Ask("d AND e")]
    clauses, weights = grammar.conjunction(asks)
    assert [[ask.text for ask in row] for row in clauses] == [["a", "c", "d AND e"], [" b", "c", "d AND e"]]
    assert weights == [[1.0, 1.0, 1.0], [2.0, 0.0, 0.0]]
    with pytest.raises(UserError, match="more than 16 prompts"):
        grammar.clauses(" AND ".join("ab" * 10))
    with pytest.raises(UserError, match="weight of 999"):
        grammar.clauses("a :999 AND b")


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a [cat:dog:0.5]", "'[cat:dog:0.5]' does not change"),
        ("a [cat::10]", "'[cat::10]' does"),
        ("a [cat|dog]", "'[cat|dog]' does"),
        ("(a:1000)", "100 is the most"),
    ],
)
def test_what_is_not_followed_is_said(prompt: str, words: str) -> None:
    (notice,) = grammar.notices(prompt)
    assert words in notice


@pytest.mark.parametrize("prompt", ["a [cat] b", "[a: b]", "16:9", "(a:2) b", "[[", "a | b"])
def test_what_is_followed_needs_no_words(prompt: str) -> None:
    assert not grammar.notices(prompt)


HOSTILE = [
    "(" * 10_000 + "a",
    "(a" * 10_000 + ")" * 10_000,
    "([" * 10_000 + ")]" * 10_000,
    ":" * 100_000,
    "(:" + "1" * 100_000,
    "(a:" + " " * 100_000,
    " " * 100_000 + "BREAK",
    "a " + "\\" * 100_001,
    "[a:" * 30_000,
    "(a:1" + "0" * 400 + ")",
]


@pytest.mark.parametrize("prompt", HOSTILE)
def test_a_hostile_prompt_costs_its_length(prompt: str) -> None:
    before = time.process_time()
    parts = [part for chunk in grammar.chunks(prompt) for part in chunk]
    grammar.notices(prompt)
    grammar.clauses(prompt)
    with contextlib.suppress(UserError):
        grammar.clauses(f"{prompt} AND {prompt}")
    assert time.process_time() - before < 2
    assert all(abs(part.weight) <= grammar.MAX_WEIGHT for part in parts)


def test_no_text_is_an_error_and_no_letter_is_lost() -> None:
    """Letters other than the grammar's own come out as they went in, in their order."""
    dice = random.Random(0)
    for _ in range(2000):
        prompt = "".join(dice.choice("ab ([)]\\:1.") for _ in range(dice.randrange(20)))
        text = "".join(part.text for chunk in grammar.chunks(prompt) for part in chunk)
        assert [letter for letter in text if letter in "ab "] == [letter for letter in prompt if letter in "ab "] or (
            ":" in prompt  # the spaces of (a: 1 ) are the number's
        )
