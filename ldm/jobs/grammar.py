r"""The grammar of prompts that people know from the user interfaces; for Asks whose `weighted` is true.

    (word) [word]           weight times 1.1, divided by 1.1; (word:1.3) times 1.3; nesting multiplies
    \( \) \[ \] \\          the letter itself; any other backslash vanishes
    a BREAK b               b begins a chunk of its own: what the tower reads at once
    a AND b :0.5            two prompts, each guided by itself, the second with half the weight

A bracket that is not closed acts to the end, and one that was never opened is text: no prompt is an error for its
brackets. All of it takes time in proportion to the prompt's length.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from ldm.errors import UserError
from ldm.jobs.request import Ask

ROUND, SQUARE = 1.1, 1 / 1.1
MAX_WEIGHT = 100.0  # either way: what lies beyond comes of slips and of thousands of brackets, and ends in noise
MAX_CLAUSES = 16  # each is evaluated at every step

_PIECE = re.compile(r"\\[\\()\[\]]?|:\s*+([+-]?[.\d]++)\s*+\)|[()\[\]]|[^\\()\[\]:]+|:")
_CLAUSE_WEIGHT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)")
_SQUARES = re.compile(r"\[[^\[\]]*\]")


class Part(NamedTuple):
    """Text and its weight."""

    text: str
    weight: float = 1.0


def chunks(prompt: str) -> list[list[Part]]:
    """The parts of a prompt between one BREAK and the next; neighbours of one weight are one part."""
    pieces = list(_pieces(prompt))
    factors = _factors(pieces)
    found: list[list[Part]] = [[]]
    products = {"(": [1.0], "[": [1.0]}
    for index, (kind, text) in enumerate(pieces):
        if kind in products:
            products[kind].append(products[kind][-1] * factors[index])
        elif kind in (")", "]"):
            products["(" if kind == ")" else "["].pop()
        elif kind == "BREAK":
            found.append([])
        elif text:
            weight = products["("][-1] * products["["][-1]
            weight = min(max(weight, -MAX_WEIGHT), MAX_WEIGHT)
            parts = found[-1]
            if parts and parts[-1].weight == weight:
                text = parts.pop().text + text
            parts.append(Part(text, weight))
    return found


def clauses(prompt: str) -> list[Part]:
    """The prompts that AND joins, each with its weight, the number behind a colon at its end.

    Raises UserError for more than `MAX_CLAUSES`, and for a weight beyond `MAX_WEIGHT`.
    """
    texts = re.split(r"\bAND\b", prompt, maxsplit=MAX_CLAUSES)
    if len(texts) > MAX_CLAUSES:
        raise UserError(f"the prompt '{prompt[:40]}…' joins more than {MAX_CLAUSES} prompts by AND; join fewer")
    if len(texts) == 1:  # "a clock at 10:10" has no weight
        return [Part(prompt)]
    found = []
    for text in texts:
        head, _, number = text.rpartition(":")
        weighted = _CLAUSE_WEIGHT.fullmatch(number.strip())
        weight = float(weighted[0]) if weighted else 1.0
        if abs(weight) > MAX_WEIGHT:
            raise UserError(f"a prompt joined by AND has a weight of {weight:g}; choose one up to {MAX_WEIGHT:g}")
        found.append(Part((head if weighted else text).rstrip(), weight))
    return found


def conjunction(asks: Sequence[Ask]) -> tuple[list[list[Ask]], list[list[float]]]:
    """K lists of B asks and K lists of B weights: the clauses of each ask; K is the most that one of them has.

    An ask of fewer has its first once more, with weight 0. Raises UserError as `clauses`.
    """
    rows = [clauses(ask.text) if ask.weighted and ask.told is None else [Part(ask.text)] for ask in asks]
    most = max(map(len, rows))
    rows = [row + [Part(row[0].text, 0.0)] * (most - len(row)) for row in rows]
    return (
        [[replace(ask, text=row[k].text) for ask, row in zip(asks, rows, strict=True)] for k in range(most)],
        [[row[k].weight for row in rows] for k in range(most)],
    )


def notices(prompt: str) -> list[str]:
    """What of a prompt is not followed: the user interfaces' changes at a step, [a:b:0.5] and [a|b]; huge weights."""
    found = []
    schedule = next((word for word in _SQUARES.findall(prompt) if _changes(word[1:-1])), "")
    if schedule:
        found.append(
            f"'{schedule[:60]}' does not change the prompt at a step here, as it does elsewhere: it is read as text in "
            "square brackets"
        )
    if any(abs(part.weight) == MAX_WEIGHT for chunk in chunks(prompt) for part in chunk):
        found.append(f"a weight in '{prompt[:40]}' is {MAX_WEIGHT:g} or more, and {MAX_WEIGHT:g} is the most there is")
    return found


def _changes(inside: str) -> bool:
    if "|" in inside:
        return True
    _, colon, when = inside.rpartition(":")
    return bool(colon and re.fullmatch(r"\d+\.?\d*|\.\d+", when.strip()))


def _pieces(prompt: str) -> list[tuple[str, str]]:
    """(kind, text): kind is a bracket that counts, BREAK, or "" for text; a closing one's text is its number."""
    found, opened = [], {")": 0, "]": 0}
    for match in _PIECE.finditer(prompt):
        piece, number = match[0], match[1]
        closing = piece[-1] if number else piece
        if closing in opened and not opened[closing]:
            found.append(("", piece))
        elif closing in opened:
            opened[closing] -= 1
            if number and not _is_number(number):
                found.append(("", piece[:-1]))
                number = ""
            found.append((closing, number or ""))
        elif piece in ("(", "["):
            opened[")" if piece == "(" else "]"] += 1
            found.append((piece, ""))
        elif piece.startswith("\\"):
            found.append(("", piece[1:]))
        else:
            found += _breaks(piece)
    return found


def _breaks(text: str) -> list[tuple[str, str]]:
    """Text at each word BREAK apart, without the spaces around it."""
    texts = re.split(r"\bBREAK\b", text)
    found = [("", texts[0].rstrip() if len(texts) > 1 else text)]
    for index, part in enumerate(texts[1:], 2):
        found += [("BREAK", ""), ("", part.lstrip() if index == len(texts) else part.strip())]
    return found


def _factors(pieces: Sequence[tuple[str, str]]) -> dict[int, float]:
    """The factor of each opening bracket, by its place; it stands at the end of what it acts on."""
    found: dict[int, float] = {}
    opened: dict[str, list[int]] = {"(": [], "[": []}
    for index, (kind, text) in enumerate(pieces):
        if kind in opened:
            opened[kind].append(index)
            found[index] = ROUND if kind == "(" else SQUARE
        elif kind == ")":
            found[opened["("].pop()] = float(text) if text else ROUND
        elif kind == "]":
            opened["["].pop()
    return found


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
