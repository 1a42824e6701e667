"""New words: read from all layouts, found in prompts, as in transformers with the same word; files that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from unet.small import randomize, relative

from ldm.adapters.textual_inversion import Embedding, TowerWithWords
from ldm.checkpoints.common_names import clip_names
from ldm.checkpoints.reading import read_metadata
from ldm.checkpoints.state import exported
from ldm.checkpoints.textual_inversion import read_bundled, read_embeddings, save_embedding
from ldm.conditioning.clip import VOCABULARY, TextTower
from ldm.config import TextConfig
from ldm.errors import UserError

TEXT = TextConfig(width=32, heads=2, layers=1, embed_dim=0, quick_gelu=True, padding="eot", cleaning="plain")
FEW = TextConfig(
    context_length=16, token_ids=(0, *range(300, 1300), 49406, 49407), width=32, heads=2, layers=1, embed_dim=0
)
CAT = Embedding("<cat>", torch.randn(2, 32, generator=torch.Generator().manual_seed(1)))
STYLE = Embedding("EasyStyle", torch.randn(1, 32, generator=torch.Generator().manual_seed(2)))


def tower(config: TextConfig = FEW) -> TextTower:
    torch.manual_seed(0)
    return randomize(TextTower(config)).eval()


@pytest.mark.parametrize("config", [TEXT, FEW])
def test_a_word_is_its_vectors(config: TextConfig) -> None:
    """A word whose vectors are those of known tokens reads as these tokens do."""
    plain = tower(config)
    (tokens,), _ = plain.tokenize(["red heart"])
    rows = tokens[1:3] if plain.rows is None else plain.rows[tokens[1:3]]
    known = Embedding("<both>", plain.token_embedding.weight[rows].detach())
    more = TowerWithWords(plain, [STYLE, known])
    with torch.no_grad():
        assert torch.equal(more.encode(["a <both> in the sky"]), plain.encode(["a red heart in the sky"]))
        assert torch.equal(more.encode(["a cat"]), plain.encode(["a cat"]))
        assert relative(more.encode(["a easystyle"]), plain.encode(["a cat"])) > 1e-3
        assert torch.equal(TowerWithWords(plain, []).encode(["a cat"]), plain.encode(["a cat"]))


def test_where_words_are_found() -> None:
    more = TowerWithWords(tower(), [CAT, STYLE])
    cat, style = [VOCABULARY, VOCABULARY + 1], [VOCABULARY + 2]

    def pieces(prompt: str) -> list[int]:
        return more.tokenizer().encode(prompt)

    a = pieces("a")
    assert pieces("a <cat>") == pieces("a<CAT>") == a + cat
    assert pieces("<cat><cat> a") == cat + cat + a
    assert pieces("easystyle, a") == style + pieces(", a")
    assert all(piece < VOCABULARY for piece in pieces("easystyles aneasystyle <cat cat>"))
    _, (dropped,) = more.tokenize(["a " * 13 + "<cat> end"])
    assert dropped == "<cat> end"  # the second of its vectors has no place any more


def files(path: Path) -> dict[str, dict[str, Tensor]]:
    """Every layout there is: file -> the words it should give."""
    vectors, one = CAT.vectors, STYLE.vectors
    save_embedding(path / "ours.safetensors", CAT)
    save_file({"<a>": vectors, "<b>": one[0].clone()}, path / "two.safetensors")
    torch.save({"<cat>": vectors}, path / "learned_embeds.bin")
    save_file({"emb_params": vectors}, path / "easynegative.safetensors")
    save_file({"style-1.5": one}, path / "dotted.safetensors")
    for i, key in enumerate(("emp_params", "clip_l", "clip_g", "*", "embedding", "0", "weight", "a b", "conv.weight")):
        save_file({key: vectors}, path / f"single{i}.safetensors")
    save_file({"emp_params": vectors}, path / "my own style.v2.safetensors")
    save_file({"clip_l": vectors, "clip_g": one}, path / "xl.safetensors")
    save_file({"emp_params": vectors, "emp_params_out": one}, path / "out.safetensors")
    torch.save({"<cat>": vectors, "style-1.5": one}, path / "dotted.bin")
    torch.save({"string_to_param": {"<cat>": vectors, "*": one}}, path / "several.pt")
    bundle = {"lora_unet_x.alpha": torch.ones(1), "bundle_emb.my.cat.clip_l": vectors}
    save_file(bundle | {"bundle_emb.style.string_to_param.*": one}, path / "bundle.safetensors")
    entry = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "mine", "step": 10}
    torch.save(entry, path / "a1111.pt")
    torch.save({**entry, "name": None}, path / "nameless.pt")
    torch.save(
        {
            "string_to_token": {"*": torch.tensor(265)},
            "string_to_param": nn.ParameterDict({"*": nn.Parameter(vectors)}),
        },
        path / "first.pt",
    )
    return {
        "ours.safetensors": {"<cat>": vectors},
        "two.safetensors": {"<a>": vectors, "<b>": one},
        "learned_embeds.bin": {"<cat>": vectors},
        "easynegative.safetensors": {"easynegative": vectors},
        "dotted.safetensors": {"style-1.5": one},
        **{f"single{i}.safetensors": {f"single{i}": vectors} for i in range(9)},
        "my own style.v2.safetensors": {"my_own_style.v2": vectors},
        "xl.safetensors": {"xl": vectors},
        "out.safetensors": {"out": vectors},
        "dotted.bin": {"<cat>": vectors, "style-1.5": one},
        "several.pt": {"<cat>": vectors, "several": one},
        "bundle.safetensors": {"my.cat": vectors, "style": one},
        "a1111.pt": {"a1111": vectors},
        "nameless.pt": {"nameless": vectors},
        "first.pt": {"first": vectors},
    }


def test_all_layouts(tmp_path: Path) -> None:
    for name, words in files(tmp_path).items():
        found = {embedding.word: embedding.vectors for embedding in read_embeddings(tmp_path / name)}
        assert found.keys() == words.keys(), name
        assert all(torch.equal(found[word], words[word]) for word in words)


def test_how_a_word_was_read_is_told(tmp_path: Path) -> None:
    files(tmp_path)
    for name, said in (
        ("a1111.pt", "inside it is called 'mine'"),
        ("nameless.pt", ""),
        ("ours.safetensors", ""),
        ("xl.safetensors", ""),
        ("out.safetensors", "passed over: emp_params_out"),
    ):
        (embedding,) = read_embeddings(tmp_path / name)
        assert (said in embedding.remark) if said else not embedding.remark
    assert all("the LoRA in the same file" in word.remark for word in read_embeddings(tmp_path / "bundle.safetensors"))
    (xl,) = read_embeddings(tmp_path / "xl.safetensors")
    assert xl.second is not None and torch.equal(xl.second, STYLE.vectors)
    assert not any(word.remark for word in read_bundled(tmp_path / "bundle.safetensors"))


@pytest.mark.parametrize("word", ["<cat>", "*", "emb_params", "0", "clip_l", "a.weight"])
def test_any_word_of_ours_comes_back(tmp_path: Path, word: str) -> None:
    """The file says which it is, in the key that others show."""
    save_embedding(tmp_path / "embedding.safetensors", Embedding(word, CAT.vectors), {"ss_seed": "0"})
    assert read_metadata(tmp_path / "embedding.safetensors")["modelspec.trigger_phrase"] == word
    (embedding,) = read_embeddings(tmp_path / "embedding.safetensors")
    assert embedding.word == word and torch.equal(embedding.vectors, CAT.vectors)


def test_words_on_a_tower_that_has_words(tmp_path: Path) -> None:
    plain = tower()
    one = TowerWithWords(plain, [CAT])
    both = TowerWithWords(one, [STYLE])
    at_once = TowerWithWords(plain, [CAT, STYLE])
    prompt = ["a <cat> in easystyle, and a cat"]
    with torch.no_grad():
        assert torch.equal(both.encode(prompt), at_once.encode(prompt))
        assert not torch.equal(one.encode(prompt), both.encode(prompt))
    with pytest.raises(UserError, match="as another file does"):
        TowerWithWords(both, [CAT])


def test_dotted_words_in_prompts() -> None:
    dotted = Embedding("style-1.5", CAT.vectors)
    encode = TowerWithWords(tower(), [dotted]).tokenizer().encode
    word = [VOCABULARY, VOCABULARY + 1]
    assert encode("a style-1.5") == encode("a") + word
    assert encode("style-1.5, style-1.5.") == word + encode(",") + word + encode(".")
    assert all(piece < VOCABULARY for piece in encode("style-1x5 style-1.55 mystyle-1.5"))


def test_what_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for tensors, said in (
        ({"<cat>": torch.ones(2, 2, 2)}, "not a list of vectors"),
        ({"<cat>": torch.ones(2, 32).long()}, "not a list of vectors"),
        ({"<cat>": torch.ones(2000, 1)}, "<cat> is 2000 vectors; a word has between 1 and"),
        ({"<cat>": torch.ones(0, 32)}, "<cat> is 0 vectors; a word has between 1 and"),
        ({"conv.weight": torch.ones(2, 32), "conv.bias": torch.ones(2)}, "neither a word"),
        ({"a.lora_up.weight": torch.ones(2, 32), "a.lora_down.weight": torch.ones(2, 2)}, "looks like a LoRA"),
        ({"emp_params_out": torch.ones(2, 32)}, "what the text tower gives, which is not supported"),
        ({"bundle_emb.cat.t5_out": torch.ones(2, 32)}, "which is not supported"),
        ({"two words": torch.ones(2, 32), "<cat>": torch.ones(2, 32)}, "neither a word"),
        ({"<cat>": torch.full((2, 32), torch.nan)}, "not finite"),
    ):
        save_file(tensors, path)
        with pytest.raises(UserError, match=said):
            read_embeddings(path)
    for embeddings, said in (
        ([Embedding("<x>", torch.ones(2, 31))], "another text tower"),
        ([Embedding("<x>", torch.ones(0, 32))], "another text tower"),
        ([Embedding("two words", torch.ones(2, 32))], "white space"),
        ([Embedding("", torch.ones(2, 32))], "white space"),
        ([Embedding("\x1b[31mred", torch.ones(2, 32))], "white space"),
        ([CAT, Embedding("<CAT>", torch.ones(2, 32))], "as another file does"),
    ):
        with pytest.raises(UserError, match=said):
            TowerWithWords(tower(), embeddings)


def test_as_diffusers_reads_it(tmp_path: Path) -> None:
    """Our file through their loader: the same context of the same prompt, where the word has two vectors."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("diffusers")
    from diffusers.loaders import TextualInversionLoaderMixin

    from ldm.checkpoints.diffusers_tokenizer import write_tokenizer

    plain = tower(TEXT)
    config = transformers.CLIPTextConfig(
        hidden_size=32, intermediate_size=128, num_attention_heads=2, num_hidden_layers=1, hidden_act="quick_gelu"
    )
    there = transformers.CLIPTextModel(config).eval()
    prefix = "text_model." if any(name.startswith("text_model.") for name in there.state_dict()) else ""
    there.load_state_dict(exported(plain.state_dict(), clip_names(plain.state_dict(), prefix)), strict=False)
    (tmp_path / "tokenizer").mkdir()
    write_tokenizer(tmp_path / "tokenizer", TEXT)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")

    class Pipeline(TextualInversionLoaderMixin):
        hf_device_map = None
        components: dict[str, Any] = {}  # noqa: RUF012 (theirs asks for an attribute)

        def __init__(self) -> None:
            self.text_encoder, self.tokenizer = there, tokenizer

    save_embedding(tmp_path / "cat.safetensors", CAT)
    pipeline = Pipeline()
    pipeline.load_textual_inversion(str(tmp_path / "cat.safetensors"))
    prompt = pipeline.maybe_convert_prompt("a photo of <cat> in the sky", tokenizer)
    tokens = tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
    more = TowerWithWords(plain, read_embeddings(tmp_path / "cat.safetensors"))
    with torch.no_grad():
        expected = there(tokens).last_hidden_state
        assert relative(more.encode(["a photo of <cat> in the sky"]), expected) < 1e-5
