"""The package's image reader, which opens any source of images and preprocesses them for a model."""

from captum_concepts.images.files import (
    IMAGE_FORMATS,
    IMAGE_SUFFIXES,
    Photograph,
    class_folders,
    find_images,
    load_image,
    load_photograph,
    names_of,
    opened_image,
)
from captum_concepts.images.fingerprint import digest, fingerprint
from captum_concepts.images.labels import checked_labels, class_name, known_labels
from captum_concepts.images.pixels import Placement, Reading, checked_size, placement
from captum_concepts.images.preprocessing import Preprocessing, input_channels, preprocessing_of
from captum_concepts.images.source import (
    IMAGE_KEYS,
    Batch,
    ImageSource,
    as_seen,
    batches,
    inputs_for,
    open_images,
    thumbnails,
    to_tensor,
)
from captum_concepts.images.text import read_json, read_text, read_words

__all__ = [
    "IMAGE_FORMATS",
    "IMAGE_KEYS",
    "IMAGE_SUFFIXES",
    "Batch",
    "ImageSource",
    "Photograph",
    "Placement",
    "Preprocessing",
    "Reading",
    "as_seen",
    "batches",
    "checked_labels",
    "checked_size",
    "class_folders",
    "class_name",
    "digest",
    "find_images",
    "fingerprint",
    "input_channels",
    "inputs_for",
    "known_labels",
    "load_image",
    "load_photograph",
    "names_of",
    "open_images",
    "opened_image",
    "placement",
    "preprocessing_of",
    "read_json",
    "read_text",
    "read_words",
    "thumbnails",
    "to_tensor",
]
