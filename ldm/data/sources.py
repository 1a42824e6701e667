"""Where shards come from: files, http(s), the stores that fsspec knows, the output of a command.

    data/train-{000..099}.tar, more/*.tar        files: globs and braces
    https://host/train-{000..099}.tar            braces; no globs, since a web server has no list of its files
    s3://bucket/train-*.tar                      any scheme of fsspec (s3 needs the extra `remote`): globs and braces
    pipe:ssh host cat train-{000..099}.tar       a line of its own, and only with data.allow_pipe=true

What is not a file is copied whole into a local cache before it is read (cache.py), so reading by offset, and with it
order and resumption, is the same for all.
"""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import braceexpand

from ldm.errors import UserError, kind_and_line

PIPE = "pipe:"

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def is_file(source: str) -> bool:
    """Whether a source is a path in this machine's file system."""
    return not source.startswith(PIPE) and not _SCHEME.match(source)


def base_name(source: str) -> str:
    """The last part of a source's path, without a query; of a command all of it."""
    if source.startswith(PIPE):
        return source
    return Path(source).name if is_file(source) else PurePosixPath(urlsplit(source).path).name


def expand(patterns: str, what: str = "data.shards") -> list[Path]:
    """The files that `patterns` names; raises UserError like `expand_sources`, and for what is not a file."""
    found = expand_sources(patterns, what)
    for source in found:
        if not is_file(source):
            raise UserError(f"{what}: '{source}' is not a file; copy it here first")
    return [Path(source) for source in found]


def expand_sources(patterns: str, what: str = "data.shards", allow_pipe: bool = False) -> list[str]:
    """The sources that `patterns` names: globs and braces, several separated by commas or white space.

    Commas inside braces belong to the brace; a path or glob with spaces may stand alone, and so may a command on its
    line. Sources keep the order of the patterns, sorted within each glob, each once. Raises UserError for an empty
    setting, a pattern without a match, and a command where `allow_pipe` is false; `what` names the setting.
    """
    found: dict[str, None] = {}
    if _files(patterns):
        return _files(patterns)
    for line in patterns.splitlines():
        command = line.strip().startswith(PIPE)
        if command and not allow_pipe:
            raise UserError(
                f"{what} holds the command '{line.strip()}', which would be run on this machine; "
                "say data.allow_pipe=true if that is what you want"
            )
        alone = command or _files(line)
        for pattern in [line.strip()] if alone else re.findall(r"(?:\{[^{}]*\}|[^\s,])+", line):
            for name in [pattern] if _files(pattern) else _braces(pattern, what):
                found.update(dict.fromkeys(_matching(name, what)))
    if not found:
        raise UserError(f"{what} names no shards; set it to tar files, for example {what}='data/train-*.tar'")
    return list(found)


def _braces(pattern: str, what: str) -> list[str]:
    try:
        return list(braceexpand.braceexpand(pattern, escape=False))
    except ValueError as error:
        raise UserError(f"{what}: the braces of '{pattern}' do not match; write them like x-{{0..9}}.tar") from error


def _matching(name: str, what: str) -> list[str]:
    if name.startswith("file://"):
        name = name.removeprefix("file://")
    if name.startswith((PIPE, "http://", "https://")):
        return [name]
    matches = _files(name) if is_file(name) else _in_store(name, what)
    if not matches:
        raise UserError(f"{what}: no file matches '{name}'; check the path")
    return matches


def _files(pattern: str) -> list[str]:
    pattern = os.path.expanduser(pattern)
    if os.path.isfile(pattern):
        return [pattern]
    return sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))


def _in_store(pattern: str, what: str) -> list[str]:
    if not glob.has_magic(pattern):
        return [pattern]
    try:
        system, path = file_system(pattern)
        return sorted(system.unstrip_protocol(str(found)) for found in system.glob(path))
    except UserError:
        raise
    except Exception as error:  # each store has exceptions of its own
        raise UserError(f"{what}: '{pattern}' cannot be listed ({kind_and_line(error)})") from error


def file_system(source: str):
    """(fsspec's file system, path within it) of a source; raises UserError if what serves its scheme is missing."""
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise UserError(f"reading {source} needs fsspec; pip install -e '.[remote]'") from error
    try:
        return url_to_fs(source)
    except ImportError as error:
        raise UserError(f"reading {source} needs another package ({kind_and_line(error)})") from error
    except ValueError as error:
        raise UserError(
            f"{source} is of no store that fsspec knows ({kind_and_line(error)}); check the scheme"
        ) from error
