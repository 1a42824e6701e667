"""CAPTION -> CONTEXT: the CLIP text tower (Radford et al. 2021), an adapter over open_clip's.

open_clip builds the blocks and brings the tokenizer; what it leaves open is said here: which block's output is the
context, how short captions are padded, which tokens own a row of the embedding table. State-dict keys are
open_clip's own names of the text tower (`token_embedding.weight`, `transformer.resblocks.0.ln_1.weight`, ...).

Shapes: B captions, L context length, D width, E width of the joint picture-text space.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldm.conditioning.open_clip_parts import part
from ldm.conditioning.plain_tokenizer import PlainTokenizer
from ldm.conditioning.torchvision_ops import declare_missing_operators
from ldm.errors import UserError, nearest
from ldm.model_config import TextConfig

if TYPE_CHECKING:
    from open_clip.tokenizer import SimpleTokenizer
    from open_clip.transformer import TextTransformer

VOCABULARY = 49408  # CLIP's byte-pair vocabulary: 49,406 pieces, then the two below
START, END = 49406, 49407
PADDING = {"zero": 0, "eot": END}
LAYERS = ("last", "penultimate")
CLEANING = ("open_clip", "plain")
LONGEST_WORD = 2000  # letters: cutting a word into pieces takes time with the square of its length

# What an open_clip text configuration may say for this adapter to represent it. The others have another tokenizer,
# extra class tokens or another pooling, and are refused rather than built wrong.
_KNOWN_SETTINGS = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "no_causal_mask"}


class TextTower(nn.Module):
    """Tokens -> context, the sequence of a chosen block's outputs, after the final LayerNorm or without it.

    `config` is the configuration with an architecture's numbers filled in, so `.config.width` is always D.
    Raises UserError for an unknown architecture or one whose text side is not CLIP's, and for settings that
    contradict each other.
    """

    causal_mask: Tensor | None  # (L, L), -inf above the diagonal; None: an architecture that looks both ways
    rows: Tensor | None  # (VOCABULARY,) token -> row of the embedding table; None: every token owns its own

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        config, text = _build(config)
        self.config = config
        self.token_embedding = text.token_embedding  # (rows, D)
        self.positional_embedding = text.positional_embedding  # (L, D)
        self.transformer = text.transformer  # .resblocks is the list of blocks
        self.ln_final = text.ln_final
        self.text_projection = text.text_projection  # (D, E), or None
        # Known from the configuration, so not in the state dict, and real even in a tower made on the meta device.
        length = config.context_length
        causal = None if text.attn_mask is None else torch.full((length, length), -torch.inf, device="cpu").triu(1)
        self.register_buffer("causal_mask", causal, persistent=False)
        self.register_buffer("rows", _token_rows(config.token_ids), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L) long -> context (B, L, D), in float32 (float64 if the parameters are)."""
        blocks = self.config.layers - (self.config.layer == "penultimate")
        context = self._hidden(tokens, blocks)
        if self.config.final_norm:
            context = self.ln_final(context)
        return context.to(torch.promote_types(context.dtype, torch.float32))

    def features(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L) long -> (B, E): last block, LayerNorm, the row of the end token, projected; not normalised."""
        if self.text_projection is None:
            raise UserError("this text tower has no projection into a joint picture-text space (embed_dim is 0)")
        hidden = self.ln_final(self._hidden(tokens, self.config.layers))
        end = (tokens == END).int().argmax(dim=1)  # the first one: `eot` padding follows it
        return hidden[torch.arange(len(tokens), device=tokens.device), end] @ self.text_projection

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Captions -> context (B, L, D) on the tower's device, words beyond L cut off (`tokenize` says which)."""
        tokens, _ = self.tokenize(prompts)
        return self(tokens.to(self.positional_embedding.device))

    def tokenizer(self) -> SimpleTokenizer | PlainTokenizer:
        """What `tokenize` cuts prompts with; a tower that knows more words has its own."""
        return tokenizer_for(self.config)

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, list[str]]:
        """Captions -> tokens (B, L) long on the CPU, and for each caption the words that did not fit ("" if all did).

        A row is start, at most L - 2 pieces, end, padding. A word cut in its middle keeps its first pieces, as with
        every CLIP, and is named among the dropped.
        """
        tokenizer = self.tokenizer()
        length = self.config.context_length
        tokens = torch.full((len(prompts), length), PADDING[self.config.padding], dtype=torch.long)
        dropped = []
        for row, prompt in zip(tokens, prompts, strict=True):
            pieces = tokenizer.encode(bounded(prompt))
            dropped.append(_words_beyond(tokenizer, prompt, length - 2) if len(pieces) > length - 2 else "")
            kept = [START, *pieces[: length - 2], END]
            row[: len(kept)] = torch.tensor(kept)
        return tokens, dropped

    def unknown_words(self, tokens: Tensor) -> list[str]:
        """The words of a caption's `tokens` (L,), as they were read, that have a piece without a row of its own, each
        once. All such pieces share one row, so the tower takes these words for one another.
        """
        pieces, word, found = clip_tokenizer(), [], {}
        alone = {token: self._owns_a_row(token) for token in set(tokens.tolist())}
        for token in tokens.tolist():
            special = token >= START  # start, end, and what words of textual inversions are made of
            word += [] if special else [token]
            if special or pieces.decoder[token].endswith("</w>"):
                if not all(alone[piece] for piece in word):
                    found[pieces.decode(word).strip()] = None
                word = []
        return list(found)

    def _owns_a_row(self, token: int) -> bool:
        """Whether no other token has the row of `token`, as stored or, where a table was filled up, by its values."""
        if token >= START:
            return True
        if self.config.token_ids and self.rows is not None:
            return int(self.rows[token]) != len(self.config.token_ids)
        *_, table = self.token_embedding.parameters()  # words of textual inversions have tables of their own before it
        like = table[table[:, 0] == table[token, 0]]
        return int((like == table[token]).all(dim=1).sum()) == 1

    def _hidden(self, tokens: Tensor, blocks: int) -> Tensor:
        """Tokens (B, L) -> (B, L, D) after the first `blocks` blocks, before the final LayerNorm."""
        rows = tokens if self.rows is None else self.rows.to(tokens.device)[tokens]
        dtype = self.transformer.get_cast_dtype()
        x = self.token_embedding(rows).to(dtype) + self.positional_embedding.to(dtype)
        # open_clip's blocks have taken (L, B, D) in some versions and (B, L, D) in others: ask the block.
        resblocks = self.transformer.resblocks
        batch_first = getattr(resblocks[0].attn, "batch_first", True)
        x = x if batch_first else x.transpose(0, 1)
        mask = None if self.causal_mask is None else self.causal_mask.to(x)
        for block in resblocks[:blocks]:
            x = block(x, attn_mask=mask)
        return x if batch_first else x.transpose(0, 1)


@lru_cache(maxsize=1)
def clip_tokenizer() -> SimpleTokenizer:
    """CLIP's byte-pair tokenizer; `.encode(text)` gives pieces without start, end and padding."""
    return part("tokenizer").SimpleTokenizer()


def tokenizer_for(config: TextConfig) -> SimpleTokenizer | PlainTokenizer:
    """The tokenizer that reads prompts as `config.cleaning` says."""
    if config.cleaning == "open_clip":
        return clip_tokenizer()
    return PlainTokenizer(clip_tokenizer(), {"!": 0} if config.padding == "zero" else {})


def bounded(text: str) -> str:
    """`text` without what is beyond `LONGEST_WORD` of a word: no text of a stranger's takes minutes to read."""
    return re.sub(r"\S+", lambda word: word[0][:LONGEST_WORD], text)


def _words_beyond(tokenizer: SimpleTokenizer | PlainTokenizer, prompt: str, room: int) -> str:
    """The words of `prompt`, as the tokenizer reads them (cleaned, lower case), not wholly in its first `room` pieces.

    No piece spans white space, so counting word by word agrees with encoding the whole.
    """
    words = tokenizer.clean_fn(prompt).split()
    used = 0
    for i, word in enumerate(words):
        used += len(tokenizer.encode(bounded(word)))
        if used > room:
            return " ".join(words[i:])
    return ""


def _token_rows(token_ids: tuple[int, ...]) -> Tensor | None:
    """Token -> row of the embedding table: the i-th of `token_ids` owns row i, all others share the row after them."""
    if not token_ids:
        return None
    rows = torch.full((VOCABULARY,), len(token_ids), dtype=torch.long, device="cpu")
    rows[torch.tensor(token_ids, device="cpu")] = torch.arange(len(token_ids), device="cpu")
    return rows


def _build(config: TextConfig) -> tuple[TextConfig, TextTransformer]:
    """open_clip's text tower with random weights, and the configuration completed by the architecture's numbers."""
    transformer = part("transformer")
    config, extras = _complete(config)
    _check(config)
    text = transformer.TextTransformer(
        context_length=config.context_length,
        vocab_size=len(config.token_ids) + 1 if config.token_ids else config.vocabulary,
        width=config.width,
        heads=config.heads,
        layers=config.layers,
        mlp_ratio=extras.get("mlp_ratio", 4.0),
        no_causal_mask=extras.get("no_causal_mask", False),
        output_dim=config.embed_dim,
        act_layer=transformer.QuickGELU if config.quick_gelu else nn.GELU,
    )
    return config, text


def _complete(config: TextConfig) -> tuple[TextConfig, dict[str, Any]]:
    """Fill in the numbers of `config.arch`, and what else it says that no field of TextConfig holds."""
    if not config.arch:
        return config, {}
    declare_missing_operators()
    import open_clip

    known = open_clip.list_models()
    if config.arch not in known:
        near = nearest(config.arch, known)
        hint = f"did you mean '{near}'?" if near else "open_clip.list_models() lists them"
        raise UserError(f"open_clip has no architecture '{config.arch}'; {hint}")
    model = open_clip.get_model_config(config.arch) or {}
    text: dict[str, Any] = model["text_cfg"]
    foreign = sorted(set(text) - _KNOWN_SETTINGS)
    if foreign or text["vocab_size"] != VOCABULARY:
        raise UserError(
            f"the text side of '{config.arch}' is not CLIP's ({', '.join(foreign) or 'another vocabulary'}); "
            "choose an architecture with CLIP's tokenizer, such as ViT-L-14-quickgelu"
        )
    completed = dataclasses.replace(
        config,
        context_length=text["context_length"],
        vocabulary=text["vocab_size"],
        width=text["width"],
        heads=text["heads"],
        layers=text["layers"],
        embed_dim=model["embed_dim"] if config.embed_dim else 0,
        quick_gelu=config.quick_gelu or model.get("quick_gelu", False),
    )
    return completed, text


def _check(config: TextConfig) -> None:
    if config.padding not in PADDING:
        raise UserError(f"text padding '{config.padding}' is unknown; it is one of {', '.join(PADDING)}")
    if config.layer not in LAYERS:
        raise UserError(f"text layer '{config.layer}' is unknown; it is one of {', '.join(LAYERS)}")
    if config.cleaning not in CLEANING:
        raise UserError(f"text cleaning '{config.cleaning}' is unknown; it is one of {', '.join(CLEANING)}")
    if config.layers < 1 + (config.layer == "penultimate"):
        raise UserError(f"a text tower of {config.layers} layers has no {config.layer} one")
    if config.context_length < 3:
        raise UserError(f"a context length of {config.context_length} has no room for a word between start and end")
    if config.heads < 1 or config.width % config.heads:
        raise UserError(f"text width {config.width} is not divisible by {config.heads} heads")
    if config.token_ids:
        _check_token_ids(config)
    elif config.vocabulary != VOCABULARY:
        raise UserError(
            f"text vocabulary is {config.vocabulary}, CLIP's tokenizer has {VOCABULARY}; list token_ids to have fewer"
        )


def _check_token_ids(config: TextConfig) -> None:
    ids = set(config.token_ids)
    if len(ids) != len(config.token_ids) or min(ids) < 0 or max(ids) >= VOCABULARY:
        raise UserError(f"token_ids must be different numbers from 0 to {VOCABULARY - 1}")
    missing = {START, END, PADDING[config.padding]} - ids
    if missing:
        raise UserError(f"token_ids lacks {sorted(missing)}: start, end and padding tokens must own a row")
