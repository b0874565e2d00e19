"""Class indices and names of the WordNet ids of ImageNet-1k."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache


@lru_cache(maxsize=1)
def class_indices() -> dict[str, int]:
    """Index of each of the 1,000 classes by WordNet id, in the standard order of ImageNet classifiers."""
    from timm.data import ImageNetInfo

    return {wnid: i for i, wnid in enumerate(ImageNetInfo("imagenet-1k").label_names())}


def names_of(wnids: Sequence[str]) -> list[str]:
    """First synonym of each WordNet id, or all synonyms if the first is ambiguous; other ids are unchanged."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    whole = [info.label_name_to_description(wnid) if wnid in class_indices() else wnid for wnid in wnids]
    first = [name.split(",")[0].strip() for name in whole]
    count = Counter(first)
    return [short if count[short] == 1 else long for short, long in zip(first, whole, strict=True)]
