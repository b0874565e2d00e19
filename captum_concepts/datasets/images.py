"""Former location of :mod:`captum_concepts.images`, kept for existing imports."""

from captum_concepts.images import IMAGE_SUFFIXES, class_folders, find_images, load_image, opened_image
from captum_concepts.images.files import MOST_PIXELS

__all__ = ["IMAGE_SUFFIXES", "MOST_PIXELS", "class_folders", "find_images", "load_image", "opened_image"]
