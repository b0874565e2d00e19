"""Test case of the contract of concept explainers, to inherit for a method of your own.

from captum_concepts.testing import ExplainerTestCase

class TestMyMethod(ExplainerTestCase):
    def make_model(self): ...
    def make_explainer(self, model): ...
    def make_images(self): ...
"""

from captum_concepts.testing.explainer_test_case import ExplainerTestCase

__all__ = ["ExplainerTestCase"]
