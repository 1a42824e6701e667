"""From shards of real pictures to prompts, prototypes and scores."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from metrics.pictures_maker import COLOURS, STYLES, toy_shard  # tests/ is the root of the tests' packages

from ldm.data.writing import write_shard
from ldm.errors import UserError
from ldm.judge.pictures import Pictures, read_concepts, read_pictures
from ldm.judge.prompts import Judge, Score, make_prompts, phrase


class MeanColour:
    """Stands in for a classifier: its features are the mean colour of the middle, as a direction."""

    config = SimpleNamespace(styles=("noto emoji", "flat emoji"), size=32)

    def features(self, image: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize((image[:, :, 8:-8, 8:-8] + 1).mean(dim=(2, 3)), dim=1)


@pytest.fixture
def pictures(tmp_path: Path) -> Pictures:
    return read_pictures(toy_shard(tmp_path / "toy.tar"), {}, 32)


def test_pictures_carry_concept_style_and_caption(pictures):
    assert len(pictures) == 9
    assert pictures.image.shape == (9, 3, 32, 32)
    assert pictures.name == tuple(COLOURS) * 3
    assert pictures.caption[4] == "a green apple, flat emoji"
    some = pictures.of(["blue fish", "red heart"], ["emojitwo"])
    assert (some.name, some.style) == (("red heart", "blue fish"), ("emojitwo", "emojitwo"))
    assert some.labels(["blue fish", "red heart"]).tolist() == [1, 0]


def test_where_and_unusable_pictures(tmp_path):
    shard = toy_shard(tmp_path / "toy.tar")
    assert set(read_pictures(shard, {"style": ["emojitwo"]}, 16).style) == {"emojitwo"}
    write_shard(tmp_path / "bad.tar", [("0", {"png": b"no picture", "txt": b"a thing", "json": b"{}"})])
    with pytest.raises(UserError, match="does not decode"):
        read_pictures(str(tmp_path / "bad.tar"), {}, 16)


def test_prompts_use_the_shortest_phrase_of_the_captions(pictures):
    one = Pictures(
        torch.zeros(3, 3, 1, 1),
        ("fish",) * 3,
        ("noto emoji",) * 3,
        ("a fish on a gray background, noto emoji", "a fish, noto emoji", "fish"),
    )
    assert phrase(one, "fish") == "a fish"
    with pytest.raises(UserError, match="'fish'"):
        phrase(one.of(["bird"], ["noto emoji"]), "fish")
    prompts = make_prompts(pictures, ["blue fish", "red heart"], ["flat emoji", "3d render"])
    assert [p.text for p in prompts] == [
        "a blue fish, flat emoji", "a red heart, flat emoji", "a blue fish, 3d render", "a red heart, 3d render",
    ]  # fmt: skip
    assert prompts[3].concept == "red heart" and prompts[3].style == "3d render"
    only = {("red heart", "flat emoji"), ("blue fish", "3d render")}
    some = make_prompts(pictures, ["blue fish", "red heart"], ["flat emoji", "3d render"], ["orange", "red"], only)
    assert [p.text for p in some] == [
        "a red heart on an orange background, flat emoji", "a blue fish on a red background, 3d render",
    ]  # fmt: skip
    assert [p.colour for p in some] == ["orange", "red"]
    with pytest.raises(UserError, match="--pairs shows none"):
        make_prompts(pictures, ["blue fish"], ["flat emoji"], pairs={("red heart", "flat emoji")})


def test_the_judge_knows_the_colours(pictures):
    judge = Judge(MeanColour(), pictures, list(COLOURS))  # type: ignore[arg-type]
    assert judge.pictures == 6  # the third style is not the classifier's
    unseen = pictures.of(list(COLOURS), ["emojitwo"])
    assert judge.ranks(unseen.image, unseen.name).tolist() == [0, 0, 0]
    wrong = ["green apple", "blue fish", "red heart"]
    assert bool((judge.ranks(unseen.image, wrong) > 0).all())
    larger = torch.nn.functional.interpolate(unseen.image, scale_factor=2)
    assert judge.ranks(larger, unseen.name).tolist() == [0, 0, 0]


def test_the_judge_needs_pictures_of_each_concept(pictures):
    with pytest.raises(UserError, match="no picture of green apple"):
        Judge(MeanColour(), pictures.of(["red heart"], STYLES), ["red heart", "green apple"])  # type: ignore[arg-type]


def test_score():
    score = Score.of(torch.tensor([0, 0, 3, 7]))
    assert score == Score(2, 3, 4)
    figures = score.figures()
    assert (figures["pictures"], figures["top1"], figures["top5"]) == (4, 0.5, 0.75)
    assert figures["low"] == pytest.approx(0.15, abs=0.001)


def test_concepts_are_a_list_of_names(tmp_path):
    shipped = read_concepts(Path(__file__).parents[2] / "configs" / "evaluation" / "concepts64.yaml")
    assert len(shipped) == 64
    path = tmp_path / "c.yaml"
    for text, complaint in (("- a\n- a\n", "twice"), ("a: b\n", "must be a list"), ("[", "not valid YAML")):
        path.write_text(text)
        with pytest.raises(UserError, match=complaint):
            read_concepts(path)
