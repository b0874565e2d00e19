"""Concept examples, random examples and labeled images, from whatever holds them, prepared for one model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from captum.concept import Concept
from torch import Tensor, nn

from captum_concepts._checks import unique_names
from captum_concepts.errors import InputError
from captum_concepts.images import ImageSource, Reading, open_images, preprocessing_of

SIZE = 224


@dataclass(frozen=True)
class Reader:
    """How images are read for one model: tensors as they are, files and PIL images prepared.

    Args:
        model: takes the images; None if it is not known.
        transform: PIL image to tensor. None reads files at the model's own size and normalizes them, if the library
            that the model comes from says how; else in [0, 1] at ``image_size``.
        image_size: of files; None takes the model's own, else 224.
    """

    model: nn.Module | None
    transform: Callable[[Any], Any] | None = None
    image_size: int | None = None

    def open(self, source: Any, labels: Any = None, name: str = "") -> ImageSource:
        """``source`` as one sequence of images.

        Raises:
            InputError: it contains no images, or labels do not fit.
        """
        if isinstance(source, ImageSource):
            return source
        mode = {1: "L", 3: "RGB"}.get(input_channels(self.model) or 0, "any")
        try:
            if isinstance(source, Tensor) and source.is_floating_point():
                return open_images(source, mode=mode, labels=labels)
            return open_images(source, transform=self._transform(mode), labels=labels)
        except InputError as error:
            raise InputError(f"{name + ': ' if name else ''}{error}") from error

    def _transform(self, mode: str) -> Callable[[Any], Tensor]:
        known = None if self.transform is not None or self.model is None else preprocessing_of(self.model)
        size = self.image_size or (known.size if known is not None else None) or SIZE
        how = (
            {} if known is None else {"interpolation": known.interpolation, "crop": known.crop, "resize": known.resize}
        )
        plain, reading = Reading(mode=mode), Reading(size, mode, **how)  # type: ignore[arg-type]

        def prepared(image: Any) -> Tensor:
            if isinstance(image, Tensor):
                pixels = plain.from_tensor(image)
                return pixels if image.is_floating_point() or known is None else known(pixels)
            if self.transform is not None:
                made: Tensor = self.transform(image)
                return made
            pixels = reading.tensor_of(image)
            return pixels if known is None else known(pixels)

        return prepared


def named_sets(given: Any, what: str, reader: Reader) -> dict[str, ImageSource]:
    """Sets of images by name.

    Args:
        given: ``{name: images}``, a ``captum.concept.Concept`` or a list of them; for negatives also one set alone.
        what: ``"concepts"`` or ``"negatives"``, for messages.
        reader: how the images are read.

    Raises:
        InputError: nothing there, a name twice, or a type that holds no images.
    """
    listed = isinstance(given, (list, tuple)) and all(isinstance(item, Concept) for item in given)
    if isinstance(given, Mapping):
        sets = [(str(name), source) for name, source in given.items()]
    elif listed or isinstance(given, Concept):
        sets = [(item.name, item) for item in (given if listed else [given])]
    elif what == "negatives":
        sets = [("negatives", given)]
    else:
        kind = f"a tensor {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        raise InputError(
            f"{what} must be a dict of name -> images (tensor, list, data set or folder) or a list of "
            f"captum.concept.Concept, got {kind}"
        )
    if not sets:
        raise InputError(f"{what} are empty; pass at least one set of images")
    unique_names([name for name, _ in sets], what.rstrip("s"))
    return {name: _opened(name, source, reader) for name, source in sets}


def _opened(name: str, source: Any, reader: Reader) -> ImageSource:
    if isinstance(source, Concept):
        if source.data_iter is None:
            raise InputError(f"the captum Concept {name!r} has no data_iter; pass it a DataLoader of images")
        source = source.data_iter
    if hasattr(source, "__next__"):
        raise InputError(f"{name!r} is an iterator, which can be read only once; pass a list or a DataLoader")
    return reader.open(source, labels=False, name=repr(name))


def input_channels(model: nn.Module | None) -> int | None:
    """How many channels the model's images have: those that its first image convolution takes; None if unknown."""
    for module in model.modules() if model is not None else ():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    return None


def placed(images: Tensor, model: nn.Module | None) -> Tensor:
    """``images`` on the device and in the dtype of the model."""
    parameters = model.parameters() if model is not None else ()
    parameter = next((p for p in parameters if p.is_floating_point()), None)
    return images if parameter is None else images.to(parameter.device, parameter.dtype)
