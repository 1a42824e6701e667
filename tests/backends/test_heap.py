"""What is freed is kept, or handed back, as it is asked for: each in a process of its own, since it stays so."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys

import pytest

from ldm.backends import heap

GLIBC = platform.libc_ver()[0] == "glibc"
HELD = """
import ctypes
from ldm.backends import heap

def held():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

c = ctypes.CDLL(None)
c.malloc.restype, c.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
blocks = [c.malloc(100_000) for _ in range(2000)]
for block in blocks:
    ctypes.memset(ctypes.c_void_p(block), 1, 100_000)
before = held()
for block in blocks[:-1]:  # the last one keeps the others' pages from being cut off at the end
    c.free(block)
heap.give_back(heap.OFTEN - 1)
kept = held()
heap.give_back(1)
print((before - kept) // 1_000_000, (before - held()) // 1_000_000)
"""


def said(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


def test_memory_is_kept_where_the_c_library_can(monkeypatch: pytest.MonkeyPatch) -> None:
    assert said("from ldm.backends.heap import keep_memory; print(keep_memory())") == str(GLIBC)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert heap.keep_memory() is False
    heap.give_back(heap.OFTEN)  # is nothing, and no error


@pytest.mark.skipif(not GLIBC, reason="another C library")
def test_what_lies_between_blocks_in_use_is_handed_back_each_128_mib() -> None:
    kept, given = (int(word) for word in said(HELD).split())
    assert kept < 20 and given > 150  # MB, of 200
