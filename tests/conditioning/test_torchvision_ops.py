"""The declarations that let open_clip be imported beside a CPU build of torch."""

from __future__ import annotations

import subprocess
import sys


def _runs(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


def test_torchvision_imports_after_it():
    _runs(
        "from ldm.conditioning.torchvision_ops import declare_missing_operators as declare\n"
        "declare(); declare()\n"
        "import torchvision, torch\n"
        "assert hasattr(torch.ops.torchvision, 'nms')\n"
    )


def test_it_leaves_a_working_torchvision_alone():
    """Where the operators are there already (their extension loaded), nothing is declared a second time."""
    _runs(
        "import torch\n"
        "extension = torch.library.Library('torchvision', 'DEF')\n"
        "extension.define('nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')\n"
        "from ldm.conditioning import torchvision_ops\n"
        "torchvision_ops.declare_missing_operators()\n"
        "assert torchvision_ops._library is None\n"
    )
