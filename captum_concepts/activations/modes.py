"""Moved to :mod:`captum_concepts.activations`."""

from captum_concepts.activations.capture import eager_mode, evaluation_mode, gradients_enabled

__all__ = ["eager_mode", "evaluation_mode", "gradients_enabled"]
