"""Files of prompts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.data import tables
from ldm.errors import UserError
from ldm.files import read_text
from ldm.jobs.request import Request, expand


def read_prompts(path: str | Path, negative: str = "", seed: int = 0, n: int = 1) -> list[Request]:
    """`n` pictures of each prompt of a file, in order.

    .csv, .tsv, .parquet: rows with "prompt" and, if wanted, "negative" and "seed"; .jsonl: objects with these, one on
    each line; .json: a list of such objects or of prompts; any other file: one prompt on each line. Columns may be in
    any case. Blank lines do not count. `negative` and `seed` stand in where a row has none of its own, and picture i of
    the file then has seed + i.
    Raises UserError, with the row's number, for what cannot be read.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind in tables.SUFFIXES:
        missing = (None, "") if kind in (".csv", ".tsv") else (None,)
        found = tables.rows(path, "prompt")
        rows = [(where, {name: cell for name, cell in row.items() if cell not in missing}) for where, row in found]
    else:
        lines = enumerate(read_text(path).splitlines(), 1)
        rows = [(f"{path}, line {i}", {"prompt": line}) for i, line in lines if line.strip()]
    if not rows:
        raise UserError(f"{path} has no prompts; write one on each line")
    return expand([_request(row, where, negative, seed + n * i) for i, (where, row) in enumerate(rows)], n)


def _request(row: Mapping[str, Any], where: str, negative: str, seed: int) -> Request:
    known, given = ("prompt", "negative", "seed"), {}
    for name, cell in row.items():
        if (plain := name.strip().casefold()) not in known:
            raise UserError(f"{where} has an unknown column '{name}'; the known ones are {', '.join(known)}")
        if plain in given:
            raise UserError(f"{where} has two columns '{plain}'; keep one of them")
        given[plain] = cell
    if "prompt" not in given:
        raise UserError(f"{where} has no prompt; name the column 'prompt'")
    prompt, negative, value = given["prompt"], given.get("negative", negative), given.get("seed", seed)
    if not isinstance(prompt, str) or not isinstance(negative, str):
        raise UserError(f"{where}: prompt and negative must be text")
    try:
        if isinstance(value, (bool, float)):
            raise ValueError
        return Request(prompt.strip(), negative.strip(), int(value))
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: the seed is {value!r}, which is not a whole number") from error
