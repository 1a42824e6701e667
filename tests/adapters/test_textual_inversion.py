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
from ldm.checkpoints.state import exported
from ldm.checkpoints.textual_inversion import read_embeddings, save_embedding
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
        "a1111.pt": {"mine": vectors},
        "nameless.pt": {"nameless": vectors},
        "first.pt": {"first": vectors},
    }


def test_all_layouts(tmp_path: Path) -> None:
    for name, words in files(tmp_path).items():
        found = {embedding.word: embedding.vectors for embedding in read_embeddings(tmp_path / name)}
        assert found.keys() == words.keys(), name
        assert all(torch.equal(found[word], words[word]) for word in words)


def test_what_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for tensors, said in (
        ({"<cat>": torch.ones(2, 2, 2)}, "not a list of vectors"),
        ({"<cat>": torch.ones(2, 32).long()}, "not a list of vectors"),
        ({"<cat>": torch.ones(2000, 1)}, "not a list of vectors"),
        ({"conv.weight": torch.ones(2, 32)}, "neither a word"),
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
