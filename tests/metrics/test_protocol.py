"""Results compare when they were measured alike, and say in what they were not."""

import copy
import json
from types import SimpleNamespace

import pytest

from ldm.errors import UserError
from ldm.metrics import protocol
from ldm.metrics.tables import brief

DOCUMENT = {
    "figures": {"KD[toy]": 0.5, "KD[toy] deviation": 0.1, "FID[inception]": 9.0},
    "subject": {"model": "one", "hash": "1"},
    "protocol": {
        "pictures": 100,
        "drawing": {"cfg": 3.0, "steps": 30, "sampler": "ddim"},
        "held_out": None,
        "spaces": [{"name": "toy", "hash": "a", "resize": "224 px"}, {"name": "inception", "hash": "6726"}],
    },
    "made_on": {"torch": "2.13"},
}


def other(**changes):
    document = copy.deepcopy(DOCUMENT)
    document["subject"] = {"model": "other", "hash": "2"}
    document["made_on"] = {"torch": "2.11"}
    document["figures"] = {"KD[toy]": 0.75, "KD[toy] deviation": 0.1, "FID[inception]": 7.0}
    document["protocol"] |= changes
    return document


@pytest.fixture
def paths(tmp_path):
    def write(document):
        protocol.write(DOCUMENT, tmp_path / "one.json")
        protocol.write(document, tmp_path / "other.json")
        return str(tmp_path / "one.json"), str(tmp_path / "other.json")

    return write


def test_two_subjects_measured_alike_compare(paths):
    lines = [line.split() for line in protocol.compare(paths(other())).split("\n")]
    assert lines[:3] == [
        ["toy"],
        ["one", "other", "difference"],
        ["KD[toy]", *["0.5", "+-", "0.1", "0.75", "+-", "0.1"], "0.25"],
    ]
    assert lines[4:] == [["inception"], ["one", "other", "difference"], ["FID[inception]", "9", "7", "-2"]]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pictures": 200}, "pictures is 100 and 200"),
        ({"drawing": {"cfg": 1.0, "steps": 30, "sampler": "ddim"}}, r"drawing.cfg is 3.0 and 1.0$"),
        ({"drawing": None}, "drawing.steps is 30 and not there"),
        ({"held_out": {"pictures": 3}}, "held_out.pictures is not there and 3"),
        ({"spaces": [{"name": "toy", "hash": "b", "resize": "224 px"}]}, "spaces.toy.hash is a and b"),
    ],
)
def test_unlike_protocols_are_refused_and_named(paths, changes, said):
    with pytest.raises(UserError, match=f"do not compare: .*{said}"):
        protocol.compare(paths(other(**changes)))


def test_what_is_meant_to_differ_may(paths):
    both = paths(other(drawing={"cfg": 1.0, "steps": 20, "sampler": "ddim"}))
    with pytest.raises(UserError, match=r"drawing\.steps"):
        protocol.compare(both, ["drawing.cfg"])
    assert "difference" in protocol.compare(both, ["drawing.cfg", "drawing.steps"])
    assert "difference" in protocol.compare(both, ["drawing"])


def test_what_was_read_from_where_may_differ(paths):
    document = other()
    document["sources"] = {"reference": "elsewhere/*.tar"}
    assert "difference" in protocol.compare(paths(document))


def test_the_weights_are_those_that_were_used():
    def weights(two_sets, asked):
        checkpoint = SimpleNamespace(two_sets=two_sets)
        model = SimpleNamespace(name="m", hash="0", notices=(), checkpoint=checkpoint)
        return protocol.subject_of(model, asked)["weights"]  # type: ignore[arg-type]

    assert [weights(True, asked) for asked in ("auto", "ema", "raw")] == ["ema", "ema", "raw"]
    assert weights(False, "auto") == "the only ones"


def test_few_lines_tell_how_it_was_measured():
    document = {**DOCUMENT, "sources": {"reference": "real/*.tar"}}
    document["protocol"] = {
        **DOCUMENT["protocol"],
        "reference": {"pictures": 9, "hash": "ab" * 32},
        "prompts": ["a"] * 9,
        "seeds": [5, 13],
    }
    lines = brief(document, without=["steps"]).split("\n")
    assert lines == [
        "",
        "measured so:",
        "  subject    model one, hash 1",
        "  pictures   100",
        "  drawing    cfg 3, sampler ddim",
        "  spaces     name toy, hash a, resize 224 px; name inception, hash 6726",
        "  reference  pictures 9, hash abababab",
        "  prompts    9 of them",
        "  seeds      5 to 13",
        "  sources    reference real/*.tar",
    ]


def test_other_files_are_no_results(tmp_path):
    for text, said in (
        ("{", "not hold valid JSON"),
        ("[" * 10**5, "not hold valid JSON"),
        ("{}", "no result of scripts"),
        ("[]", "holds a list"),
    ):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(UserError, match=said):
            protocol.read(tmp_path / "a.json")


def test_a_result_says_what_made_it():
    made = protocol.result({"psnr": 1.0}, {"model": "x"}, {"size": 3}, latents={"mean": 0})
    assert {"ldm", "torch", "torch-fidelity", "python", "hardware"} <= made["made_on"].keys()
    assert json.loads(json.dumps(made)) == made
