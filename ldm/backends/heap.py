"""What the C library (glibc) does with memory that is freed: keep it for the next step, or hand it back at once."""

from __future__ import annotations

import ctypes
from contextlib import suppress

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h; bytes, the second at most 32 MiB
OFTEN = 128 << 20  # bytes


class _Given:
    back = 0  # bytes that were freed since the last time


def keep_memory() -> bool:
    """From now on this process keeps what it frees, for the next step, which takes as much again.

    Otherwise glibc hands it back in each step and the kernel clears each page anew: of a step of 150 ms measured 14.
    False where the C library has no such settings.
    """
    try:
        change = ctypes.CDLL(None).mallopt
        return bool(change(M_MMAP_THRESHOLD, 32 << 20) and change(M_TRIM_THRESHOLD, 1 << 30))
    except (AttributeError, OSError, TypeError):
        return False


def give_back(size: int) -> None:
    """`size` bytes were freed between others that stay; at each 128 MiB of them their pages are handed back.

    Of what a first step takes beside the weights of Stable Diffusion v1.5's shape this saved .32 GB of .70.
    """
    _Given.back += size
    if _Given.back >= OFTEN:
        _Given.back = 0
        with suppress(AttributeError, OSError, TypeError):  # of another C library
            ctypes.CDLL(None).malloc_trim(0)
