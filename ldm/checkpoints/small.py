"""A small network on disk: NAME.json says what it is, NAME.safetensors has its numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as tensor_bytes
from torch import nn

from ldm.errors import UserError, explain_os_error, first_line
from ldm.files import atomic_write_bytes, atomic_write_text
from ldm.plain import read_json

N = TypeVar("N", bound=nn.Module)


def save_network(directory: str | Path, name: str, network: nn.Module, document: Mapping[str, Any]) -> None:
    """Write NAME.json (the `document`) and NAME.safetensors to `directory`."""
    directory = Path(directory)
    state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    atomic_write_bytes(directory / f"{name}.safetensors", tensor_bytes(state))
    atomic_write_text(directory / f"{name}.json", json.dumps(document, indent=1) + "\n")


def load_network(directory: str | Path, name: str, build: Callable[[dict[str, Any], str], N], maker: str) -> N:
    """The network that `save_network` wrote, frozen, in evaluation mode, on the CPU.

    `build` makes it, without numbers, of the document and the name of its file; `maker` is the script that makes
    such networks. Raises UserError for files that are missing, damaged, or do not fit each other.
    """
    directory = Path(directory)
    where = directory / f"{name}.json"
    if not where.exists():
        raise UserError(f"{directory} holds no {where.name}; make one with {maker}")
    document = read_json(where)
    try:
        with torch.device("meta"):  # nothing is allocated for sizes that the file does not have
            network = build(document, str(where))
        state = load_tensors((directory / f"{name}.safetensors").read_bytes())
        network.load_state_dict(state, assign=True)
    except OSError as error:
        raise explain_os_error(error, f"reading {directory}") from error
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError, SafetensorError) as error:
        raise UserError(
            f"the {name.replace('_', ' ')} in {directory} cannot be read ({first_line(error)}): it is damaged, or its "
            f"two files are of different networks; {maker} makes a new one"
        ) from error
    return network.eval().requires_grad_(False)
