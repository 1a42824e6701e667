"""Packages by their ordinary clients: `npm pack` and `apt-get download`, unpacked once into the work folder.

A package is fetched once for each version; a folder that exists is whole, since it is moved there when it is.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ldm.errors import explain_os_error

Fetch = Callable[[str, str, Path], Path]  # name, version, empty folder -> the folder below it with the package's files

_TIMEOUT = 900  # seconds for one package


class Unavailable(Exception):
    """A package that is not available; the message is the reason, in a few words."""


class Offline(Unavailable):
    """There is no way to the registry at all: nothing else needs to be tried."""


class Packages:
    """Fetches into `work`; what is not available is noted in `missing` (package -> reason).

    After a sign that there is no way to a registry its client is not asked again, so that a machine without network
    says so within seconds; what was fetched before is still found.
    """

    def __init__(self, work: Path) -> None:
        self.missing: dict[str, str] = {}
        self._work = work.resolve()
        self._offline: dict[Fetch, Offline] = {}

    def get(self, fetch: Fetch, name: str, version: str) -> Path | None:
        """The package's folder, or None. `fetch` is npm_package or debian_package."""
        folder = self._work / "packages" / re.sub(r"[^\w.+-]", "_", f"{name}-{version}")
        try:
            if not folder.is_dir() and fetch in self._offline:
                raise self._offline[fetch]
            return folder if folder.is_dir() else _unpack(folder, partial(fetch, name, version))
        except Offline as error:
            self._offline[fetch] = error
            self.missing[name] = str(error)
        except Unavailable as error:
            self.missing[name] = str(error)
        return None

    def reasons(self) -> str:
        """'a, b (npm reaches no registry); c (there is no apt-get ...)'."""
        reasons: dict[str, list[str]] = {}
        for package, reason in self.missing.items():
            reasons.setdefault(reason, []).append(package)
        return "; ".join(f"{', '.join(packages)} ({reason})" for reason, packages in reasons.items())


def npm_package(name: str, version: str, into: Path) -> Path:
    """An npm package. Raises Unavailable."""
    npm = shutil.which("npm")
    if npm is None:
        raise Offline("npm is not installed")
    command = [npm, "pack", f"{name}@{version}", "--pack-destination", str(into), "--fetch-retries=1"]
    _run([*command, "--loglevel=error"], into)
    archives = sorted(into.glob("*.tgz"))
    if len(archives) != 1:
        raise Unavailable("npm packed nothing")
    with tarfile.open(archives[0]) as archive:
        archive.extractall(into / "files", filter="data")
    return into / "files" / "package"


def debian_package(name: str, version: str, into: Path) -> Path:
    """A Debian package. Raises Unavailable."""
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise Unavailable("there is no apt-get and dpkg on this machine")
    _run(["apt-get", "download", f"{name}={version}"], into)
    archives = sorted(into.glob("*.deb"))
    if len(archives) != 1:
        raise Unavailable("apt-get downloaded nothing")
    _run(["dpkg", "-x", archives[0].name, "files"], into)
    return into / "files"


def _unpack(target: Path, fetch: Callable[[Path], Path]) -> Path:
    """What is fetched into a temporary folder becomes `target`, whole or not at all."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as temporary:
            found = fetch(Path(temporary))
            if not found.is_dir():
                raise Unavailable("the package is empty")
            os.rename(found, target)
    except OSError as error:
        raise explain_os_error(error, f"unpacking into {target}") from error
    return target


_NO_WAY = ("ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ETIMEDOUT", "ENETUNREACH", "ENOTCACHED", "network")


def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise Offline(f"{Path(command[0]).name} did not answer for {_TIMEOUT} seconds") from error
    if done.returncode == 0:
        return
    client = Path(command[0]).name
    if any(sign in done.stderr for sign in _NO_WAY):
        raise Offline(f"{client} reaches no registry")
    lines = [line.strip() for line in done.stderr.splitlines() if " code " not in line and line.strip()]
    raise Unavailable(f"{client} says: {lines[0][:200] if lines else f'exit code {done.returncode}'}")
