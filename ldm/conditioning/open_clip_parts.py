"""Two modules of open_clip, its tokenizer and its transformer, without the rest of it.

`import open_clip` brings its training half, its model zoo and torchvision, in seconds of processor time that no picture
needs. The two modules need nothing of that but helpers for the picture side, in `open_clip.utils`. So they are run, as
they are installed, as parts of a package of another name, in which `utils` fetches from the real one whatever is
called. Where that does not work, as it may not with another version of open_clip, they come from open_clip itself.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

from ldm.conditioning.torchvision_ops import declare_missing_operators

ALIAS = "ldm_open_clip"
FAILURES = (ImportError, AttributeError, TypeError)


@cache
def part(name: str) -> Any:
    """open_clip's module `name`: "tokenizer" or "transformer"."""
    try:
        _make_package()
        return importlib.import_module(f"{ALIAS}.{name}")
    except FAILURES:
        return whole(name)


def whole(name: str) -> Any:
    """The same from open_clip itself, all of which is imported."""
    declare_missing_operators()
    return importlib.import_module(f"open_clip.{name}")


def _make_package() -> None:
    if ALIAS in sys.modules:
        return
    found = importlib.util.find_spec("open_clip")
    if found is None or not found.submodule_search_locations:
        raise ImportError("open_clip is not installed")
    package, utils = ModuleType(ALIAS), ModuleType(f"{ALIAS}.utils")
    package.__path__ = list(found.submodule_search_locations)
    utils.__getattr__ = _later  # type: ignore[method-assign]
    sys.modules |= {ALIAS: package, utils.__name__: utils}


def _later(name: str) -> Callable[..., Any]:
    """A function of open_clip.utils that is fetched when it is called."""
    if name.startswith("__"):
        raise AttributeError(name)
    return lambda *arguments, **options: getattr(whole("utils"), name)(*arguments, **options)
