"""Less memory for the same pictures, to rounding: networks that are run piece by piece, and elsewhere when they rest.

    rows        a network is evaluated on so many pictures at once; guidance has one for each branch of each picture
    device      a network is on the device for as long as it works there (`visiting`)

After an out-of-memory error the pieces become smaller by themselves, and a MemoryNotice says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ldm.conditioning.condition import Condition
from ldm.errors import MemoryNotice, out_of_memory

if TYPE_CHECKING:
    from ldm.autoencoder.codec import Codec
    from ldm.diffusion.denoiser import Network
    from ldm.model import Model

T = TypeVar("T")


class InPieces:
    """Network -> Network: `network` on at most `rows` pictures at once; None: on all of them. What has no `prepare` is
    told the conditions as they are.

    Where the memory does not suffice it goes on with half as many, down to one. What a piece is told is prepared once.
    """

    def __init__(self, network: Network | Callable[..., Tensor], rows: int | None = None) -> None:
        self.network, self.rows = network, rows

    def prepare(self, told: Condition) -> Callable[[int, int], Any]:
        """(start, stop) -> what the network made of these rows."""
        kept: dict[tuple[int, int], Any] = {}
        make = getattr(self.network, "prepare", lambda told: told)

        def prepared(start: int, stop: int) -> Any:
            if (start, stop) not in kept:
                whole = stop - start == len(told)
                kept[start, stop] = make(told if whole else told[start:stop])
            return kept[start, stop]

        return prepared

    def __call__(self, x: Tensor, t: Tensor, told: Callable[[int, int], Any]) -> Tensor:
        count = len(x)

        def evaluate(rows: int) -> Tensor:
            ends = [(start, min(start + rows, count)) for start in range(0, count, rows)]
            if len(ends) == 1:
                return self.network(x, t, told(0, count))
            return torch.cat([self.network(x[a:b], t[a:b], told(a, b)) for a, b in ends])

        rows = min(self.rows or count, count)
        while True:
            found = _attempt(partial(evaluate, rows), last=rows == 1)
            if found is not None:
                return found
            rows = self.rows = -(-rows // 2)
            _say(f"the network is run on {rows} at once, where it was {count}")


def decode(codec: Codec, latent: Tensor, tile: int | None, rows: int | None, least: int) -> Tensor:
    """`codec.decode` of `rows` pictures at once, None: of all; in tiles of `tile` pixels, None: whole.

    Where the memory does not suffice it is tried once more, a picture at a time, and then in tiles of `least` pixels.
    """
    ways = [(rows or len(latent), tile), (1, tile), (1, min(tile or least, least))]
    ways = list(dict.fromkeys((min(count, len(latent)), side) for count, side in ways))

    def evaluate(count: int, side: int | None) -> Tensor:
        parts = [
            codec.decode(part) if side is None else codec.decode_tiled(part, side, codec.overlap(side))
            for part in latent.split(count)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    for index, (count, side) in enumerate(ways):
        if index:
            tiles = f", in tiles of {side} pixels, whose tones may differ a little" if side != tile else ""
            _say(f"pictures are decoded one by one{tiles}")
        found = _attempt(partial(evaluate, count, side), last=index + 1 == len(ways))
        if found is not None:
            return found
    raise AssertionError("the last way ends in pictures or in an error")


@contextmanager
def visiting(model: Model, *networks: nn.Module | None) -> Iterator[None]:
    """`networks` on the model's device in here, where they rest elsewhere to save memory."""
    away = model.works_on is not None and model.works_on.type != "cpu"
    there = [network for network in networks if network is not None and away]
    try:
        for network in there:
            network.to(model.works_on)
        yield
    finally:
        for network in there:
            network.to("cpu")


def _attempt(work: Callable[[], T], last: bool) -> T | None:
    """What `work` gives, or None where the memory did not suffice for it; the `last` attempt's error is passed on."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if last or not out_of_memory(error):
            raise
    if torch.cuda.is_available():  # only here: the error held what was allocated
        torch.cuda.empty_cache()
    return None


def _say(what: str) -> None:
    warnings.warn(f"the device's memory did not suffice, so {what}", MemoryNotice, stacklevel=2)
