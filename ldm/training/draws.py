"""Random numbers of a training step, addressed by name instead of drawn from a stream.

Each sample's numbers are a function of (seed, step, the sample's shard and key, what they are for). So they do not
depend on which process, micro-batch or position the sample came in, and a resumed run needs no generator state.

Stratified numbers cannot do without the position, for the strata belong to a whole global batch. It is the place in
the global order of samples (data/streams.py), which does not depend on processes, workers or micro-batches either:
processes own neighbouring streams, so their shares, one after another, are the global batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def generator(*address: object) -> torch.Generator:
    """A CPU generator seeded by `address`: equal addresses give equal numbers, on every machine."""
    digest = hashlib.blake2b("\x1f".join(map(str, address)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class Draws:
    """The random numbers of one micro-batch whose samples have `keys`.

    They stand at the places `first`, `first` + 1 ... of a global batch of `total`; without these they are one.
    """

    def __init__(
        self,
        seed: int,
        step: int | str,
        keys: Sequence[str],
        device: torch.device | str = "cpu",
        first: int = 0,
        total: int = 0,
    ):
        self.address, self.keys, self.device = (seed, step), keys, device
        self.first, self.total = first, total or len(keys)

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Unit normals (B, *shape), float32."""
        rows = [torch.randn(*shape, generator=generator(*self.address, purpose, key)) for key in self.keys]
        return torch.stack(rows).to(self.device)

    def uniform(self, purpose: str, shape: Sequence[int] = ()) -> Tensor:
        """Uniform numbers (B, *shape) in [0, 1), float64, on the CPU: levels and choices are made of them there, and
        a way to the device and back would wait for all that the device has to do."""
        places = [generator(*self.address, purpose, key) for key in self.keys]
        return torch.stack([torch.rand(tuple(shape), generator=place, dtype=torch.float64) for place in places])

    def stratified(self, purpose: str) -> Tensor:
        """`uniform` moved into strata: of a global batch of N, one number (B,) in each [k / N, (k + 1) / N).

        Which sample gets which stratum is drawn anew for each step, so each number by itself is uniform.
        """
        strata = torch.randperm(self.total, generator=generator(*self.address, purpose, "strata"))
        own = strata[self.first : self.first + len(self.keys)]
        return (own + self.uniform(purpose)) / self.total
