"""Lists of words, written as prose and kept as sets."""

from __future__ import annotations


def words(text: str) -> frozenset[str]:
    """The words of `text`, whatever white space is between them."""
    return frozenset(text.split())
