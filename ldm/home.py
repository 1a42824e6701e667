"""Scripts, tools and recipes: they stand beside the package in a checkout, and inside it where it is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from ldm.errors import UserError, instead

_PACKAGE = Path(__file__).parent
HOME = _PACKAGE if (_PACKAGE / "scripts").is_dir() else _PACKAGE.parent


def programs() -> Iterator[Path]:
    """Each file of scripts/ and tools/ that is a command, in this order."""
    for folder in ("scripts", "tools"):
        for path in sorted((HOME / folder).glob("*.py")):
            if '__name__ == "__main__"' in path.read_text(encoding="utf-8"):
                yield path


def recipe(folder: str) -> Callable[[str], Path]:
    """A flag's type: `find_recipe` in a folder of configs/."""
    return partial(find_recipe, folder=folder)


def find_recipe(name: str, folder: str = "") -> Path:
    """A file of settings: one of the user's, or a shipped one by its path (configs/diffusion/icons.yaml) or by its name
    (icons) in a `folder` of configs/. Raises UserError, naming the shipped ones, if there is none."""
    for path in (Path(name), HOME / name, HOME / "configs" / folder / f"{name}.yaml"):
        if path.is_file():
            return path
    shipped = [path.stem for path in sorted((HOME / "configs" / folder).glob("*.yaml"))]
    raise UserError(f"there is no file of settings {name}, and no recipe of that name{instead(name, shipped)}")
