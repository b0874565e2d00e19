"""Check of texts longer than an encoder reads: a warning, or an error if their embeddings would be equal."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from captum_concepts.errors import InputError, InputWarning, listing, shortened


def check_length(tokenizer: Any, texts: Sequence[str], tokens: Tensor) -> None:
    """Warn of truncated texts, and refuse different texts that are equal after truncation.

    Args:
        tokenizer: the tokenizer that returned ``tokens``, of open_clip or transformers, or any function of a list of
            texts.
        texts: the tokenized texts.
        tokens: ``(T, context_length)``.

    Raises:
        InputError: two different texts have the same tokens because of truncation.
    """
    length = tokens.shape[1]
    # A character has at most four tokens, so most texts need no further check.
    long = [text for text in dict.fromkeys(texts) if 4 * len(text) + 2 > length and _is_cut(tokenizer, text, length)]
    if not long:
        return
    cut = set(long)
    seen: dict[tuple[int, ...], str] = {}
    for text, row in zip(texts, tokens.tolist(), strict=True):
        other = seen.setdefault(tuple(row), text)
        if other != text and (text in cut or other in cut):
            raise InputError(
                f"the encoder reads {length} tokens, and {shortened(other)} and {shortened(text)} are identical up to "
                "there, so their embeddings would be too; shorten them"
            )
    warnings.warn(
        f"{len(long)} texts are longer than the {length} tokens that the encoder reads; the rest is ignored: "
        f"{listing(long, 3)}",
        InputWarning,
        stacklevel=4,
    )


def _is_cut(tokenizer: Any, text: str, length: int) -> bool:
    inner = getattr(tokenizer, "tokenizer", None)
    try:
        if callable(getattr(tokenizer, "encode", None)):  # open_clip's own, without start and end
            return len(tokenizer.encode(text)) + 2 > length
        if callable(inner):  # of transformers, in open_clip or in this package
            clean = getattr(tokenizer, "clean_fn", None)
            return len(inner([clean(text) if callable(clean) else text])["input_ids"][0]) > length
    except (TypeError, KeyError, ValueError, AttributeError):
        pass
    shorter = text.rsplit(maxsplit=1)[0]
    if shorter == text.strip():
        return False
    whole, part = tokenizer([text, shorter])
    return whole.tolist() == part.tolist()
