"""The command line that all training scripts share."""

from __future__ import annotations

import time
from dataclasses import dataclass

from ldm.arguments import Parser

BEGAN = time.monotonic()  # the scripts import this file before anything that takes its time


@dataclass(frozen=True)
class TrainingArguments:
    config: str | None
    overrides: list[str]


def training_arguments(description: str | None) -> TrainingArguments:
    """`--config FILE [--resume auto] key=value ...` from the command line."""
    parser = Parser(description=description)
    parser.add_argument("--config", metavar="FILE", help="YAML of settings; see configs/")
    parser.add_argument("--resume", choices=["auto"], help="auto: go on from the output folder if it holds a run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings over those of the file")
    known = parser.parse_intermixed_args()
    resume = [f"resume={known.resume}"] if known.resume else []
    return TrainingArguments(known.config, [*known.overrides, *resume])
