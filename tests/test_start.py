"""What a fresh process pays: modules that drawing must not import, and how a script leaves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldm.conditioning import open_clip_parts
from ldm.conditioning.clip import TextTower, clip_tokenizer
from ldm.config import TextConfig

# Each costs a tenth of a second or more: a library's training half, torch's compiler, what only tools and servers need.
UNWANTED = (
    "open_clip", "torchvision", "timm", "huggingface_hub", "transformers", "diffusers", "accelerate", "webdataset",
    "torchmetrics", "torch_fidelity", "torchdiffeq", "omegaconf", "matplotlib", "scipy", "pandas", "starlette", "wandb",
    "torch._dynamo", "torch._inductor", "torch.onnx", "sympy",
)  # fmt: skip
DRAW = f"""
import sys, ldm
ldm.load(sys.argv[1], device="cpu").txt2img("a red heart", steps=2, cfg=3.0)
print([name for name in {UNWANTED} if name in sys.modules])
"""


def python(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)


def test_drawing_imports_no_more_than_it_needs(tiny_checkpoint: Path):
    done = python("-W", "ignore", "-c", DRAW, tiny_checkpoint)
    assert done.stdout == "[]\n", done.stderr


CONFIG = TextConfig(context_length=16, width=32, heads=2, layers=2, embed_dim=16, quick_gelu=True)


def test_open_clips_parts_are_open_clips(monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    ours, tokens = TextTower(CONFIG), clip_tokenizer().encode("Two dragons, naïvely")
    assert type(ours.transformer).__module__ == "ldm_open_clip.transformer"
    monkeypatch.setattr("ldm.conditioning.clip.part", open_clip_parts.whole)
    torch.manual_seed(0)
    theirs = TextTower(CONFIG)
    assert type(theirs.transformer).__module__ == "open_clip.transformer"
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))
    rows, _ = ours.tokenize(["two dragons"])
    assert torch.equal(ours(rows), theirs(rows))
    assert open_clip_parts.whole("tokenizer").SimpleTokenizer().encode("Two dragons, naïvely") == tokens


def test_a_version_that_does_not_come_apart_is_imported_whole(monkeypatch: pytest.MonkeyPatch):
    open_clip_parts.part.cache_clear()
    monkeypatch.setattr(open_clip_parts, "ALIAS", "ldm_open_clip_of_another_version")

    def refuse(name: str) -> None:
        raise AttributeError(name)

    monkeypatch.setattr(open_clip_parts, "_later", refuse)
    assert open_clip_parts.part("transformer").__name__ == "open_clip.transformer"
    open_clip_parts.part.cache_clear()


SCRIPT = """
from ldm.script import run
import atexit, sys
class Held:
    def __del__(self): sys.__stdout__.write("freed")
held = Held()
atexit.register(print, "told at exit")
def main():
    print("done")
    if sys.argv[1:]: raise ValueError("wrong")
if __name__ == "__main__": run(main)
"""


def test_a_script_that_ended_well_leaves_at_once_and_says_all(tmp_path: Path):
    """Whoever asked to be called at exit is; objects are not freed one by one."""
    (tmp_path / "script.py").write_text(SCRIPT)
    done = python(tmp_path / "script.py")
    assert (done.returncode, done.stdout) == (0, "done\ntold at exit\n")
    failed = python(tmp_path / "script.py", "wrong")
    assert (failed.returncode, failed.stdout) == (1, "done\ntold at exit\nfreed")
