"""Tables: the rows of CSV, TSV, JSON, JSONL and Parquet files as dicts, each with words that say where it stands."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ldm.errors import UserError, explain_os_error
from ldm.files import read_text
from ldm.plain import once

Row = tuple[str, Mapping[str, Any]]  # ("captions.csv, line 2", column -> value)

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
DELIMITERS = ",;\t"


def rows(table: Path, text_column: str = "") -> Iterator[Row]:
    """The rows in order, blank ones left out; raises UserError for what cannot be read. Parquet needs pyarrow.

    An entry of a .json list that is a text stands for a row with that text in `text_column`, if one is named.
    """
    kind = table.suffix.lower()
    if kind in (".csv", ".tsv"):
        return _csv(read_text(table), table)
    if kind == ".json":
        return _json(read_text(table), table, text_column)
    if kind in (".jsonl", ".ndjson"):
        return _json_lines(read_text(table), table)
    if kind == ".parquet":
        return _parquet(table)
    raise UserError(f"{table} is not a .csv, .tsv, .jsonl or .parquet file or a .json list; save it as one of these")


def column_of(row: Mapping[str, Any], name: str) -> str:
    """How the row spells the column `name`: exactly so, or in another case; "" where it has none, or several."""
    if name in row:
        return name
    alike = [own for own in row if own.strip().casefold() == name.casefold()]
    return alike[0] if len(alike) == 1 else ""


def _csv(text: str, path: Path) -> Iterator[Row]:
    """The rows under the first one, the header; cells that a row lacks at its end are None.

    Cells end at commas, semicolons or tabs, whichever divides the header into the most.
    """
    csv.field_size_limit(2**27)
    text, delimiter = _delimiter(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    header: list[str] = []
    try:
        for cells in reader:
            where = f"{path}, line {reader.line_num}"
            if not any(cell.strip() for cell in cells):
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                twice = sorted({name for name in header if name and header.count(name) > 1})
                if twice:
                    raise UserError(f"{where} has two columns '{twice[0]}'; give each a name of its own")
                continue
            if any(cell.strip() for cell in cells[len(header) :]):
                raise UserError(f"{where} has more cells than the header; put quotes around a text with '{delimiter}'")
            padded: list[str | None] = [*cells, *[None] * (len(header) - len(cells))]
            yield where, {name: cell for name, cell in zip(header, padded, strict=False) if name or cell}
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num} is not valid CSV ({error})") from error


def _delimiter(text: str) -> tuple[str, str]:
    """The text behind a spreadsheet's "sep=;", if it begins so, and what divides cells."""
    first = next((line for line in io.StringIO(text) if line.strip()), "").rstrip("\n")
    if first.lower() in [f"sep={delimiter}" for delimiter in DELIMITERS]:
        return text.replace(first, "", 1), first[4]

    def columns(delimiter: str) -> int:
        return len(next(csv.reader([first], delimiter=delimiter), []))

    return text, max(DELIMITERS, key=columns)  # the first of them where the header is one cell


def _json(text: str, path: Path, text_column: str) -> Iterator[Row]:
    """The entries of a list, or the one object that `text` is."""
    try:
        said = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        hint = "; with an object on each line, its name must end in .jsonl" if "Extra data" in str(error) else ""
        raise UserError(f"{path} is not valid JSON ({error}){hint}") from error
    for number, row in enumerate(said if isinstance(said, list) else [said], 1):
        where = f"{path}, entry {number}"
        yield where, _object({text_column: row} if text_column and isinstance(row, str) else row, where)


def _json_lines(text: str, path: Path) -> Iterator[Row]:
    """The objects of `text`, one on each line."""
    for number, line in enumerate(text.split("\n"), 1):  # JSON may hold what else splitlines() takes for an end
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line, object_pairs_hook=once)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not valid JSON ({error}); write one object on each line") from error
        yield where, _object(row, where)


def _object(row: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f'{where} is not a JSON object; write one such as {{"prompt": "a red heart"}}')
    return row


def _parquet(table: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet  # type: ignore[import-not-found]
    except ImportError as error:
        raise UserError("reading Parquet needs pyarrow: pip install -e '.[tables]', or save it as CSV") from error
    try:
        number = 0
        for batch in parquet.ParquetFile(table).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{table}, row {number}", row
    except OSError as error:
        raise explain_os_error(error, f"reading {table}") from error
    except ArrowException as error:
        raise UserError(f"{table} does not parse: {error}") from error
