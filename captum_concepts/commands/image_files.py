"""Image files for a command: those that cannot be read are named, and the others go on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from captum_concepts.errors import CaptumConceptsError, InputError
from captum_concepts.images import load_image

Failed = list[dict[str, str]]


def note_failure(image: object, error: Exception, failed: Failed) -> None:
    """Put an image on the list of failures and say so on stderr."""
    failed.append({"image": str(image), "reason": str(error)})
    print(f"skipped: {error}", file=sys.stderr)


def readable_images(paths: Iterable[Path], size: int, failed: Failed) -> Iterator[tuple[Path, Tensor]]:
    """Each readable image; the others go to ``failed`` and to stderr."""
    for path in paths:
        try:
            image = load_image(path, size)
        except CaptumConceptsError as error:
            note_failure(path, error, failed)
            continue
        yield path, image


class ImageFiles(Dataset[Tensor]):
    """The readable files among ``paths``, read again whenever one is asked for, so any number of them fits in memory.

    Args:
        paths: image files. Each is looked at once; those that cannot be read go to ``failed``.
        size: side of the square in pixels.
        failed: see above.
        transform: applied to each image.
        what: how a progress bar and messages call them.

    Raises:
        InputError: none of them can be read.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        size: int,
        failed: Failed,
        *,
        transform: Callable[[Tensor], Tensor] | None = None,
        what: str = "images",
    ) -> None:
        self.size, self.transform = size, transform
        bar = tqdm(paths, desc=f"reading {what}", unit="image", file=sys.stderr, disable=None, leave=False)
        self.files = [path for path, _ in readable_images(bar, size, failed)]
        if not self.files:
            raise InputError(f"no readable image among the {len(paths)} of {what}")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        image = load_image(self.files[index], self.size)
        return image if self.transform is None else self.transform(image)
