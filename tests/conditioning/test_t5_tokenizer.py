"""T5's tokenizer: sentencepiece's model and tokenizer.json read alike, and nothing of a stranger's that does more."""

from __future__ import annotations

import base64
import io
import json
import random
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ldm.checkpoints import t5
from ldm.conditioning import t5_tokenizer
from ldm.conditioning.torchvision_ops import declare_missing_operators
from ldm.errors import UserError

pytest.importorskip("tokenizers")

TEXTS = [
    "",
    "a red heart",
    "two cats & a DOG, 4k!!",
    "  spaces   here\nnew\tline ",
    "café crème ﬁne Ⅳ",
    "x</s>y <extra_id_3> z <pad>",
    "日本語 😀",
    "a" * 300,
]


@pytest.fixture(scope="module")
def model() -> bytes:
    """A sentencepiece model, as T5's are made."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    lines = ["a red heart", "two cats and a dog, 4k!!", "the quick brown fox jumps over the lazy dog", "café fine"]
    into = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 20),
        model_writer=into,
        vocab_size=80,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return into.getvalue()


def test_it_cuts_as_sentencepiece_and_as_transformers_do(model: bytes, tmp_path: Path) -> None:
    declare_missing_operators()
    transformers = pytest.importorskip("transformers")
    import sentencepiece

    (tmp_path / "spiece.model").write_bytes(model)
    theirs = transformers.T5TokenizerFast.from_pretrained(tmp_path)
    plain = sentencepiece.SentencePieceProcessor(model_proto=model)
    document = t5_tokenizer.of_sentencepiece(model, "here")
    ours = t5_tokenizer.made(document, "here")
    for text in TEXTS:
        assert ours.encode(text).ids == theirs(text).input_ids, text
        if "<" not in text:  # to sentencepiece that is a text like another
            assert ours.encode(text).ids == [*plain.encode(text), 1], text
    theirs.save_pretrained(tmp_path / "saved")
    again = t5_tokenizer.checked((tmp_path / "saved" / "tokenizer.json").read_bytes(), "there")
    assert json.loads(again) == json.loads(document) and t5_tokenizer.checked(document, "here") == document
    t5.write_tokenizer(tmp_path / "written", document)
    written = transformers.T5TokenizerFast.from_pretrained(tmp_path / "written")
    assert [written(text).input_ids for text in TEXTS] == [theirs(text).input_ids for text in TEXTS]


def plain() -> dict[str, Any]:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("a", -2.0)]
    return json.loads(t5_tokenizer.written(pieces, b""))


def broken(**changes: Any) -> bytes:
    return json.dumps(plain() | changes).encode()


HOSTILE = {
    "no JSON": b"\x80\x04.",
    "no object": b"[]",
    "nothing": b"{}",
    "deep": b"[" * 100_000,
    "another model": broken(model={"type": "BPE", "vocab": {}, "merges": []}),
    "no special pieces": broken(model={"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]]}),
    "a piece twice": broken(model={"type": "Unigram", "unk_id": 2, "vocab": [*plain()["model"]["vocab"], ["a", 0.0]]}),
    "no score": broken(model={"type": "Unigram", "unk_id": 2, "vocab": [["<pad>", None]]}),
    "a huge score": broken(model={"type": "Unigram", "unk_id": 2, "vocab": [["<pad>", 10**400]]}),
    "a long piece": broken(
        model={"type": "Unigram", "unk_id": 2, "vocab": [*plain()["model"]["vocab"], ["x" * 999, 0]]}
    ),
    "a regular expression": broken(
        pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Removed"}
    ),
    "lower case": broken(normalizer={"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}),
    "no step": broken(normalizer={"type": "Sequence", "normalizers": [3]}),
    "a torn table": broken(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "no table": broken(normalizer={"type": "Precompiled", "precompiled_charsmap": "%%%"}),
}


def table(letter: str, place: int, texts: bytes) -> bytes:
    """A table of normalization in which one letter becomes what stands at `place` of `texts`, if anything does."""
    trie, code = [0] * 256, ord(letter)
    trie[code] = code | 1 << 8 | 1 << 10  # this letter; a word ends with it; what it becomes is told one place aside
    trie[code ^ 1] = place
    return struct.pack("<I256I", 1024, *trie) + texts


def with_table(data: bytes) -> bytes:
    return broken(normalizer={"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()})


def test_a_table_is_looked_up_and_a_torn_one_refused_before() -> None:
    sound = t5_tokenizer.made(with_table(table("b", 0, b"a\0")), "here")
    assert t5_tokenizer.cut(sound, "ab", "here").tokens == ["▁", "a", "a"]
    for place, texts in ((9999, b"a\0"), (1, "é\0".encode()), (0, b"\xe9\0")):
        with pytest.raises(UserError, match="no tokenizer of T5"):
            t5_tokenizer.made(with_table(table("b", place, texts)), "here")


def test_where_the_library_panics_it_is_a_sentence() -> None:
    class Panic(BaseException):
        """As pyo3's, which is no Exception."""

    def encode(*_: Any, **__: Any) -> Any:
        raise Panic("index out of bounds")

    with pytest.raises(UserError, match="here is damaged"):
        t5_tokenizer.cut(SimpleNamespace(encode=encode), "ab", "here")  # type: ignore[arg-type]


def test_a_table_that_makes_a_long_text_of_a_letter_is_refused() -> None:
    t5_tokenizer.checked(with_table(table("b", 0, b"a" * 256 + b"\0")), "here")
    with pytest.raises(UserError, match="a long text of a letter"):
        t5_tokenizer.checked(with_table(table("b", 0, b"a\0" + b"a" * 100_000 + b"\0")), "here")


@pytest.mark.parametrize("kind", HOSTILE)
def test_others_are_refused_in_a_sentence(kind: str) -> None:
    with pytest.raises(UserError, match=r"^here ") as refused:
        t5_tokenizer.made(HOSTILE[kind], "here")
    assert "\n" not in str(refused.value)


def test_a_torn_table_is_refused_without_the_librarys_cry(model: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    """Of a table of normalization, each change of a byte is told, or does no harm: the library panics at none."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    whole = ModelProto.FromString(model).normalizer_spec.precompiled_charsmap
    draw, refused, texts = random.Random(0), 0, "".join(TEXTS) + "".join(map(chr, range(161, 9000, 7)))
    torn = [whole[:-1000], whole[:5000], whole[:3], whole[4:]]
    for _ in range(60):
        changed = bytearray(whole)
        for _ in range(40):
            changed[draw.randrange(len(whole))] = draw.randrange(256)
        torn.append(bytes(changed))
    for each in torn:
        try:
            t5_tokenizer.made(with_table(each), "here").encode(texts)
        except UserError:
            refused += 1
    assert refused > 10 and capfd.readouterr().err == ""


def test_bytes_that_are_too_many_are_not_read() -> None:
    class Source(dict[str, Any]):
        def form(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
            return torch.uint8, (1 << 20, 1 << 20)

    with pytest.raises(UserError, match=r"p\.tokenizer_json in a\.safetensors has 1,099,511,627,776 bytes"):
        t5._kept(Source({"p.tokenizer_json": None}), "p.", Path("a.safetensors"))  # type: ignore[arg-type]


def test_only_the_numbers_of_a_file_are_taken() -> None:
    """Its template, its added words and its replacements are not."""
    rogue = plain()
    rogue["post_processor"] = {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}
    rogue["added_tokens"] = [{"id": 4, "content": "heart", "special": True, "lstrip": True, "rstrip": True}]
    rogue["normalizer"] = {
        "type": "Sequence",
        "normalizers": [{"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "a" * 10_000}],
    }
    assert t5_tokenizer.checked(json.dumps(rogue).encode(), "here") == t5_tokenizer.checked(broken(), "here")


@pytest.mark.parametrize("data", [b"", b"\x00" * 50, b"\xff" * 500, b"\x0a\xff\xff\xff\xff\x0f"])
def test_what_is_no_model_of_sentencepiece_is_refused(data: bytes) -> None:
    pytest.importorskip("sentencepiece")
    with pytest.raises(UserError, match="no sentencepiece model of T5"):
        t5_tokenizer.of_sentencepiece(data, "here")


def test_a_model_of_byte_pairs_and_a_torn_one_are_refused(model: bytes) -> None:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    other = ModelProto.FromString(model)
    other.trainer_spec.model_type = 2
    for data in (other.SerializeToString(), model[: len(model) // 2]):
        with pytest.raises(UserError, match="no sentencepiece model of T5"):
            t5_tokenizer.of_sentencepiece(data, "here")
