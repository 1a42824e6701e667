"""Run a script or a tool from any folder.

    ldm txt2img --prompt "a red heart"       is python scripts/txt2img.py --prompt "a red heart"
    ldm make-shards photos/ --output data    is python tools/make_shards.py photos/ --output data
    ldm --version                            ldm's version and torch's, the device, and where ldm was imported from

`python -m ldm` is the same, and so it may be given to a launcher: accelerate-launch -m ldm train-diffusion ...
The first word of a name does, if no other begins with it: ldm convert, ldm inspect.
"""

from __future__ import annotations

from ldm.script import run

import ast
import platform
import runpy
import sys
from pathlib import Path

from ldm.errors import UserError, instead
from ldm.home import programs


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        print(about())
        return
    if name == "--version":
        print(version())
        return
    path = find(name)
    sys.argv = [str(path), *sys.argv[2:]]
    sys.path.insert(0, str(path.parent))  # as Python does for a script, for what stands beside it
    runpy.run_path(str(path), run_name="__main__")


def find(name: str) -> Path:
    """The file of a command; raises UserError, with those there are, if there is none."""
    known = {path.stem.replace("_", "-"): path for path in programs()}
    wanted = name.replace("_", "-")
    found = [wanted] if wanted in known else [each for each in known if each.startswith(f"{wanted}-")]
    if not name:
        raise UserError(f"say what to do, one of {', '.join(known)}; ldm --help has a line on each")
    if len(found) > 1:
        raise UserError(f"'{name}' may be {' or '.join(found)}; say which")
    if not found:
        raise UserError(f"unknown command '{name}'{instead(wanted, known)}; ldm --help has a line on each")
    return known[found[0]]


def about() -> str:
    """What this is, and each command with the first line of its file."""
    lines = [(__doc__ or "").strip(), "\ncommands, each with a --help of its own"]
    for path in programs():
        line = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]
        lines.append(f"  {path.stem.replace('_', '-'):24}{line}")
    return "\n".join(lines)


def version() -> str:
    """What a report of a fault should begin with."""
    import torch

    import ldm
    from ldm.device import choose_device

    device = choose_device().type
    device += f" ({torch.cuda.get_device_name()})" if device == "cuda" else ""
    of = f"ldm {ldm.__version__}, torch {torch.__version__}, Python {platform.python_version()}, device {device}"
    return f"{of}; imported from {Path(__file__).parent}"


def command() -> None:
    """The installed command."""
    run(main)


if __name__ == "__main__":
    run(main)
