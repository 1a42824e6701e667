"""Words of the command line that several scripts and tools share."""

from __future__ import annotations

from collections.abc import Sequence

from ldm.errors import UserError
from ldm.home import find_recipe

WHERE_HELP = (
    "keep samples whose json field has one of the values: --where 'style=noto emoji,flat emoji' mode=plain; "
    "@RECIPE: that of a training recipe"
)


def parse_where(words: Sequence[str]) -> dict[str, list[str]]:
    """["style=noto emoji,flat emoji", "mode=plain"] -> {"style": ["noto emoji", "flat emoji"], "mode": ["plain"]}.

    The form of DataConfig.where. Raises UserError for a word without "=" or without a value.
    """
    where: dict[str, list[str]] = {}
    for word in words:
        name, _, values = word.partition("=")
        wanted = split_list(values)
        if not name.strip() or not wanted:
            raise UserError(f"--where takes words of the form field=value or field=value,value, and got '{word}'")
        where.setdefault(name.strip(), []).extend(wanted)
    return where


def where_of(words: Sequence[str]) -> dict[str, list[str]]:
    """The same, where a word @RECIPE stands for the data.where of a training recipe, by the names of `find_recipe`."""
    from ldm.config import DiffusionTraining, load

    where = parse_where([word for word in words if not word.startswith("@")])
    for word in words:
        where |= load(DiffusionTraining, find_recipe(word[1:], "diffusion")).data.where if word.startswith("@") else {}
    return where


def split_list(text: str) -> list[str]:
    """The parts between commas, stripped: "a b, c" -> ["a b", "c"]"""
    return [part.strip() for part in text.split(",") if part.strip()]
