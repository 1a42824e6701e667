"""The tower against open_clip's own forward pass and Hugging Face's; tokens, padding, shared embedding rows."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from ldm.adapters.textual_inversion import Embedding, TowerWithWords
from ldm.conditioning.clip import END, START, VOCABULARY, TextTower, clip_tokenizer
from ldm.conditioning.torchvision_ops import declare_missing_operators
from ldm.config import TextConfig
from ldm.errors import UserError

declare_missing_operators()  # tests import open_clip themselves
SMALL = TextConfig(context_length=16, width=32, heads=2, layers=3, embed_dim=24)
PROMPTS = ["a red heart", "", "two dogs left of a blue kite, flat emoji"]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def tower(config: TextConfig = SMALL, seed: int = 0) -> TextTower:
    torch.manual_seed(seed)
    made = TextTower(config).eval()
    for parameter in made.parameters():  # open_clip starts biases at 0 and norms at 1, which would hide mistakes
        parameter.add_(0.02 * torch.randn_like(parameter))
    return made


def open_clip_tower(ours: TextTower, act_layer: type[nn.Module] = nn.GELU) -> nn.Module:
    from open_clip.transformer import TextTransformer

    config = ours.config
    theirs = TextTransformer(
        context_length=config.context_length,
        vocab_size=ours.token_embedding.num_embeddings,
        width=config.width,
        heads=config.heads,
        layers=config.layers,
        output_dim=config.embed_dim,
        act_layer=act_layer,
        output_tokens=True,
    ).eval()
    theirs.load_state_dict(ours.state_dict())  # strict: our names are open_clip's
    return theirs


def test_context_and_features_are_open_clips():
    ours = tower()
    tokens, _ = ours.tokenize(PROMPTS)
    pooled, hidden = open_clip_tower(ours)(tokens)
    torch.testing.assert_close(ours(tokens), hidden, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.features(tokens), pooled, rtol=0, atol=1e-6)
    assert ours(tokens).shape == (3, 16, 32)
    assert torch.equal(ours.encode(PROMPTS), ours(tokens))


def test_penultimate_is_the_block_before_the_last_then_the_final_norm():
    last = tower()
    ours = TextTower(dataclasses.replace(SMALL, layer="penultimate")).eval()
    ours.load_state_dict(last.state_dict())
    theirs = open_clip_tower(last)
    seen: list[Tensor] = []
    theirs.transformer.resblocks[-2].register_forward_hook(lambda block, given, out: seen.append(out))
    tokens, _ = ours.tokenize(PROMPTS)
    theirs(tokens)
    torch.testing.assert_close(ours(tokens), theirs.ln_final(seen[0]), rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.features(tokens), last.features(tokens), rtol=0, atol=1e-6)
    assert (ours(tokens) - last(tokens)).abs().max() > 0.1


@pytest.mark.parametrize("layer", ["last", "penultimate"])
def test_blocks_that_want_the_sequence_first(layer: str):
    """Older open_clip built its blocks for (L, B, D); the result must not depend on it (B != L, so a mix-up shows)."""
    from open_clip.transformer import Transformer

    ours = tower(dataclasses.replace(SMALL, layer=layer))
    tokens, _ = ours.tokenize(PROMPTS)
    expected, pooled = ours(tokens), ours.features(tokens)
    sequence_first = Transformer(width=32, layers=3, heads=2, batch_first=False).eval()
    sequence_first.load_state_dict(ours.transformer.state_dict())
    assert not sequence_first.resblocks[0].attn.batch_first
    ours.transformer = sequence_first
    torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.features(tokens), pooled, rtol=0, atol=1e-6)


def test_quick_gelu_is_another_function():
    from open_clip.transformer import QuickGELU

    plain = tower()
    quick = TextTower(dataclasses.replace(SMALL, quick_gelu=True)).eval()
    quick.load_state_dict(plain.state_dict())
    tokens, _ = plain.tokenize(PROMPTS)
    torch.testing.assert_close(quick(tokens), open_clip_tower(quick, QuickGELU)(tokens)[1], rtol=0, atol=1e-6)
    assert (quick(tokens) - plain(tokens)).abs().max() > 1e-3


def test_hugging_face_agrees():
    """Stable Diffusion v1's conditioner: last hidden state of CLIPTextModel, quick GELU, padded with the end token."""
    transformers = pytest.importorskip("transformers")
    settings = transformers.CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=16,
        hidden_act="quick_gelu",
        bos_token_id=START,
        eos_token_id=END,
        pad_token_id=END,
    )
    ours = tower(dataclasses.replace(SMALL, quick_gelu=True, padding="eot"))
    theirs = transformers.CLIPTextModel(settings).eval()
    theirs.load_state_dict(_hugging_face_names(ours.state_dict(), theirs.state_dict()))
    tokens, _ = ours.tokenize(PROMPTS)
    torch.testing.assert_close(ours(tokens), theirs(tokens).last_hidden_state, rtol=0, atol=1e-5)


def _hugging_face_names(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = "text_model." if any(key.startswith("text_model.") for key in theirs) else ""
    named = {
        "embeddings.token_embedding.weight": ours["token_embedding.weight"],
        "embeddings.position_embedding.weight": ours["positional_embedding"],
        "final_layer_norm.weight": ours["ln_final.weight"],
        "final_layer_norm.bias": ours["ln_final.bias"],
    }
    parts = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    parts["self_attn.out_proj"] = "attn.out_proj"
    for i in range(3):
        for kind in ("weight", "bias"):
            for theirs_name, ours_name in parts.items():
                source = ours[f"transformer.resblocks.{i}.{ours_name}.{kind}"]
                named[f"encoder.layers.{i}.{theirs_name}.{kind}"] = source
            together = ours[f"transformer.resblocks.{i}.attn.in_proj_{kind}"].chunk(3)
            for letter, part in zip("qkv", together, strict=True):
                named[f"encoder.layers.{i}.self_attn.{letter}_proj.{kind}"] = part
    kept = {key: value for key, value in theirs.items() if key.endswith("position_ids")}
    return kept | {prefix + key: value for key, value in named.items()}


def test_causal_and_batch_independent():
    ours = tower()
    tokens, _ = ours.tokenize(["a red heart", "a red kite"])
    context = ours(tokens)
    torch.testing.assert_close(context[0, :3], context[1, :3], rtol=0, atol=1e-6)  # start, a, red
    assert (context[0, 3] - context[1, 3]).abs().max() > 1e-3
    torch.testing.assert_close(ours(tokens[1:]), context[1:], rtol=0, atol=1e-6)


def test_context_is_float32_in_half_precision():
    ours = tower().to(torch.bfloat16)
    assert ours.encode(PROMPTS).dtype == torch.float32


# ---------------------------------------------------------------- tokens


def test_tokens_are_open_clips():
    from open_clip import tokenize

    ours = tower(dataclasses.replace(SMALL, context_length=12))
    prompts = [*PROMPTS, "caf\u00e9 &amp; na\u00efve \u732b it's 42!", "word " * 40]
    tokens, _ = ours.tokenize(prompts)
    assert torch.equal(tokens, tokenize(prompts, context_length=12))


@pytest.mark.parametrize(("padding", "value"), [("zero", 0), ("eot", END)])
def test_padding(padding: str, value: int):
    ours = tower(dataclasses.replace(SMALL, padding=padding))
    tokens, dropped = ours.tokenize(["", "heart"])
    assert tokens[0].tolist() == [START, END] + [value] * 14
    assert tokens[1].tolist() == [START, clip_tokenizer().encode("heart")[0], END] + [value] * 13
    assert dropped == ["", ""]
    # The end token that counts is the first: what follows it must not change the caption's features.
    other = tower(dataclasses.replace(SMALL, padding="eot" if padding == "zero" else "zero"))
    torch.testing.assert_close(ours.features(tokens), other.features(other.tokenize(["", "heart"])[0]))


def test_words_that_do_not_fit_are_told():
    ours = tower(dataclasses.replace(SMALL, context_length=7))  # room for five pieces
    tokens, dropped = ours.tokenize(["One two three four FIVE, six  seven", "one two three four five", "one"])
    assert dropped == ["five, six seven", "", ""]  # "five," is two pieces, of which one fits
    assert tokens[0, -1] == END and tokens.shape == (3, 7)
    long = "a zzyzxq bbqqrk kwyjibo"  # rare words are several pieces each: a word cut in its middle counts as dropped
    _, dropped = ours.tokenize([long])
    assert dropped[0] and long.endswith(dropped[0])


def test_text_that_is_not_text():
    tokens, _ = tower().tokenize(["\udcff \x00 \ufffd", "<end_of_text>"])
    assert tokens[0, 0] == START and END in tokens[0]


# ---------------------------------------------------------------- embedding rows


def _sharing() -> TextConfig:
    known = sorted({0, START, END, *clip_tokenizer().encode("a red heart")})
    return dataclasses.replace(SMALL, token_ids=tuple(known))


def test_unknown_words_share_one_row():
    ours = tower(_sharing())
    assert ours.token_embedding.num_embeddings == 3 + 3 + 1
    red, kite, pizza = (ours.encode([f"a {word} heart"]) for word in ("red", "kite", "pizza"))
    assert torch.equal(kite, pizza)
    assert (red - kite).abs().max() > 1e-3
    assert "rows" not in ours.state_dict() and "causal_mask" not in ours.state_dict()


def test_rows_select_from_the_whole_table():
    """With the known rows copied from a tower with all rows, known words give that tower's context."""
    whole, config = tower(), _sharing()
    state = whole.state_dict()
    table = state["token_embedding.weight"]
    state["token_embedding.weight"] = torch.cat([table[list(config.token_ids)], torch.zeros(1, 32)])
    ours = TextTower(config).eval()
    ours.load_state_dict(state)
    assert torch.equal(ours.encode(["a red heart"]), whole.encode(["a red heart"]))


def test_made_on_the_meta_device_it_needs_its_weights_only():
    made = tower(_sharing())
    with torch.device("meta"):
        empty = TextTower(_sharing())
    empty.load_state_dict(made.state_dict(), assign=True)
    assert torch.equal(empty.eval().encode(PROMPTS), made.encode(PROMPTS))


# ---------------------------------------------------------------- architectures and mistakes


def test_an_open_clip_architecture():
    with torch.device("meta"):
        made = TextTower(TextConfig(arch="ViT-L-14-quickgelu", padding="eot"))
        bare = TextTower(TextConfig(arch="ViT-L-14", embed_dim=0))
    config = made.config
    assert (config.width, config.heads, config.layers, config.embed_dim) == (768, 12, 12, 768)
    assert config.quick_gelu and config.padding == "eot"
    assert type(made.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    assert "text_projection" in made.state_dict()
    assert "text_projection" not in bare.state_dict()
    with pytest.raises(UserError, match="no projection"):
        bare.features(torch.zeros(1, 77, dtype=torch.long))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"arch": "ViT-L-14-quikgelu"}, "did you mean 'ViT-L-14-quickgelu'"),
        ({"arch": "ViT-B-16-SigLIP"}, "hf_tokenizer_name"),
        ({"arch": "hf-hub:someone/something"}, "no architecture"),
        ({"padding": "left"}, "zero, eot"),
        ({"layer": "first"}, "last, penultimate"),
        ({"layers": 1, "layer": "penultimate"}, "no penultimate"),
        ({"heads": 5}, "5 heads"),
        ({"context_length": 2}, "no room"),
        ({"vocabulary": 1000}, "token_ids"),
        ({"token_ids": (0, 1, START)}, "49407"),
        ({"token_ids": (START, END)}, r"lacks \[0\]"),
        ({"token_ids": (0, START, END, END)}, "different"),
    ],
)
def test_mistakes_are_named(changes: dict, sentence: str):
    with pytest.raises(UserError, match=sentence):
        TextTower(dataclasses.replace(SMALL, **changes))


def test_importing_the_module_does_not_import_open_clip():
    code = "import sys, ldm.conditioning.clip; sys.exit('open_clip' in sys.modules or 'torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---------------------------------------------------------------- words without a row of their own


def few_words() -> tuple[TextTower, TextTower]:
    """A tower that knows the words of one caption, and the same with a row for every token, as it is exported."""
    known = (0, *sorted(clip_tokenizer().encode("a red heart,")), START, END)
    few = tower(dataclasses.replace(SMALL, token_ids=known))
    every = tower(SMALL)
    state = few.state_dict()
    assert few.rows is not None
    state["token_embedding.weight"] = state["token_embedding.weight"][few.rows]
    every.load_state_dict(state)
    return few, every


@pytest.mark.parametrize("which", [0, 1])
def test_words_that_share_a_row_are_named(which: int):
    made = few_words()[which]
    for caption, words in {
        "A Red heart, a heart": [],
        "": [],
        "a blue heart; Blue": ["blue", ";"],
        "a redheart": ["redheart"],
        "a red \u2603 12 cats!!": ["\u2603", "1", "2", "cats", "!!"],
        "heart " * 13 + "antidisestablishmentarianism": ["anti"],
        "heart " * 14 + "blue": [],  # it is dropped, and that is told
    }.items():
        assert made.unknown_words(made.tokenize([caption])[0][0]) == words, caption
    own = TowerWithWords(made, [Embedding("blue", torch.zeros(2, 32))])
    assert own.unknown_words(own.tokenize(["a blue green heart"])[0][0]) == ["green"]
    more = TowerWithWords(own, [Embedding("green", torch.zeros(1, 32))])
    assert more.unknown_words(more.tokenize(["a blue green white heart"])[0][0]) == ["white"]


def test_a_tower_of_every_word_knows_them_all():
    made = tower()
    assert made.unknown_words(made.tokenize(["antidisestablishmentarianism of 3 \u2603!"])[0][0]) == []
