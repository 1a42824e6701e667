"""Loading a model holds its weights once. (Seconds are measured by the same tool, and asserted nowhere.)"""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a process its peak")
def test_the_peak_is_what_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Stable Diffusion v1's shapes in a float16 file of 2 GB: held as they are, and converted to float32."""
    monkeypatch.syspath_prepend(str(TOOLS))
    sides = runpy.run_path(str(TOOLS / "benchmark.py"))["sides"]
    path = sides.random_model(tmp_path / "v1", sides.shape("sd"), half=True)
    try:
        for precision, size in (("fp16", 2.1e9), ("fp32", 4.2e9)):
            words = ["alone", "--of", "load", "--model", str(path), "--precision", precision, "--sides", "ldm"]
            tool = [sys.executable, str(TOOLS / "benchmark.py")]
            done = subprocess.run([*tool, *words], capture_output=True, text=True, check=True)
            figures = json.loads(done.stdout.splitlines()[-1])
            assert size < figures["held"] < figures["peak"] <= 1.3 * figures["held"], precision
    finally:
        for file in path.rglob("*.safetensors"):
            file.unlink()
