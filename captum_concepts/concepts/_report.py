"""What a vocabulary lost on the way, and why: every dropped concept with its reason and its number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Drop:
    """A concept that was dropped.

    Attributes:
        concept: its text.
        reason: "empty", "duplicate", "too long", "class name", "similar to a class", "similar to a concept",
            "absent from the data", "no text embedding", or what a later step calls it.
        value: the number that decided: characters, cosine, activation; None where there is none.
        limit: what the number was compared with.
        other: the class or concept that it resembles.
    """

    concept: str
    reason: str
    value: float | None = None
    limit: float | None = None
    other: str | None = None

    def __str__(self) -> str:
        text = f"{self.concept!r}: {self.reason}"
        if self.other is not None:
            text += f" {self.other!r}"
        if self.value is not None:
            text += f", {self.value:.4g}"
        if self.limit is not None:
            text += f" (limit {self.limit:.4g})"
        return text


@dataclass(frozen=True)
class VocabularyReport:
    """All drops of a vocabulary in the order in which they happened; ``print`` it, or take :meth:`as_dict`.

    Example:
        >>> print(VocabularyReport(7, (Drop("a very long concept indeed", "too long", 26, 20),)))
        6 of 7 concepts kept; dropped: 1 too long
          'a very long concept indeed': too long, 26 (limit 20)
    """

    started: int
    drops: tuple[Drop, ...] = ()

    @property
    def kept(self) -> int:
        """Concepts that are left."""
        return self.started - len(self.drops)

    @property
    def counts(self) -> dict[str, int]:
        """Drops for each reason."""
        return dict(Counter(drop.reason for drop in self.drops))

    def with_drops(self, drops: Iterable[Drop]) -> VocabularyReport:
        """A report with more drops."""
        return VocabularyReport(self.started, self.drops + tuple(drops))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "started": self.started,
            "kept": self.kept,
            "counts": self.counts,
            "drops": [asdict(drop) for drop in self.drops],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VocabularyReport:
        """Read :meth:`as_dict` back."""
        return cls(int(values["started"]), tuple(Drop(**drop) for drop in values["drops"]))

    def summary(self) -> str:
        """One line."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.counts.items())
        return f"{self.kept} of {self.started} concepts kept" + (f"; dropped: {reasons}" if reasons else "")

    def __str__(self) -> str:
        return "\n".join([self.summary(), *(f"  {drop}" for drop in self.drops)])
