"""The Inception network that FID, KID and the Inception Score are defined with, by torch-fidelity.

Its weights (ported from TensorFlow's file of 2015-12-05) are 92 MB and in no package: they come from a file, or by a
download that was asked for. A figure of other weights is no FID, so the file's hash is checked either way.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
import urllib.request
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from ldm.conditioning.torchvision_ops import declare_missing_operators
from ldm.errors import UserError, explain_os_error, first_line
from ldm.metrics.features import FeatureSpace, resized

SHA256 = "6726825d"  # how the sha256 of the published file begins; its name says so
SIDE = 299
WIDTH, LOGITS = 2048, 1008


def inception(weights: str, legacy: bool = False, device: str = "cpu") -> FeatureSpace:
    """The space of the 2048 pooled features, the 1008 logits without bias behind them.

    `legacy` leaves resizing to the network, as the first FIDs did: bilinear without antialiasing, and off by half a
    pixel. Otherwise pictures are resized by an antialiased bicubic filter and rounded to 8 bits, which the network
    takes. `weights`: a file, or "download". Raises UserError for a file that is missing or of another hash.
    """
    content = _fetched() if weights == "download" else _read(weights)
    found = hashlib.sha256(content).hexdigest()
    if not found.startswith(SHA256):
        raise UserError(
            f"{weights} is not the network that FID is defined with: its sha256 begins with {found[:8]}, not {SHA256}; "
            "the file is named weights-inception-2015-12-05-6726825d.pth by torch-fidelity"
        )
    network = build(content).to(device)

    def features(image: Tensor) -> Tensor:
        seen = image if legacy else resized(image, SIDE)
        levels = seen.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
        return torch.cat(network(levels), dim=1)

    name = "inception-legacy" if legacy else "inception"
    how = "bilinear of TensorFlow 1, not antialiased" if legacy else "bicubic, antialiased, rounded to 8 bits"
    return FeatureSpace(name, WIDTH, features, LOGITS, hash=found, resize=f"{SIDE} px, {how}", device=device)


def build(content: bytes) -> torch.nn.Module:
    """torch-fidelity's network with the weights of a file's bytes; uint8 (B, 3, H, W) -> features, logits.

    It would unpickle a file whole; what it is given here are tensors that were read as data and packed again.
    """
    declare_missing_operators()  # torch-fidelity imports torchvision
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    packed = io.BytesIO()
    try:
        torch.save(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True), packed)
        packed.seek(0)
        return FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], packed)
    except (RuntimeError, ValueError, KeyError, EOFError, UnpicklingError) as error:
        raise UserError(f"the Inception weights cannot be read ({first_line(error)}); fetch them") from error


def _read(path: str) -> bytes:
    if not path:
        raise UserError("the Inception weights are in no package; say inception=FILE, or inception=download to fetch")
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise explain_os_error(error, f"reading the Inception weights {path}") from error


def _fetched() -> bytes:
    """The file, from the cache of torch.hub or from where torch-fidelity publishes it."""
    declare_missing_operators()
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rpartition("/")[2]
    if path.is_file():
        return path.read_bytes()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            kept = Path(folder) / path.name
            with urllib.request.urlopen(URL_INCEPTION_V3, timeout=60) as answer:
                kept.write_bytes(answer.read())
            if hashlib.sha256(kept.read_bytes()).hexdigest().startswith(SHA256):
                kept.replace(path)
                return path.read_bytes()
            return kept.read_bytes()
    except OSError as error:
        raise UserError(f"the Inception weights cannot be fetched ({error}); give them as inception=FILE") from error
