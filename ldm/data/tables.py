"""Tables: the rows of a CSV, TSV, JSONL or Parquet file as dicts, each with the words that say where it stands."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ldm.errors import UserError, explain_os_error
from ldm.files import read_text

Row = tuple[str, Mapping[str, Any]]  # ("captions.csv, line 2", column -> value)


def rows(table: Path) -> Iterator[Row]:
    """The rows in order, blank lines left out; raises UserError for what cannot be read. Parquet needs pyarrow."""
    kind = table.suffix.lower()
    if kind in (".csv", ".tsv"):
        return csv_rows(read_text(table), table, "," if kind == ".csv" else "\t")
    if kind in (".jsonl", ".ndjson"):
        return json_rows(read_text(table), table)
    if kind == ".parquet":
        return _parquet(table)
    raise UserError(f"{table} is not a .csv, .tsv, .jsonl or .parquet file; save it as one of these")


def csv_rows(text: str, path: str | Path, delimiter: str = ",") -> Iterator[Row]:
    """The rows of `text` under its first one, the header; cells that a row lacks at its end are None."""
    csv.field_size_limit(2**27)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row:
                raise UserError(f"{where} has more cells than the header; put quotes around a text with commas")
            yield where, row
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num} is not valid CSV ({error})") from error


def json_rows(text: str, path: str | Path) -> Iterator[Row]:
    """The objects of `text`, one on each line."""
    for number, line in enumerate(text.split("\n"), 1):  # JSON may hold what else splitlines() takes for an end
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not valid JSON ({error}); write one object on each line") from error
        if not isinstance(row, dict):
            raise UserError(f'{where} is not a JSON object; write one such as {{"prompt": "a red heart"}}')
        yield where, row


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
