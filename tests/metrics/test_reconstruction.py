"""Stage one's figures on a codec and a space that are so simple that the figures are known."""

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.autoencoder.codec import Codec
from ldm.checkpoints import native
from ldm.config import AutoencoderConfig
from ldm.errors import UserError
from ldm.metrics import reconstruction
from ldm.metrics.features import FeatureSpace
from ldm.metrics.moments import Moments
from ldm.metrics.reconstruction import autoencoder_table, evaluate_autoencoder, latent_statistics
from ldm.metrics.sources import Source, of_files

SHIFT, SCALE = (0.1, -0.2, 0.3), (2.0, 1.0, 0.5)


class Halved(Codec):
    """Encodes pixels, less SHIFT and times SCALE; decodes x to a x + b, with which a level becomes level / 2 + 10.4."""

    def __init__(self) -> None:
        super().__init__(None, AutoencoderConfig(kind="identity", latent_channels=3, shift=SHIFT, scale=SCALE))

    def encode(self, image):
        return self.to_latent(image)

    def decode(self, latent):
        return 0.5 * self.from_latent(latent) + (10.4 / 127.5 - 0.5)


def levels(image):
    """Images of one colour (B, 3, H, W) -> its channels in levels from 0 to 255, (B, 3)."""
    return (image.mean((2, 3)) + 1) * 127.5


SPACE = FeatureSpace("toy", 3, levels, hash="0")


@pytest.fixture
def colours(tmp_path) -> tuple[np.ndarray, Source]:
    """Levels (30, 3), all of them even, and pictures of 12 x 12 pixels of these colours."""
    drawn = 2 * np.random.default_rng(0).integers(0, 128, (30, 3))
    for number, colour in enumerate(drawn):
        Image.new("RGB", (12, 12), tuple(map(int, colour))).save(tmp_path / f"{number:02d}.png")
    return drawn.astype(float), of_files("colours", sorted(tmp_path.glob("*.png")), [""] * 30)


def test_the_frechet_distance_of_decoded_pictures(colours):
    """Of x and x / 2 + 10, in levels: |mean / 2 - 10|^2 + tr C / 4. Rounding to 8 bits makes 10 of the 10.4."""
    x, source = colours
    found = evaluate_autoencoder(Halved(), source, 12, spaces=[SPACE], batch_size=7)["figures"]
    wanted = np.square(x.mean(0) / 2 - 10).sum() + np.trace(np.cov(x.T)) / 4
    assert found["rFD[toy]"] == pytest.approx(wanted, rel=1e-6)
    assert found["pictures"] == 30


def test_what_does_not_decode_is_not_counted(colours, tmp_path, caplog):
    paths = [item.place for item in colours[1].items]
    (tmp_path / "torn.png").write_bytes(paths[0].read_bytes()[:40])
    with_torn = of_files("colours", [*paths, tmp_path / "torn.png"], [""] * 31)
    whole, found = (evaluate_autoencoder(Halved(), source, 12) for source in (colours[1], with_torn))
    assert found["figures"] == whole["figures"] and found["protocol"]["pictures"] == whole["protocol"]["pictures"]
    assert "1 of the 31 pictures of colours do not decode" in caplog.text


def test_psnr_is_of_the_decoded_before_they_are_rounded(colours):
    x, source = colours
    error = np.square(x / 2 - 10.4).mean(1)
    found = evaluate_autoencoder(Halved(), source, 12)["figures"]
    assert found["psnr"] == pytest.approx((10 * np.log10(255**2 / error)).mean(), abs=1e-4)


def test_the_statistics_of_latents(colours):
    x, source = colours
    latents = (x / 127.5 - 1 - np.array(SHIFT)) * np.array(SCALE)
    found = evaluate_autoencoder(Halved(), source, 12)["latents"]
    assert found["mean"] == pytest.approx(latents.mean(0), abs=1e-4)
    count = 30 * 12 * 12  # positions; each picture's are alike
    assert found["deviation"] == pytest.approx(latents.std(0) * (count / (count - 1)) ** 0.5, abs=1e-4)
    off_diagonal = np.corrcoef(latents.T) - np.eye(3)
    assert found["correlation"] == pytest.approx(np.abs(off_diagonal).max(), abs=1e-4)
    assert found["furthest"] == pytest.approx(np.abs(latents).max(), abs=1e-3)


def test_the_largest_correlation_may_be_negative():
    """Of t and s - t, where s and t are 1 and -1 in all pairs: -1 / sqrt 2. Of t and -t: -1."""
    t, s = torch.tensor([1.0, 1, -1, -1]), torch.tensor([1.0, -1, 1, -1])
    for channels, wanted in (([t, s - t], 0.5**0.5), ([t, -t, s], 1.0)):
        found = latent_statistics(Moments.of(torch.stack(channels, dim=1)), 1.0)
        assert found["correlation"] == pytest.approx(wanted, abs=1e-5)


def test_a_perceptual_distance_is_said_by_its_weights(colours, monkeypatch):
    class Distance(torch.nn.Linear):
        def forward(self, a, b):
            return (levels(a) - levels(b)).abs().mean(1)

    network = Distance(2, 2)
    monkeypatch.setattr(reconstruction, "build_perceptual", lambda name: network)
    made = evaluate_autoencoder(Halved(), colours[1], 12, name="x", spaces=[SPACE], perceptual=["efficientnet-lite0"])
    name = "perceptual[efficientnet-lite0]"
    assert made["protocol"]["perceptual"] == [{"name": name, "hash": native.fingerprint(network)}]
    assert made["figures"][name] == pytest.approx(np.abs(colours[0] / 2 - 10.4).mean(), abs=1e-4)
    assert made["sources"] == {"pictures": "colours"} and made["subject"]["model"] == "x"
    lines = autoencoder_table(made).split("\n")
    assert lines[-5:-3] == ["efficientnet-lite0", lines[-4]] and lines[-4].startswith(name)
    assert lines[-2] == "toy" and lines[-1].startswith("rFD[toy]")  # never two spaces in one column


def test_sizes_and_counts_that_cannot_be(colours):
    for size in (-3, 0, 10):
        with pytest.raises(UserError, match=f"pictures of {size} pixels are smaller than the window of SSIM"):
            evaluate_autoencoder(Halved(), colours[1], size)
    wide = FeatureSpace("wide", 30, levels)
    with pytest.raises(UserError, match=r"rFD\[wide\] fits covariances of 30 dimensions to 30 pictures"):
        evaluate_autoencoder(Halved(), colours[1], 12, spaces=[wide])
