"""The command line that all training scripts share."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Generic, TypeVar

from ldm.arguments import Parser
from ldm.home import recipe
from ldm.plain import leaves
from ldm.settings import listing, load, read

BEGAN = time.monotonic()  # the scripts import this file before anything that takes its time
T = TypeVar("T")


@dataclass(frozen=True)
class Asked(Generic[T]):
    """What a command line asks for: a training's settings, and which of them it, or its file, wrote out."""

    settings: T
    said: frozenset[str]  # their dotted names


def asked(cls: type[T], description: str | None) -> Asked[T]:
    """`--config FILE [--resume auto] key=value ...` from the command line, as a `cls`. Raises UserError."""
    parser = Parser(
        description=description,
        epilog="settings, as they are unless the file or a word says otherwise:\n\n" + "\n".join(listing(cls)),
    )
    folder = cls.__name__.removesuffix("Training").lower()
    about = f"YAML of settings, or a shipped one by its name, as icons: configs/{folder}/icons.yaml"
    parser.add_argument("--config", type=recipe(folder), metavar="FILE", help=about)
    parser.add_argument("--resume", choices=["auto"], help="auto: go on from the output folder if it holds a run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings over those of the file")
    known = parser.parse_intermixed_args()
    words = [*known.overrides, *([f"resume={known.resume}"] if known.resume else [])]
    settings = load(cls, known.config, words)
    return Asked(settings, frozenset(name for name, _ in leaves(read(known.config, words))))
