"""Pictures that are drawn to be measured: by any number of processes, in any number of runs, the same bytes."""

import json
from pathlib import Path

import pytest

from ldm.errors import UserError
from ldm.jobs import Settings
from ldm.metrics.crew import Crew, muster
from ldm.metrics.drawing import Drawing, draw, evaluations

CAPTIONS = ("a red heart", "a blue fish", "a green apple")
DRAWING = Drawing(CAPTIONS, Settings(cfg=2.0, steps=2), count=7, seed=5, batch_size=2)


class Together(Crew):
    """One of several processes whose work is done one after another in this one."""

    def wait(self) -> None:
        pass


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*.png")}


def test_the_work_is_divided_once():
    assert sorted(piece for rank in range(3) for piece in Crew(rank, 3).mine(8)) == list(range(8))
    assert muster() == Crew(0, 1) and muster().main


def test_captions_in_turn_and_a_seed_each():
    requests = DRAWING.requests(2, 3)
    assert [(r.prompt, r.seed) for r in requests] == [("a green apple", 7), ("a red heart", 8), ("a blue fish", 9)]


def test_pictures_do_not_depend_on_processes_or_interruptions(tiny_model, tmp_path):
    whole = draw(tiny_model, DRAWING, tmp_path / "one", Crew())
    assert len(whole) == 7 and len(contents(tmp_path / "one")) == 7
    assert evaluations(tmp_path / "one") == 4  # two steps, each with and without the prompt

    draw_alone = [Together(rank, 3) for rank in (0, 1, 2)]
    for crew in draw_alone[:2]:  # the last comes when the others are gone
        with pytest.raises(UserError, match="no such file"):
            draw(tiny_model, DRAWING, tmp_path / "three", crew)
    parts = draw(tiny_model, DRAWING, tmp_path / "three", draw_alone[2])
    assert contents(tmp_path / "three") == contents(tmp_path / "one")
    assert parts.digest == whole.digest

    few = Drawing(CAPTIONS, DRAWING.settings, 3, 5, 2)
    draw(tiny_model, few, tmp_path / "later", Crew())
    kept = contents(tmp_path / "later")
    draw(tiny_model, DRAWING, tmp_path / "later", Crew())
    assert contents(tmp_path / "later") == contents(tmp_path / "one") and len(kept) == 3


def test_what_is_there_is_not_drawn_again(tiny_model, tmp_path, monkeypatch):
    draw(tiny_model, DRAWING, tmp_path, Crew())
    monkeypatch.setattr("ldm.generate.sample", None)  # would fail
    assert len(draw(tiny_model, DRAWING, tmp_path, Crew())) == 7


def test_pictures_drawn_otherwise_are_refused(tiny_model, tmp_path):
    draw(tiny_model, Drawing(CAPTIONS, DRAWING.settings, 1), tmp_path, Crew())
    with pytest.raises(UserError, match="made with another steps; choose another folder"):
        draw(tiny_model, Drawing(CAPTIONS, Settings(cfg=2.0, steps=3), 1), tmp_path, Crew())
    with pytest.raises(UserError, match="another captions_hash"):
        draw(tiny_model, Drawing(CAPTIONS[::-1], DRAWING.settings, 1), tmp_path, Crew())
    with pytest.raises(UserError, match="choose 1 or more"):
        draw(tiny_model, Drawing(CAPTIONS, DRAWING.settings, 0), tmp_path, Crew())


def test_damaged_files_beside_the_pictures_are_named(tiny_model, tmp_path):
    one = Drawing(CAPTIONS, DRAWING.settings, 1)
    draw(tiny_model, one, tmp_path, Crew())
    for content in ("", "{}", "[]", "[" * 10**5, '{"evaluations": null}'):
        (tmp_path / "cost.json").write_text(content)
        with pytest.raises(UserError, match=r"cost\.json is damaged; remove it"):
            evaluations(tmp_path)
    (tmp_path / "cost.json").unlink()
    draw(tiny_model, one, tmp_path, Crew())
    assert evaluations(tmp_path) == 4
    for content, said in (
        ('{"model"', "is damaged"),
        ("[" * 10**5, "is damaged"),
        ("[]", "does not say how its pictures were made"),
    ):
        (tmp_path / "drawing.json").write_text(content)
        with pytest.raises(UserError, match=said):
            draw(tiny_model, one, tmp_path, Crew())


def test_two_that_begin_at_once_agree_upon_how_it_is_drawn(tiny_model, tmp_path, monkeypatch):
    draw(tiny_model, DRAWING, tmp_path, Crew())
    monkeypatch.setattr(Path, "exists", lambda _: False)  # the other one has written it meanwhile
    with pytest.raises(UserError, match="pictures made with another first_seed; choose another folder"):
        draw(tiny_model, Drawing(CAPTIONS, DRAWING.settings, 1, seed=9, batch_size=2), tmp_path, Crew())


def test_seeds_are_not_negative_and_have_63_bits():
    for seed in (-5, 2**63 - 1):
        with pytest.raises(UserError, match=f"the first seed is {seed}; choose it between 0 and"):
            Drawing(CAPTIONS, DRAWING.settings, 1, seed).check()


def test_the_protocol_names_what_the_pictures_depend_on(tiny_model):
    made = DRAWING.protocol(tiny_model)
    assert made | {"captions_hash": ""} == {
        "cfg": 2.0, "steps": 2, "sampler": "dpmpp_2m", "spacing": "karras", "options": made["options"], "width": 32,
        "height": 32, "captions": 3, "captions_hash": "", "first_seed": 5, "batch_size": 2, "device": "cpu",
        "precision": "fp32", "prompt_syntax": "plain",
    }  # fmt: skip
    rescaled = Drawing(CAPTIONS, Settings(cfg_rescale=0.5), 1).protocol(tiny_model)
    assert rescaled["cfg_rescale"] == 0.5
    json.dumps(made)
