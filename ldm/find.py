"""A model's name -> where it lies, for every command and setting that names one. No torch in here."""

from __future__ import annotations

import re
from pathlib import Path

from ldm.checkpoints.run_folder import why_no_model
from ldm.errors import UserError

WEIGHTS = ("auto", "ema", "raw")  # which of a file that holds two sets
SHIPPED = {"icons": Path(__file__).parent / "assets" / "icons"}
"""The models inside the package: name -> checkpoint directory."""
SHIPPED_LORAS = {"four": SHIPPED["icons"] / "four.safetensors"}
"""The LoRAs inside the package: with `four`, icons draws in four evaluations."""


def find(model: str | Path) -> Path:
    """The checkpoint that `model` names: a shipped name, a directory, a file, or `hf:owner/name`.

    Raises UserError for what is not there, and for what a training wrote that is not a model, or not yet.
    """
    if not isinstance(model, str | Path) or not str(model).strip():
        raise UserError(f"a model is named by a text or a path, not by {model!r:.60}; such as {', '.join(SHIPPED)}")
    if model in SHIPPED:
        return SHIPPED[str(model)]
    if str(model).startswith("hf:"):
        from ldm.checkpoints.hub import fetch

        return fetch(str(model).removeprefix("hf:"))
    path = Path(model)
    if not path.exists() and model in SHIPPED_LORAS:
        raise UserError(f"{model} is a LoRA, which goes over a model; say --lora {model} beside the model")
    if not path.exists():
        names = ", ".join(SHIPPED)
        could_be = re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)) is not None
        remote = f"; hf:{model} would fetch it from Hugging Face" if could_be else ""
        raise UserError(
            f"there is no model '{model}': it is neither one that ships ({names}) nor a directory or file{remote}"
        )
    if why := why_no_model(path):
        raise UserError(why)
    return path


def find_lora(lora: str) -> str:
    """The file of a LoRA: that of a shipped one's name, or else the path itself."""
    return str(SHIPPED_LORAS.get(lora, lora))
