"""The figures of sets of pictures: names, refusals, and that order, batches and processes change nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import ldm.metrics.extraction as extraction
from ldm.errors import UserError
from ldm.image_io import to_pil
from ldm.metrics.crew import Crew
from ldm.metrics.distances import density_coverage, inception_score, kernel, precision_recall
from ldm.metrics.extraction import extract
from ldm.metrics.features import FeatureSpace
from ldm.metrics.figures import Measures, alone, between
from ldm.metrics.sources import of_files
from ldm.metrics.tables import space_of, table, tables

WIDTH, LOGITS = 6, 3
SMALL = Measures(subset=8, subsets=5)


def space(name: str = "toy", logits: int = 0, joint: bool = False) -> FeatureSpace:
    """Means over thirds of a picture's rows: 3 bands x 2 halves of one channel, and three logits."""

    def network(image):
        bands = torch.nn.functional.adaptive_avg_pool2d(image[:, :1], (3, 2)).flatten(1)
        return torch.cat([bands, image.mean((2, 3))[:, :logits]], dim=1)

    def text(captions):
        return torch.stack([torch.linspace(0, len(caption), WIDTH) for caption in captions])

    return FeatureSpace(name, WIDTH, network, logits, text if joint else None, hash="0")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Files of 40 random pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = torch.Generator().manual_seed(0)
    for i in range(40):
        to_pil(torch.rand(3, 6, 6, generator=rng) * 2 - 1).save(folder / f"{i:02d}.png")
    return sorted(folder.glob("*.png"))


def source(paths):
    return of_files("some", paths, [f"a thing {path.stem}" for path in paths])


class Together(Crew):
    """One of several processes whose work is done one after another in this one."""

    def wait(self):
        pass


def measured(paths_a, paths_b, cache, world=1, batch_size=4):
    made = []
    for paths in (paths_a, paths_b):
        for rank in reversed(range(world)):
            try:
                found = extract(source(paths), 6, space(logits=LOGITS), cache, Together(rank, world), batch_size)
            except UserError as error:
                assert rank and "damaged" in str(error)  # the others' pieces are not there yet
        made.append(found)
    drawn, real = made
    return between(drawn, real, SMALL) | alone(drawn, source(paths_a), SMALL)


@settings(max_examples=8, deadline=None)
@given(order=st.randoms(use_true_random=False), batch_size=st.integers(1, 9), world=st.integers(1, 3))
def test_order_batches_and_processes_change_nothing(pictures, tmp_path_factory, order, batch_size, world):
    a, b = pictures[:18], pictures[18:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extraction, "PIECE", 5)
        wanted = measured(a, b, tmp_path_factory.mktemp("cache"))
        found = measured(
            order.sample(a, len(a)), order.sample(b, len(b)), tmp_path_factory.mktemp("cache"), world, batch_size
        )
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-6, abs=1e-7), name


def test_the_real_side_is_made_once(pictures, tmp_path):
    first = extract(source(pictures), 6, space(), tmp_path, Crew())
    broken = FeatureSpace("toy", WIDTH, None, hash="0")  # type: ignore[arg-type]
    again = extract(source(pictures[::-1]), 6, broken, tmp_path, Crew())
    torch.testing.assert_close(again.all(), first.all(), atol=0, rtol=0)
    other = FeatureSpace("toy", WIDTH, None, hash="1")  # type: ignore[arg-type]
    for changed in ({"size": 5, "space": broken}, {"size": 6, "space": other}):  # of another size, of other weights
        with pytest.raises(TypeError):
            extract(source(pictures), changed["size"], changed["space"], tmp_path, Crew())


def test_what_does_not_decode_has_no_feature(pictures, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no")
    mixed = of_files("mixed", [*pictures[:3], tmp_path / "bad.png"], ["a", "b", "c", "d"])
    found = extract(mixed, 6, space(), tmp_path / "cache", Crew())
    assert len(found) == 3 and found.all().shape == (3, WIDTH)
    kept = [mixed.items[row].caption for row in found.rows]
    assert sorted(kept) == ["a", "b", "c"]
    with pytest.raises(UserError, match="none of the 1 pictures"):
        extract(of_files("bad", [tmp_path / "bad.png"], [""]), 6, space(), tmp_path / "cache", Crew())


def test_damaged_features_are_named(pictures, tmp_path):
    found = extract(source(pictures), 6, space(), tmp_path, Crew())
    found.paths[0].write_bytes(b"torn")
    with pytest.raises(UserError, match="are damaged"):
        extract(source(pictures), 6, space(), tmp_path, Crew())


def sides(pictures, tmp_path, made):
    return [extract(source(part), 6, made, tmp_path, Crew()) for part in (pictures[:20], pictures[20:])]


def test_names_carry_the_space_and_keep_their_meaning(pictures, tmp_path):
    drawn, real = sides(pictures, tmp_path, space(joint=True))
    found = between(drawn, real, SMALL) | between(drawn, real, SMALL, held_out=True)
    both = {
        "KD[toy]",
        "KD[toy] deviation",
        "CMMD[toy]",
        "precision[toy]",
        "recall[toy]",
        "density[toy]",
        "coverage[toy]",
    }
    tails = {name.replace("[toy]", "[toy] held-out") for name in both}
    assert set(found) == both | tails | {"FD[toy]"}  # held-out pictures are few: no Frechet distance

    drawn, real = sides(pictures, tmp_path, space("inception", LOGITS))
    names = set(between(drawn, real, SMALL) | alone(drawn, source(pictures[:20]), SMALL))
    assert {"FID[inception]", "KID[inception]", "IS[inception]"} <= names
    assert not any(name.startswith(("FD", "KD", "CMMD", "CLIP")) for name in names)


def test_the_numbers_reach_the_figures_they_are_of(pictures, tmp_path):
    drawn, real = sides(pictures, tmp_path, space("inception", LOGITS))
    measures = Measures(subset=8, subsets=5, neighbours=2, ball=4, splits=3)
    found = between(drawn, real, measures) | alone(drawn, source(pictures[:20]), measures)
    a, b = drawn.all(), real.all()
    assert (found["KID[inception]"], found["KID[inception] deviation"]) == kernel(a, b, subsets=5, size=8)
    assert (found["precision[inception]"], found["recall[inception]"]) == precision_recall(a, b, 2)
    assert (found["density[inception]"], found["coverage[inception]"]) == density_coverage(a, b, 4)
    assert found["IS[inception]"] == inception_score(drawn.logits(), 3)[0]


def test_the_protocol_has_the_numbers_of_what_was_asked():
    measures = Measures(("neighbours", "kernel"), subset=8, allow_few=True)
    kernels = {"subset": 8, "subsets": 100, "kernel_seed": 2020}
    assert measures.protocol([space()]) == {"kinds": ["kernel", "neighbours"], **kernels, "neighbours": 3, "ball": 5}
    assert measures.protocol([space(joint=True)])["cmmd_sigma"] == 10
    assert Measures(("frechet",), allow_few=True).protocol([space()]) == {"kinds": ["frechet"]}
    assert "splits" not in Measures().protocol([space()])
    assert Measures().protocol([space(logits=LOGITS)])["splits"] == 10


def test_what_no_space_has_is_refused():
    Measures().check_spaces([space()], captioned=False)  # not asked for by name
    Measures(("captions",)).check_spaces([space(), space(joint=True)], captioned=True)
    for kinds, spaces, captioned, said in (
        (("kernel", "captions"), [space()], True, "captions need a space that they share with pictures"),
        (("captions",), [space(joint=True)], False, "pictures without one"),
        (("score",), [space(joint=True)], True, "needs a space with class logits"),
    ):
        with pytest.raises(UserError, match=said):
            Measures(kinds).check_spaces(spaces, captioned)


def test_counts_alone_tell_what_is_not_defined():
    for measures, counts, said in (
        (Measures(("frechet",)), (6, 20), r"FD\[toy\] fits covariances of 6 dimensions to 6 and 20"),
        (Measures(("kernel",)), (2000, 9), "choose a smaller subset"),
        (Measures(("neighbours",), neighbours=2, ball=9), (9, 20), "9 neighbours need larger sets"),
        (Measures(("score",)), (9, 20), "over 10 parts"),
    ):
        with pytest.raises(UserError, match=said):
            measures.check_counts(space(logits=LOGITS), *counts)
    Measures(("frechet",)).check_counts(space(), 6, 5, held_out=True)


def test_captions_are_looked_for_among_the_different_ones(pictures, tmp_path):
    made = space(joint=True)
    same = of_files("same", pictures[:4], ["one", "one", "three", "three"])
    found = alone(extract(same, 6, made, tmp_path, Crew()), same, SMALL)
    assert set(found) == {"CLIP score[toy]", "caption first of 2 [toy]", "caption in five of 2 [toy]"}
    without = of_files("without", pictures[:4], ["one", "", "", ""])
    assert alone(extract(without, 6, made, tmp_path, Crew()), without, SMALL) == {}


def test_too_few_pictures_are_refused_by_name(pictures, tmp_path):
    made = space()
    few, real = (extract(source(part), 6, made, tmp_path, Crew()) for part in (pictures[:6], pictures[20:]))
    frechet = Measures(("frechet",))
    with pytest.raises(UserError, match=r"FD\[toy\] fits covariances of 6 dimensions to 6 and 20 pictures"):
        between(few, real, frechet)
    assert between(few, real, Measures(("frechet",), allow_few=True)).keys() == {"FD[toy]"}
    with pytest.raises(UserError, match="choose a smaller subset"):
        between(few, real, Measures(("kernel",)))
    for wrong in (Measures(("fid",)), Measures(subset=1), Measures(neighbours=0)):
        with pytest.raises(UserError):
            wrong.check()


def test_spaces_are_never_in_one_column():
    figures = {"FD[a]": 1.0, "FID[inception]": 2.0, "KD[a]": 0.5, "KD[a] deviation": 0.25}
    lines = [line.split() for line in table(figures).split("\n")]
    assert lines == [
        ["a"], ["FD[a]", "1"], ["KD[a]", "0.5", "+-", "0.25"], [], ["inception"], ["FID[inception]", "2"],
    ]  # fmt: skip
    assert "-" in tables([figures, {"FD[a]": 1.0}], ["one", "two"]).split("\n")[3]
    assert space_of("KD[a b] held-out") == "a b" and space_of("psnr") == ""


def test_a_picture_is_measured_as_it_lies_in_its_file(pictures, tmp_path):
    """What the space is given is the 8-bit picture and nothing else."""
    seen = []
    spy = FeatureSpace("spy", 1, lambda image: (seen.append(image), image.mean((1, 2, 3)).unsqueeze(1))[1], hash="0")
    extract(source(pictures[:1]), 6, spy, tmp_path, Crew())
    with Image.open(pictures[0]) as picture:
        levels = torch.tensor(list(picture.tobytes())).view(6, 6, 3).permute(2, 0, 1)
    torch.testing.assert_close((seen[0][0] + 1) * 127.5, levels.float(), atol=1e-4, rtol=0)
