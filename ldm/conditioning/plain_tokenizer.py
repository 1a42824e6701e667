"""CLIP's tokenizer as Hugging Face runs it: the same byte-pair vocabulary, with other hands laid on the text before.

open_clip mends the text (ftfy: mojibake, curly quotes) and resolves HTML entities. Hugging Face's CLIPTokenizer does
neither: Unicode NFC, white space to single spaces, lower case letter by letter. It takes the words <|startoftext|> and
<|endoftext|>, wherever they stand, for the tokens, and so the word that it pads with: where that is "!", token 0, as in
Stable Diffusion v2, each exclamation mark of a prompt is read as padding. What diffusers draws, it draws of this.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from open_clip.tokenizer import SimpleTokenizer

SPECIAL = {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
_WHITE = re.compile(r"[^\S\x1c-\x1f]+")  # Unicode's White_Space; Python's \s has four control characters more


class PlainTokenizer:
    """`encode` and `clean_fn` as open_clip's SimpleTokenizer has them, over one whose vocabulary and merges it uses.

    `pad` is the word that it pads with and its token, if that is none of the two above.
    """

    def __init__(self, pieces: SimpleTokenizer, pad: Mapping[str, int]) -> None:
        import regex

        self._pieces = pieces
        self._tokens = {**SPECIAL, **pad}
        self._special = re.compile(f"({'|'.join(map(re.escape, self._tokens))})")
        self._pattern = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\p{White_Space}\p{L}\p{N}]+")

    def clean_fn(self, text: str) -> str:
        """The text as it is cut into pieces."""
        text = _WHITE.sub(" ", unicodedata.normalize("NFC", text)).strip(" ")
        return "".join(letter.lower() for letter in text)  # by itself a final sigma is no different from others

    def encode(self, text: str) -> list[int]:
        """The tokens of `text`, without start, end and padding."""
        tokens: list[int] = []
        for part in self._special.split(text):
            if part in self._tokens:
                tokens.append(self._tokens[part])
                continue
            for word in self._pattern.findall(self.clean_fn(part)):
                letters = "".join(self._pieces.byte_encoder[byte] for byte in word.encode("utf-8"))
                tokens += [self._pieces.encoder[piece] for piece in self._pieces.bpe(letters).split(" ")]
        return tokens
