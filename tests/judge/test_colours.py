"""A background is judged by the border's colour."""

from pathlib import Path

import pytest
import torch

from ldm.errors import UserError
from ldm.judge.colours import border, colour_ranks, read_colours

SHIPPED = read_colours(Path(__file__).parents[2] / "configs" / "evaluation" / "colours.yaml")


def flat(colour, height=64, width=96) -> torch.Tensor:
    return (
        (torch.tensor(colour, dtype=torch.float32) / 127.5 - 1).reshape(1, 3, 1, 1).expand(1, 3, height, width).clone()
    )


def test_the_border_is_the_outermost_pixels_alone():
    image = flat((40, 80, 120))
    image[:, :, 2:-2, 3:-3] = 1  # 1 / 32 of each side stays
    assert border(image)[0].tolist() == pytest.approx([40, 80, 120], abs=1e-4)
    image[:, :, 1] = 1
    assert border(image)[0, 0] > 60
    assert border(flat((10, 20, 30), 8, 8))[0].tolist() == pytest.approx([10, 20, 30], abs=1e-4)  # one pixel at least


@pytest.mark.parametrize("name", SHIPPED)
def test_each_shipped_colour_is_nearest_to_itself(name):
    image = flat(SHIPPED[name])
    assert colour_ranks(image, [name], SHIPPED).tolist() == [0]
    others = [other for other in SHIPPED if other != name]
    assert bool((colour_ranks(image.expand(len(others), -1, -1, -1), others, SHIPPED) > 0).all())


def test_places_by_hand_and_a_tie_counts_against_the_picture():
    colours = {"one": (127, 128, 127), "far": (0, 200, 0), "other": (128, 127, 128)}
    image = torch.zeros(3, 3, 64, 64)  # 127.5: as far from one as from the other
    assert colour_ranks(image, ["one", "other", "far"], colours).tolist() == [1, 1, 2]


@pytest.mark.parametrize(
    "text", ["- red", "red: 3", "red: [1, 2]", "red: [1, 2, 256]", "red: [1, 2, true]", "1: [1, 2, 3]"]
)
def test_what_is_no_colour_is_refused(text, tmp_path):
    path = tmp_path / "colours.yaml"
    path.write_text(text + "\n")
    with pytest.raises(UserError, match="must name colours by red, green and blue from 0 to 255"):
        read_colours(path)


def test_one_colour_is_not_enough(tmp_path):
    path = tmp_path / "colours.yaml"
    path.write_text("white: [255, 255, 255]\n")
    with pytest.raises(UserError, match="two colours at least"):
        read_colours(path)
