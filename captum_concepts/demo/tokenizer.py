"""`WordTokenizer`: whole words of a small closed vocabulary, for the bundled VLM."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from captum_concepts.errors import InputError, did_you_mean

_WORD = re.compile(r"[^\s.,;:!?]+")
_START, _PAD = 1, 0


class WordTokenizer:
    """Tokenizer that maps texts to ``(T, context_length)`` ids: start, one id per word, end, padding.

    Case and punctuation are ignored. The end has the largest id, where open_clip's text towers read the embedding of
    the text.

    Args:
        words: the vocabulary, unique lower-case words.
        context_length: number of ids, including start and end.

    Raises:
        InputError: the vocabulary is empty or repeats a word; when called, a text is empty, too long, or contains a
            word that is not in the vocabulary (the known ones are listed).

    Example:
        >>> tokenizer = WordTokenizer(["a", "red", "circle"], context_length=6)
        >>> tokenizer("A red circle.").tolist()
        [[1, 2, 3, 4, 5, 0]]
        >>> tokenizer(["a crimson circle"])
        Traceback (most recent call last):
        captum_concepts.errors.InputError: unknown word 'crimson' in 'a crimson circle'; known: a, circle, red.
    """

    def __init__(self, words: Sequence[str], context_length: int = 24) -> None:
        self.words = list(words)
        if not self.words or len(set(self.words)) != len(self.words):
            raise InputError("words must be a non-empty list of distinct words")
        self.context_length = int(context_length)
        self._ids = {word: i + 2 for i, word in enumerate(self.words)}

    @property
    def vocab_size(self) -> int:
        """Number of ids, including padding, start and end."""
        return len(self.words) + 3

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        texts = [texts] if isinstance(texts, str) else list(texts)
        length = context_length or self.context_length
        ids = torch.full((len(texts), length), _PAD, dtype=torch.long)
        for row, text in zip(ids, texts, strict=True):
            words = _WORD.findall(text.lower())
            if not words:
                raise InputError(f"the text {text!r} contains no word")
            if len(words) + 2 > length:
                raise InputError(f"the text {text!r} has {len(words)} words; at most {length - 2} fit")
            for word in words:
                if word not in self._ids:
                    known = ", ".join(sorted(self._ids))
                    raise InputError(
                        f"unknown word {word!r} in {text!r}; known: {known}.{did_you_mean(word, self._ids)}"
                    )
            row[: len(words) + 2] = torch.tensor([_START, *(self._ids[word] for word in words), len(self.words) + 2])
        return ids
