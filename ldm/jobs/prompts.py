"""Files of prompts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.data import tables
from ldm.errors import UserError
from ldm.files import read_text
from ldm.jobs.request import Request, as_label, expand


def read_prompts(
    path: str | Path, negative: str = "", seed: int = 0, n: int = 1, label: str | None = None
) -> list[Request]:
    """`n` pictures of each prompt of a file, in order.

    .csv, .tsv, .parquet: rows with "prompt", "label" or both and, if wanted, "negative" and "seed"; .jsonl: objects
    with these, one on each line; .json: a list of such objects or of prompts; any other file: one prompt on each line.
    Columns may be in any case. Blank lines do not count. `negative`, `label` and `seed` stand in where a row has none
    of its own, and picture i of the file then has seed + i.
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
    usual = [{"negative": negative, "label": label, "seed": seed + n * i} for i in range(len(rows))]
    return expand([_request(row, where, own) for own, (where, row) in zip(usual, rows, strict=True)], n)


def _stripped(cell: Any) -> Any:
    return cell.strip() if isinstance(cell, str) else cell


def _request(row: Mapping[str, Any], where: str, usual: Mapping[str, Any]) -> Request:
    known, given = ("prompt", "negative", "seed", "label"), {}
    for name, cell in row.items():
        if (plain := name.strip().casefold()) not in known:
            raise UserError(f"{where} has an unknown column '{name}'; the known ones are {', '.join(known)}")
        if plain in given:
            raise UserError(f"{where} has two columns '{plain}'; keep one of them")
        given[plain] = cell
    given = {**usual, **given}
    if "prompt" not in given and given["label"] is None:
        raise UserError(f"{where} has no prompt; name the column 'prompt' (or 'label', for models of classes)")
    prompt, negative, value = given.get("prompt", ""), given["negative"], given["seed"]
    try:
        label = None if given["label"] is None else as_label(_stripped(given["label"]))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if not isinstance(prompt, str) or not isinstance(negative, str):
        raise UserError(f"{where}: prompt and negative must be text")
    try:
        if isinstance(value, (bool, float)):
            raise ValueError
        seed = int(value)
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: the seed is {value!r}, which is not a whole number") from error
    try:
        return Request(prompt.strip(), negative.strip(), seed, label).check()
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
