"""Tables of captions: the rows of a CSV, TSV, JSONL or Parquet file as dicts."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ldm.errors import UserError, explain_os_error
from ldm.files import read_text


def rows(table: Path) -> Iterator[Mapping[str, Any]]:
    """Column -> value for each row; raises UserError for what cannot be read. Parquet needs pyarrow."""
    kind = table.suffix.lower()
    if kind in (".csv", ".tsv"):
        return _csv(table, "," if kind == ".csv" else "\t")
    if kind in (".jsonl", ".ndjson"):
        return _jsonl(table)
    if kind == ".parquet":
        return _parquet(table)
    raise UserError(f"{table} is not a .csv, .tsv, .jsonl or .parquet file; save it as one of these")


def _csv(table: Path, delimiter: str) -> Iterator[Mapping[str, Any]]:
    csv.field_size_limit(2**27)
    try:
        for row in csv.DictReader(io.StringIO(read_text(table), newline=""), delimiter=delimiter):
            yield {name: value for name, value in row.items() if name is not None}  # None: more cells than columns
    except csv.Error as error:
        raise UserError(f"{table} does not parse: {error}") from error


def _jsonl(table: Path) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(read_text(table).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"line {number} of {table} does not parse: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"line {number} of {table} is not a JSON object")
        yield row


def _parquet(table: Path) -> Iterator[Mapping[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet  # type: ignore[import-not-found]
    except ImportError as error:
        raise UserError("reading Parquet needs pyarrow; pip install pyarrow, or save the table as CSV") from error
    try:
        for batch in parquet.ParquetFile(table).iter_batches():
            yield from batch.to_pylist()
    except OSError as error:
        raise explain_os_error(error, f"reading {table}") from error
    except ArrowException as error:
        raise UserError(f"{table} does not parse: {error}") from error
