"""What is asked for is read as it was meant, or refused in a sentence that says where."""

from __future__ import annotations

import ast
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ldm import jobs
from ldm.errors import UserError
from ldm.jobs import Plan, Request, Settings, catalogue
from ldm.model_config import DrawingConfig
from ldm.ranges import MAX_SEED


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_text(text, encoding=encoding)
    return path


def test_picture_i_has_seed_plus_i() -> None:
    requests = jobs.of_prompts(["a", "b"], negative="c", seed=7, n=2)
    assert requests == [Request("a", "c", 7), Request("a", "c", 8), Request("b", "c", 9), Request("b", "c", 10)]


def test_a_label_for_all_prompts_or_for_each() -> None:
    assert jobs.of_prompts("", label="cat") == [Request("", label="cat")]
    assert jobs.of_prompts("a", label=["cat", 3], n=2) == [
        Request("a", seed=i, label=label) for i, label in enumerate(("cat", "cat", "3", "3"))
    ]
    assert [request.title for request in jobs.of_prompts(["a", ""], label=[0, "dog"])] == ["0, a", "dog"]
    assert jobs.of_prompts(["a", "b"], ["c", "d"], label=("x", "y")) == [
        Request("a", "c", 0, "x"),
        Request("b", "d", 1, "y"),
    ]
    for label, words in (
        (["a", "b", "c"], "3 labels were given for 2 prompts"),
        ([], "an empty list of labels"),
        ("", "an empty label"),
        (True, "the label is True, which is not a whole number"),
        (1.5, "the label is 1.5"),
    ):
        with pytest.raises(UserError, match=words):
            jobs.of_prompts(["a", "b"], label=label)  # type: ignore[arg-type]


def test_batches_keep_the_order() -> None:
    requests = jobs.of_prompts(["a"], n=5)
    assert [[r.seed for r in batch] for batch in jobs.batches(requests, 2)] == [[0, 1], [2, 3], [4]]


def test_prompt_files(tmp_path: Path) -> None:
    text = write(tmp_path / "p.txt", "\ufeffa cat\n\n  a “dog”, sitting \r\n")
    assert jobs.read_prompts(text, "n", 5) == [Request("a cat", "n", 5), Request("a “dog”, sitting", "n", 6)]

    lines = '{"prompt": "a cat", "seed": 9}\n\n{"prompt": "a\\ndog", "negative": ""}\n'
    requests = jobs.read_prompts(write(tmp_path / "p.jsonl", lines), "n", 5, n=2)
    assert requests == [
        Request("a cat", "n", 9),
        Request("a cat", "n", 10),
        Request("a\ndog", "", 7),
        Request("a\ndog", "", 8),
    ]

    lines = '{"prompt": "a\u2028cat\x85"}\r\n{"prompt": "a dog"}\n'  # what else ends a line for Python is text in JSON
    requests = jobs.read_prompts(write(tmp_path / "q.jsonl", lines))
    assert requests == [Request("a\u2028cat", "", 0), Request("a dog", "", 1)]

    table = 'seed,prompt,negative\n3,"a cat, sitting",\n,a dog,red\n,,\n'
    requests = jobs.read_prompts(write(tmp_path / "p.csv", table), "n", 5)
    assert requests == [Request("a cat, sitting", "n", 3), Request("a dog", "red", 6)]


def test_labels_in_prompt_files(tmp_path: Path) -> None:
    table = write(tmp_path / "p.csv", "prompt;Label;seed\na cat;tabby;5\n;dog;\na hen;;\n")
    assert jobs.read_prompts(table) == [
        Request("a cat", "", 5, "tabby"),
        Request("", "", 1, "dog"),
        Request("a hen", "", 2),
    ]
    assert [request.label for request in jobs.read_prompts(table, label="cow")] == ["tabby", "dog", "cow"]
    numbers = write(tmp_path / "p.jsonl", '{"label": 0}\n{"label": "7", "prompt": "a"}\n{"seed": 9}')
    assert [(r.prompt, r.label, r.seed) for r in jobs.read_prompts(numbers, label="1")] == [
        ("", "0", 0),
        ("a", "7", 1),
        ("", "1", 9),
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.csv", "Prompt,NEGATIVE, Seed\na cat,red,3\na dog,,\n"),
        ("p.csv", "\ufeffprompt;negative;seed\r\na cat;red;3\r\na dog\r\n;;\r\n"),
        ("p.CSV", '"prompt"\t"negative"\t"seed"\t\t\n"a cat"\tred\t3\t\t\na dog\t\t\t\t\n'),
        ("p.tsv", "\nprompt\tnegative\tseed\na cat\tred\t3\na dog\n"),
        ("p.csv", "sep=;\nprompt;seed;negative\na cat;3;red\na dog;;\n"),
        ("p.json", '[{"Prompt": "a cat", "negative": "red", "seed": 3}, {"prompt": "a dog", "seed": null}]'),
        ("p.json", '\ufeff[{"prompt": "a cat", "negative": "red", "seed": 3}, "a dog"]'),
        ("p.jsonl", '{"PROMPT": "a cat", "negative": "red", "seed": "3"}\n{"prompt": "a dog", "negative": null}\n'),
    ],
)
def test_one_list_of_prompts_in_the_forms_that_people_have(tmp_path: Path, name: str, text: str) -> None:
    requests = jobs.read_prompts(write(tmp_path / name, text), "n", 5)
    assert requests == [Request("a cat", "red", 3), Request("a dog", "n", 6)]


def test_a_text_with_the_other_delimiters_stays_whole(tmp_path: Path) -> None:
    table = 'prompt;seed\n"a cat; ""sitting"", one line\nand another";3\n'
    (request,) = jobs.read_prompts(write(tmp_path / "p.csv", table))
    assert request == Request('a cat; "sitting", one line\nand another', "", 3)
    assert jobs.read_prompts(write(tmp_path / "q.csv", 'prompt\n"a cat, sitting"\n')) == [Request("a cat, sitting")]
    assert jobs.read_prompts(write(tmp_path / "q.json", '["a", "b, c"]')) == [Request("a"), Request("b, c", "", 1)]
    assert jobs.read_prompts(write(tmp_path / "r.json", '{"prompt": "a"}')) == [Request("a")]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.json", "[]", "no prompts"),
        ("p.json", '["a", 3]', "entry 2 is not a JSON object"),
        ("p.json", '["a", ', "p.json is not valid JSON"),
        ("p.json", '{"prompt": "a"}\n{"prompt": "b"}', "must end in .jsonl"),
        ("p.json", "[" * 100_000, "p.json is not valid JSON"),
        ("p.json", '{"a.png": "a cat"}', "unknown column 'a.png'"),
        ("p.json", '[{"prompt": "a", "prompt": "b"}]', "the key 'prompt' is set twice"),
        ("p.jsonl", '{"prompt": "a", "Prompt": "b"}', "line 1 has two columns 'prompt'"),
        ("p.csv", "prompt,seed,prompt\na,1,b\n", "line 1 has two columns 'prompt'"),
        ("p.csv", "prompt;seed\na cat; sitting;3\n", "line 2 has more cells"),
        ("p.csv", "prompt\n", "no prompts"),
        ("p.csv", "", "no prompts"),
        ("p.txt", "\n \n", "no prompts"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2"),
        ("p.jsonl", '"a"\n', "line 1"),
        ("p.jsonl", '{"promt": "a"}', "unknown column 'promt'"),
        ("p.jsonl", '{"seed": 1}', "line 1 has no prompt"),
        ("p.jsonl", '{"prompt": 1}', "must be text"),
        ("p.jsonl", '{"label": 1.5}', "line 1: the label is 1.5, which is not a whole number"),
        ("p.jsonl", '{"label": ""}', "line 1: an empty label was given"),
        ("p.jsonl", '{"label": "\\ud800"}', "not Unicode text"),
        ("p.jsonl", '{"prompt": "a", "seed": 1.5}', "not a whole number"),
        ("p.jsonl", '{"prompt": "a", "seed": true}', "not a whole number"),
        ("p.jsonl", '{"prompt": "a", "seed": -1}', "p.jsonl, line 1: seed -1 is out of range"),
        ("p.jsonl", '{"prompt": "a \\ud800"}', "not Unicode text"),
        ("p.jsonl", '{"prompt": ' + "[" * 100_000, "line 1 is not valid JSON"),
        ("p.csv", "prompt,seed\na cat, sitting,3\n", "line 2 has more cells"),
        ("p.csv", "prompt,seed\na,x\n", "line 2"),
        ("p.csv", 'prompt\n"a\n', "not valid CSV"),
        ("p.csv", "prompt,promt\na,b\n", "unknown column"),
    ],
)
def test_prompt_files_that_cannot_be_read(tmp_path: Path, name: str, text: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        jobs.read_prompts(write(tmp_path / name, text))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_prompt_file_in_another_encoding(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not UTF-8"):
        jobs.read_prompts(write(tmp_path / "p.txt", "ein Würfel", "latin-1"))
    with pytest.raises(UserError, match="check the path"):
        jobs.read_prompts(tmp_path / "missing.txt")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Settings(sampler="ddimm"), "did you mean 'ddim'"),
        (Settings(sampler="DPM++ 2N Karras"), "did you mean 'dpmpp_2m'"),
        (Settings(rho=3.0, spacing="trailing"), "rho is 3, and the spacing trailing"),
        (Settings(rho=-1.0, spacing="karras"), "rho is -1"),
        (Settings(rho=3.0), "the spacing is left to the sampler"),
        (Settings(sampler="euler_cfg_pp"), "takes one between 0 and 2; choose 0.6"),
        (Settings(sampler="Euler CFG++", cfg=0.6, guide_model="x"), "and a guide model stands there"),
        (Settings(spacing="trail"), "did you mean 'trailing'"),
        (Settings(steps=0), "0 steps"),
        (Settings(steps=10**12), "1000000000000 steps were asked for; choose between 1 and 1,000,000"),
        (Settings(cfg=float("nan")), "guidance scale"),
        (Settings(cfg=10**400), "cfg is a number of more than 300 digits"),
        (Settings(sampler="ddim", eta=-0.1), "eta is -0.1"),
        (Settings(eta=0.5), "eta is an option of some samplers; name the one"),
        (Settings(options={"rtol": 1}), "rtol is an option of some samplers; name the one"),
        (Settings(sampler="plms", eta=0.5), "no option 'eta'; it has none"),
        (Settings(sampler="ode", options={"rtl": 1}), "no option 'rtl'; it takes rtol, atol"),
        (Settings(sampler="ode", options={"rtol": "small"}), "must be a number"),
        (Settings(sampler="pc", options={"moves": "1.5"}), "must be a whole number"),
        (Settings(sampler="pc", options={"moves": math.inf}), "must be a whole number"),
        (Settings(sampler="pc", options={"moves": 1.5}), "must be a whole number"),
        (Settings(sampler="ode", options={"rtol": None}), "must be a number"),
        (Settings(sampler="DPM++ 2M Karras", spacing="leading"), "asks for the spacing karras"),
        (Settings(sigmas=(5.0, float("nan"))), "finite"),
        (Settings(width=0), "width"),
        (Settings(height=400_000), "the height is 400000 pixels; choose between 1 and 16384"),
        (Settings(tile=0), "a tile of 0 pixels"),
        (Settings(sampler="ddim", eta=0.0, options={"eta": 1}), "eta is 0 and 1 among the sampler's options; say one"),
        (Settings(cfg_rescale=2.0), "rescale"),
        (Settings(cfg_interval=(3.0, 1.0)), "interval"),
    ],
)
def test_settings_that_no_model_could_follow(settings: Settings, words: str) -> None:
    with pytest.raises(UserError) as error:
        settings.check()
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("spelled", "sampler", "spacing"),
    [
        ("ddim", "ddim", "karras"),
        ("DDIM trailing", "ddim", "trailing"),
        ("Euler a", "euler_a", "karras"),
        ("euler_ancestral", "euler_a", "karras"),
        ("Euler", "euler", "karras"),
        ("DPM++ 2M SGM Uniform", "dpmpp_2m", "sgm_uniform"),
        ("DPM++ 2M Align Your Steps", "dpmpp_2m", "ays_sd15"),
        ("DPM++ 2M SDE Polyexponential", "dpmpp_2m_sde", "polyexponential"),
        ("DPM++ 2S a Karras", "dpmpp_2s_a", "karras"),
        ("dpmpp_2s_ancestral", "dpmpp_2s_a", "karras"),
        ("DPM2 a", "dpm_2_a", "karras"),
        ("DPM fast", "dpm_fast", "logsnr"),
        ("DPM adaptive", "dpm_adaptive", "logsnr"),
        ("LMS Karras", "lms", "karras"),
        ("DEIS Beta", "deis", "beta"),
        ("Restart", "restart", "karras"),
        ("res_multistep", "res_multistep", "karras"),
        ("DPM++ 2M Karras", "dpmpp_2m", "karras"),
        ("DPM++ 2M SDE Exponential", "dpmpp_2m_sde", "exponential"),
        ("DPM++ 3M SDE", "dpmpp_3m_sde", "karras"),
        ("DPM++ SDE Karras", "dpmpp_sde", "karras"),
        ("DPM2 Karras", "dpm_2", "karras"),
        ("dpm_2", "dpm_2", "karras"),
        ("Heun", "heun", "karras"),
        ("UniPC", "unipc", "karras"),
        ("PNDM", "plms", "karras"),
        ("LCM", "lcm", "lcm"),
    ],
)
def test_the_spellings_of_user_interfaces(spelled: str, sampler: str, spacing: str) -> None:
    settings = Settings(sampler=spelled).check()
    assert settings.sampler == sampler
    assert (settings.spacing or catalogue.own_grid(sampler, flow=False)) == spacing
    assert settings.check() == settings, "a checked one is as it should be"


def test_the_defaults_are_those_of_a_plan_and_of_the_catalogue() -> None:
    assert Settings().plan() == Plan()
    assert {info.grid for info in catalogue.SAMPLERS.values()} <= catalogue.GRIDS.keys()
    for sampler, info in catalogue.SAMPLERS.items():
        assert Settings(sampler=sampler, cfg=0.6).plan().spacing is None
        assert catalogue.own_grid(sampler, flow=False) == info.grid
        assert catalogue.own_grid(sampler, flow=True) == ("lcm" if sampler == "lcm" else "trailing")
    assert Settings(spacing="SGM Uniform").check().spacing == "sgm_uniform"


def test_what_is_left_to_the_model_is_as_it_is_meant_to_be_drawn() -> None:
    """What is said goes before it, by spelling or by levels written out too."""
    own = DrawingConfig(1.5, 4, "lcm", "lcm")

    def plan(**said: Any) -> tuple[Any, ...]:
        made = Settings(**said).check().of(own).plan()
        return made.guide.scale, made.steps, made.sampler, made.spacing  # type: ignore[union-attr]

    assert plan() == (1.5, 4, "lcm", "lcm")
    assert plan(cfg=2, steps=8) == (2, 8, "lcm", "lcm")
    assert plan(sampler="euler") == (1.5, 4, "euler", "lcm") and plan(spacing="beta") == (1.5, 4, "lcm", "beta")
    assert plan(sampler="DPM++ 2M Karras") == (1.5, 4, "dpmpp_2m", "karras")
    assert plan(sigmas=(5.0, 1.0, 0.0)) == (1.5, 2, "lcm", "trailing")
    left = Settings(width=64).check()
    assert (left.cfg, left.steps, left.sampler, left.spacing) == (None,) * 4
    assert Settings().of(DrawingConfig(spacing="")).plan() == Plan()
    strange = DrawingConfig(sampler="of_tomorrow")
    assert Settings(sampler="euler").of(strange).sampler == "euler"
    with pytest.raises(UserError, match="the model is meant for the sampler 'of_tomorrow', unknown here"):
        Settings().of(strange)


def test_guidance_of_cfg_plus_plus_compares_at_scale_1_too() -> None:
    """And its sampler looks at the negative prompt there, so nothing is without an effect."""
    asks, others = [jobs.Ask("a")], [jobs.Ask("b")]
    assert Settings(sampler="euler_cfg_pp", cfg=1).plan().guide.asks([asks], others) == [asks, others]
    assert Settings(cfg=1).plan().guide.asks([asks], others) == [asks]
    assert Settings(sampler="Euler CFG++", cfg=1).without_effect([Request("a", "b")]) == []


def test_a_spelling_may_ask_for_an_option() -> None:
    settings = Settings(sampler="DPM++ 2M SDE Heun Karras").check()
    assert (settings.sampler, settings.spacing, settings.options) == ("dpmpp_2m_sde", "karras", {"solver": "heun"})


def test_a_sampler_s_options_get_their_types() -> None:
    settings = Settings(sampler="pc", options={"snr": "0.2", "moves": "3"}).check()
    assert settings.options == {"snr": 0.2, "moves": 3}
    assert Settings(sampler="ddim", eta=0.5).check().options == {"eta": 0.5}
    assert Settings(sigmas=(5.0, 1.0, 0.0)).check().steps == 2


def test_levels_written_out_and_another_grid() -> None:
    levels = (5.0, 1.0, 0.0)
    for settings in (Settings(sigmas=levels), Settings(sigmas=levels, steps=2, spacing="trailing")):
        assert settings.check() == settings.check().check() and settings.check().steps == 2
    for other, words in (
        ({"steps": 50}, "which are 2 steps, and 50 steps; say one"),
        ({"spacing": "karras"}, "and the spacing karras; say one"),
        ({"sampler": "DPM++ 2M Karras"}, "and the spacing karras"),
    ):
        with pytest.raises(UserError, match=words):
            Settings(sigmas=levels, **other).check()
    with pytest.raises(UserError, match="and 50 steps"):
        Settings(sigmas=levels).but(steps=50).check()


def test_what_has_no_effect_without_guidance_is_said() -> None:
    plain, negative = [Request("a")], [Request("a", "b")]
    assert Settings(cfg=1).without_effect(plain) == Settings(cfg=1.5).without_effect(negative) == []
    (said,) = Settings(cfg=1, cfg_interval=(0.1, 5)).without_effect(negative)
    assert "of the negative prompt and cfg_interval" in said
    assert "the guide model" in Settings(cfg=1, guide_model="x").without_effect(plain)[0]
    for cfg in (1, 7.5):
        assert Settings(cfg=cfg, perp_negative=1.0).without_effect(plain) == [
            "there is no negative prompt, so there is no effect of perp_negative"
        ]
    assert Settings(cfg=1, perp_negative=1.0).without_effect(negative) == [], "which is pushed away from all the same"


def test_reuse_of_a_single_evaluation_is_said() -> None:
    plain, one = [Request("a")], Settings(steps=1, reuse=3)
    (said,) = one.without_effect(plain)
    assert "evaluated once, so there is no effect of reuse" in said
    assert len(replace(one, cfg=1).without_effect([Request("a", "b")])) == 2
    assert replace(one, steps=2).without_effect(plain) == [], "the second rests, however large it is"
    assert Settings(sampler="heun", sigmas=(5.0, 1.0), reuse=3).without_effect(plain) == [], "two evaluations"
    assert Settings(sigmas=(5.0, 0.0), reuse=3).without_effect(plain)
    assert Settings(reuse=2).of(DrawingConfig(steps=1)).without_effect(plain), "of a model that is drawn so"


def test_counts_and_seeds_that_are_none() -> None:
    for call in (
        lambda: jobs.of_prompts(["a"], n=0),
        lambda: jobs.of_prompts(["a"], seed=-1),
        lambda: jobs.of_prompts(["a"], seed=MAX_SEED, n=2),
        lambda: jobs.batches([Request("a")], 0),
    ):
        with pytest.raises(UserError):
            call()


def test_no_torch_in_what_may_be_asked_for() -> None:
    """Not even inside a function: what is asked for is checked in milliseconds, and needs no model."""
    folder = Path(jobs.__file__).parent
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            named += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in named} & {"torch", "open_clip", "numpy"}, path
    names = ", ".join(f"ldm.jobs.{path.stem}" for path in folder.glob("*.py") if path.stem != "__init__")
    check = f"import sys, {names}; assert not {{'torch', 'numpy', 'open_clip'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
