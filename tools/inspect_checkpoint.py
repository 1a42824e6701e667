"""Say what a checkpoint is: its kind, parameters and precision of each network, settings, what is missing or foreign.

python tools/inspect_checkpoint.py v1-5-pruned.safetensors
python tools/inspect_checkpoint.py runs/ldm

Nothing in the file is executed. The exit code is 1 if a network could not be loaded.
"""

from __future__ import annotations

from ldm.script import run

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ldm.arguments import Parser
from ldm.config import to_dict
from ldm.errors import UserError, printable
from ldm.find import WEIGHTS
from ldm.plain import leaves, read_json

if TYPE_CHECKING:
    from ldm.checkpoints.record import Checkpoint

LONG = 12  # entries; longer lists are counted


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("model", help="shipped name, checkpoint directory or file, or hf:owner/name")
    parser.add_argument("--weights", choices=WEIGHTS, default="auto", help="of files with two sets")
    arguments = parser.parse_args()

    from ldm.checkpoints import native  # torch takes seconds, and a mistake is told before
    from ldm.checkpoints.architectures import extra_channels, name_of
    from ldm.checkpoints.opening import open_checkpoint

    checkpoint = open_checkpoint(arguments.model, arguments.weights)
    print(f"{checkpoint.path}: {name_of(checkpoint.config)}, {checkpoint.layout}")
    if extra_channels(checkpoint.config) > 0:
        count = extra_channels(checkpoint.config)
        print(f"  takes {count} channels beside the latent, so a prompt alone draws nothing with it")
    problems = networks(checkpoint)
    settings(checkpoint)
    training(checkpoint)
    for notice in checkpoint.notices:
        print(f"note: {notice}")
    if problems:
        raise UserError("; ".join(problems))
    print(f"weights sha256: {native.fingerprint(checkpoint.tensors())}")
    if checkpoint.path.is_file():
        with open(checkpoint.path, "rb") as file:
            print(f"file sha256:    {hashlib.file_digest(file, 'sha256').hexdigest()}")


def networks(checkpoint: Checkpoint) -> list[str]:
    """Print a line for each network; the sentences about those that are not whole."""
    problems = []
    for name in checkpoint.parts:
        try:
            state = checkpoint.state(name)
        except UserError as error:
            problems.append(str(error))
            print(f"  {name:12s} not whole, see below")
            continue
        forms = [form for form in map(state.form, state) if form[0].is_floating_point]  # T5 has its tokenizer too
        count = sum(math.prod(shape) for _, shape in forms)
        types = Counter(str(dtype).removeprefix("torch.") for dtype, _ in forms)
        print(f"  {name:12s} {count:13,} parameters in {len(forms):4d} tensors, {' and '.join(types)}")
    return problems


def settings(checkpoint: Checkpoint) -> None:
    """Print the model's settings; those that no file says are marked."""
    print("settings (* assumed, the files do not say)")
    for key, value in flat(to_dict(checkpoint.config)):
        print(f"  {key} = {value}{' *' if key in checkpoint.assumed else ''}")


def training(checkpoint: Checkpoint) -> None:
    """Print what is known of how it was trained: words in the file, and our own record beside a directory."""
    beside = checkpoint.path / "config.json"
    facts = dict(checkpoint.facts)
    if checkpoint.layout == "native directory" and beside.is_file():
        facts |= dict(flat(read_json(beside)))
    if facts:
        print("training, and what else the files say")
    for key, value in facts.items():
        print(printable(f"  {key[:80]} = {str(value)[:200]}"))  # a stranger's words


def flat(plain: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """("unet.channels", "320"), ...; what is not there (null) is left out."""
    for key, value in leaves(plain):
        if isinstance(value, list) and len(value) > LONG:
            yield key, f"{len(value):,} entries"
        elif value is not None:
            yield key, json.dumps(value)


if __name__ == "__main__":
    run(main)
