"""T5's tokenizer: the sentencepiece vocabulary in Hugging Face's tokenizer.json.

A model carries it as the bytes of that file (`T5Tower.tokenizer`), which may be a stranger's. So only its numbers are
taken, pieces with their scores and the table of its normalization, and what is done with them is written here: no
regular expression, replacement or template of a file's own is run.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ldm.errors import UserError, first_line
from ldm.plain import parse_json

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer  # pyright: ignore[reportMissingImports]

T = TypeVar("T")

MAX_BYTES = 16 << 20  # T5's own has 2.4 million
MAX_PIECE = 256  # letters of a piece
MAX_MADE = 256  # bytes that one letter is normalized to; T5's longest are 33
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
KINDS = {  # of what a tokenizer.json does to a text before it is cut; the others would change what is read
    "normalizer": {"Sequence", "Precompiled", "Strip", "Replace"},  # the last two: of spaces, which are cut at anyway
    "pre_tokenizer": {"Sequence", "WhitespaceSplit", "Metaspace"},
}
SPACES = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
PLAIN_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def check_size(count: int, where: str) -> None:
    """Raises UserError for more bytes than a tokenizer has."""
    if count > MAX_BYTES:
        raise UserError(f"{where} has {count:,} bytes, and a tokenizer of T5 two million; name T5's own")


def checked(document: bytes, where: str) -> bytes:
    """A tokenizer.json that means the same and has nothing but numbers of the given one; of a checked one, itself.

    Raises UserError for what is no tokenizer of T5's kind: a unigram model of pieces that begin with "▁".
    """
    check_size(len(document), where)
    try:
        plain = parse_json(document.decode("utf-8"), where)
        for part, kinds in KINDS.items():
            foreign = {str(kind) for kind in _kinds(plain.get(part))} - kinds
            if foreign:
                raise ValueError(f"a {part} of the kind {', '.join(sorted(foreign))[:80]}")
        model = plain["model"]
        if model.get("type", "Unigram") != "Unigram":
            raise ValueError(f"a model of the kind {str(model['type'])[:40]}")
        pieces = [(str(piece), float(score)) for piece, score in model["vocab"]]
        table = next(_tables(plain.get("normalizer")), "")
        return written(pieces, base64.b64decode(table, validate=True))
    except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
        raise UserError(f"{where} is no tokenizer of T5 ({first_line(error)}); put T5's own there") from error


def written(pieces: list[tuple[str, float]], table: bytes) -> bytes:
    """The tokenizer.json of a vocabulary, in the order of its tokens, and of a `table` of normalization, or none.

    The table is four bytes of length, a trie of letters, and behind it what they become, ended by zeros. Raises
    ValueError for a vocabulary without T5's special pieces, and what would cost a reader of texts much.
    """
    tokens = {piece: token for token, (piece, _) in enumerate(pieces)}
    lost = [piece for piece in (PAD, END, UNKNOWN) if piece not in tokens]
    if lost or len(tokens) != len(pieces) or any(len(piece) > MAX_PIECE for piece in tokens):
        raise ValueError(f"a vocabulary without {', '.join(lost)}" if lost else "a piece that is there twice, or long")
    if table and not _is_whole(table):
        raise ValueError("its table of normalization is torn")
    if max(map(len, table[4 + int.from_bytes(table[:4], "little") :].split(b"\0"))) > MAX_MADE:
        raise ValueError("a table that makes a long text of a letter")
    special = [piece for piece in tokens if piece in (PAD, END, UNKNOWN) or piece.startswith("<extra_id_")]
    end = {"SpecialToken": {"id": END, "type_id": 0}}
    texts = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    plain = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": tokens[piece], "content": piece, **PLAIN_FLAGS, "special": True} for piece in special],
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}
        if table
        else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, SPACES]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [texts[0], end],
            "pair": [texts[0], end, texts[1], end],
            "special_tokens": {END: {"id": END, "ids": [tokens[END]], "tokens": [END]}},
        },
        "decoder": SPACES,
        "model": {"type": "Unigram", "unk_id": tokens[UNKNOWN], "vocab": pieces, "byte_fallback": False},
    }
    return json.dumps(plain, ensure_ascii=False, separators=(",", ":")).encode()


def made(document: bytes, where: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json. Raises UserError as `checked`."""
    from tokenizers import Tokenizer  # pyright: ignore[reportMissingImports]

    document = checked(document, where)
    return _guarded(lambda: Tokenizer.from_str(document.decode()), where)


def cut(tokenizer: Tokenizer, text: str, where: str) -> Encoding:
    """The pieces of a text, without the end. Raises UserError where the library fails at it."""
    return _guarded(lambda: tokenizer.encode(text, add_special_tokens=False), where)


def _guarded(work: Callable[[], T], where: str) -> T:
    try:
        return work()
    except BaseException as error:  # the library's panics are no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise UserError(f"{where} is damaged ({first_line(error)}); put T5's own there") from error


def _is_whole(table: bytes) -> bool:
    """Whether no look-up in a table of normalization leads out of it, at which the library would panic.

    It has the bytes of a double array of uint32 (Yata et al. 2007, as darts-clone packs it), that array, and the texts
    that its leaves point into, each ended by a zero.
    """
    size = int.from_bytes(table[:4], "little")
    if not 0 < size <= len(table) - 4 or size % 4:
        return False
    units, texts = np.frombuffer(table, "<u4", size // 4, offset=4).astype(np.int64), table[4 + size :]
    inner = units >> 31 == 0  # the others are leaves' values
    inner[0] = True
    offset = (units >> 10) << ((units & 1 << 9) >> 6)
    child = np.arange(len(units)) ^ offset  # of label 0; a byte's is this, XORed with the byte
    if ((child | 255)[inner] >= len(units)).any():
        return False
    begin = units[child[inner & (units >> 8 & 1 == 1)]] & (1 << 31) - 1
    if (begin >= len(texts)).any():
        return False
    texts.decode()  # a UnicodeDecodeError is a ValueError
    return not (np.frombuffer(texts, np.uint8)[begin] >> 6 == 2).any()  # within a letter


def of_sentencepiece(model: bytes, where: str) -> bytes:
    """The tokenizer.json of a sentencepiece model (spiece.model); T5's has 100 pieces more, which stand for what is
    left out of a text. Raises UserError without the library, and for what is no such model.
    """
    try:
        from sentencepiece.sentencepiece_model_pb2 import (  # pyright: ignore[reportMissingImports]
            ModelProto,  # pyright: ignore[reportAttributeAccessIssue]
        )
    except ImportError as error:
        raise UserError(f"reading {where} needs sentencepiece: pip install -e '.[t5]'") from error
    check_size(len(model), where)
    try:
        found = ModelProto.FromString(model)
        if found.trainer_spec.model_type != 1:
            raise ValueError("its model is not a unigram one")
        pieces = [(piece.piece, piece.score) for piece in found.pieces]
        if not any(piece.startswith("<extra_id_") for piece, _ in pieces):
            pieces += [(f"<extra_id_{number}>", 0.0) for number in reversed(range(100))]
        return written(pieces, found.normalizer_spec.precompiled_charsmap)
    except Exception as error:  # protobuf's own errors have no common type in its three implementations
        raise UserError(f"{where} is no sentencepiece model of T5 ({first_line(error)}); put T5's own there") from error


def _kinds(step: Any) -> Iterator[object]:
    """The kinds of a step and of those within it."""
    for each in _steps(step):
        yield each.get("type")


def _tables(step: Any) -> Iterator[str]:
    for each in _steps(step):
        if each.get("type") == "Precompiled":
            yield each.get("precompiled_charsmap") or ""


def _steps(step: Any) -> Iterator[dict[str, Any]]:
    if step is None:
        return
    yield step
    for inner in (*step.get("normalizers", ()), *step.get("pretokenizers", ())):
        yield from _steps(inner)
