"""What travels from a shard to a batch: one sample's bytes, why it cannot be used, and how many could not."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

logger = logging.getLogger(__name__)

KINDS = 100  # reasons that are told apart; beyond them it is "other reasons"


@dataclass(frozen=True)
class Record:
    """One sample as it lies in its shard: `fields` maps a member's extension (lower case, no dot) to its bytes."""

    key: str
    shard: str
    fields: Mapping[str, bytes]
    bucket: tuple[int, int] | None = None  # height and width its picture is to have, where pictures have buckets


class BadSample(Exception):
    """This sample cannot be used; the message is the reason, the same words for the same kind of fault."""


class Unavailable(BadSample):
    """The sample's shard is not available at this time; it may be later."""


class Tally:
    """Counts the samples that could not be used, by reason; the first of each reason is logged with its key."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def note(self, reason: str, key: str, shard: str) -> None:
        if reason not in self.counts and len(self.counts) >= KINDS:
            reason = "other reasons"
        if reason not in self.counts:
            logger.warning("leaving out samples: %s (the first is '%s' in %s)", reason, shown(key), shown(shard))
        self.counts[reason] += 1

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def __str__(self) -> str:
        return ", ".join(f"{reason}: {count}" for reason, count in self.counts.most_common())


def shown(text: str) -> str:
    """A stranger's name as it may be printed: short, without a terminal's control codes."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return text if len(text) <= 200 else text[:197] + "..."
