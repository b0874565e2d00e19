"""Reports of dropped concepts, with reasons and values."""

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
            "absent from the data", "no text embedding", or a reason of a later step.
        value: the deciding number of characters, cosine or activation; None if there is none.
        limit: the limit that the value was compared with.
        other: the class or concept that the concept resembles.
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
    """All drops of a vocabulary in order; ``print`` the report, or call :meth:`as_dict`.

    Example:
        >>> print(VocabularyReport(7, (Drop("a very long concept indeed", "too long", 26, 20),)))
        6 of 7 concepts kept; dropped: 1 too long
          'a very long concept indeed': too long, 26 (limit 20)
    """

    started: int
    drops: tuple[Drop, ...] = ()

    @property
    def kept(self) -> int:
        """The number of remaining concepts."""
        return self.started - len(self.drops)

    @property
    def counts(self) -> dict[str, int]:
        """The number of drops per reason."""
        return dict(Counter(drop.reason for drop in self.drops))

    def with_drops(self, drops: Iterable[Drop]) -> VocabularyReport:
        """A report with additional drops."""
        return VocabularyReport(self.started, self.drops + tuple(drops))

    def as_dict(self) -> dict[str, Any]:
        """The report as a JSON-serializable dictionary."""
        return {
            "started": self.started,
            "kept": self.kept,
            "counts": self.counts,
            "drops": [asdict(drop) for drop in self.drops],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VocabularyReport:
        """The report that :meth:`as_dict` described."""
        return cls(int(values["started"]), tuple(Drop(**drop) for drop in values["drops"]))

    def summary(self) -> str:
        """A one-line summary."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.counts.items())
        return f"{self.kept} of {self.started} concepts kept" + (f"; dropped: {reasons}" if reasons else "")

    def __str__(self) -> str:
        return "\n".join([self.summary(), *(f"  {drop}" for drop in self.drops)])
