"""Contract of all concept explainers of this package, as tests that other methods can inherit."""

from __future__ import annotations

import copy
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captum_concepts.errors import InputError
from captum_concepts.explanation import ConceptExplainer, ConceptExplanation, ContributionExplainer


class ExplainerTestCase(ABC):
    """Tests of the contract of :class:`~captum_concepts.explanation.ConceptExplainer`.

    Inherit from this class, implement the three ``make_`` methods, and name the class ``Test...`` for pytest (add
    ``unittest.TestCase`` as a base for unittest). Every test builds its own model, explainer and images.
    ``contributions`` and ``save`` are also tested if the method has them.

    Attributes:
        rank_by: default ranking of ``explain``.
        tolerance: allowed difference between batched and single results, relative to the largest value.

    Example:
        >>> class TestBrightness(ExplainerTestCase):
        ...     def make_model(self):
        ...         return nn.Identity()
        ...     def make_images(self):
        ...         return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        ...     def make_explainer(self, model):
        ...         return Brightness()
        >>> class Brightness:
        ...     concepts = ["red", "green", "blue"]
        ...     def scores(self, inputs):
        ...         return check(inputs).detach().mean((2, 3))
        ...     def concept_maps(self, inputs, concepts=None):
        ...         return check(inputs).detach()[:, name_positions(concepts, self.concepts)]
        ...     def explain(self, inputs, target=None, *, concepts=None, top_k=5, rank_by="scores", contributions=True):
        ...         scores = self.scores(inputs)
        ...         chosen = Selection.choose(self.concepts, scores, concepts=concepts, top_k=top_k, rank_by=rank_by)
        ...         maps = inputs[torch.arange(len(inputs))[:, None], chosen.index]
        ...         names = [self.concepts[column] for column in chosen.columns]
        ...         return ConceptExplanation(names, scores[:, chosen.columns], chosen.spread(maps),
        ...             selected=chosen.selected, rank_by=chosen.rank_by)
        >>> from captum_concepts._checks import name_positions
        >>> from captum_concepts.explanation import Selection
        >>> def check(inputs):
        ...     if inputs.ndim != 4:
        ...         raise InputError("no batch dimension; pass image[None]")
        ...     if not inputs.is_floating_point():
        ...         raise InputError("convert pixels to floating point")
        ...     return inputs
        >>> for name, test in TestBrightness().cases():
        ...     test()
    """

    rank_by = "scores"
    tolerance = 1e-4

    @abstractmethod
    def make_model(self) -> nn.Module:
        """The explained network, identical on every call."""

    @abstractmethod
    def make_explainer(self, model: nn.Module) -> Any:
        """The method, ready to explain ``model``."""

    @abstractmethod
    def make_images(self) -> Tensor:
        """At least three different images ``(N, C, H, W)``."""

    def cases(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """All tests with their names, for other test runners."""
        return ((name, getattr(self, name)) for name in sorted(dir(type(self))) if name.startswith("test_"))

    def _made(self) -> tuple[nn.Module, Any, Tensor]:
        model = self.make_model()
        return model, self.make_explainer(model), self.make_images()

    def _close(self, a: Tensor, b: Tensor) -> None:
        assert a.shape == b.shape, f"{tuple(a.shape)} is not {tuple(b.shape)}"
        assert torch.equal(a.isnan(), b.isnan())
        a, b = a.nan_to_num(0).double(), b.nan_to_num(0).double()
        scale = max(float(b.abs().max()) if b.numel() else 0.0, 1e-30)
        gap = float((a - b).abs().max()) / scale if b.numel() else 0.0
        assert gap <= self.tolerance, f"differs by {gap:.3g} of the largest value, allowed {self.tolerance:.3g}"

    def test_it_is_an_explainer(self) -> None:
        _, explainer, images = self._made()
        assert isinstance(explainer, ConceptExplainer)
        names = list(explainer.concepts)
        assert len(set(names)) == len(names) > 0
        scores, maps = explainer.scores(images), explainer.concept_maps(images)
        assert scores.shape == (len(images), len(names))
        assert maps.ndim == 4
        assert maps.shape[:2] == (len(images), len(names))
        for values in (scores, maps):
            assert values.is_floating_point()
            assert not values.requires_grad
            assert bool(values.isfinite().all())

    def test_concepts_are_chosen_by_name_or_number_in_the_order_given(self) -> None:
        _, explainer, images = self._made()
        names = list(explainer.concepts)
        order = list(reversed(range(len(names))))
        whole = explainer.concept_maps(images)
        self._close(explainer.concept_maps(images, [names[k] for k in order]), whole[:, order])
        self._close(explainer.concept_maps(images, order[:1]), whole[:, order[:1]])
        explanation = explainer.explain(images, concepts=[names[k] for k in order], contributions=False)
        assert explanation.concepts == [names[k] for k in order]
        assert bool(explanation.selected.all())
        self._close(explanation.maps, whole[:, order])
        self._close(explanation.scores, explainer.scores(images)[:, order])
        for bad in (["no such concept"], [len(names)], [], [names[0], names[0]]):
            with self._refused():
                explainer.concept_maps(images, bad)

    def test_an_image_says_the_same_in_a_batch_as_alone(self) -> None:
        _, explainer, images = self._made()
        calls = [explainer.scores, explainer.concept_maps]
        calls += [explainer.contributions] if isinstance(explainer, ContributionExplainer) else []
        whole = [call(images) for call in calls]
        together = explainer.explain(images, top_k=2)
        for i in range(len(images)):
            for call, all_rows in zip(calls, whole, strict=True):
                self._close(call(images[i : i + 1]), all_rows[i : i + 1])
            alone, one = explainer.explain(images[i : i + 1], top_k=2), together[i]
            assert one.concepts == alone.concepts
            self._close(one.scores, alone.scores)
            self._close(one.maps, alone.maps)
            if alone.contributions is not None and one.contributions is not None:
                self._close(one.contributions, alone.contributions)

    def test_each_image_shows_its_own_strongest(self) -> None:
        _, explainer, images = self._made()
        names = list(explainer.concepts)
        whole = explainer.concept_maps(images)
        for k in (1, 2, None):
            explanation = explainer.explain(images, top_k=k)
            count = len(names) if k is None else min(k, len(names))
            assert explanation.selected.sum(1).tolist() == [count] * len(images)
            hidden = ~explanation.selected
            assert bool(explanation.maps[hidden].isnan().all())
            for i, one in enumerate(explanation):
                self._close(one.maps[0], whole[i, [names.index(name) for name in one.concepts]])
                ranked = one.contributions.abs() if self.rank_by == "contributions" else one.scores
                assert ranked[0].tolist() == sorted(ranked[0].tolist(), reverse=True)
                if self.rank_by == "scores":
                    rest = explainer.scores(images)[i]
                    assert float(one.scores.min()) >= float(rest.sort(descending=True).values[count - 1]) - 1e-6
        for bad in (0, -1, 1.5, "2"):
            with self._refused():
                explainer.explain(images, top_k=bad)
        with self._refused():
            explainer.explain(images, rank_by="maps")

    def test_contributions(self) -> None:
        _, explainer, images = self._made()
        if not isinstance(explainer, ContributionExplainer):
            return
        names = list(explainer.concepts)
        whole = explainer.contributions(images)
        assert whole.shape == (len(images), len(names))
        self._close(explainer.contributions(images, concepts=names[-1:]), whole[:, -1:])
        explanation = explainer.explain(images, concepts=names)
        assert explanation.contributions is not None
        self._close(explanation.contributions, whole)
        assert explanation.target is not None
        by_target = explainer.contributions(images, target=explanation.target.tolist())
        self._close(by_target, whole)
        assert explainer.explain(images, concepts=names, contributions=False).contributions is None

    def test_the_model_is_left_as_it_was(self) -> None:
        model, explainer, images = self._made()
        model.train()
        modes = [module.training for module in model.modules()]
        state = copy.deepcopy(model.state_dict())
        flags = [parameter.requires_grad for parameter in model.parameters()]
        random = torch.get_rng_state()
        for call in (explainer.scores, explainer.concept_maps, explainer.explain):
            call(images)
        with self._refused():
            explainer.explain(images, concepts=["no such concept"])
        assert [module.training for module in model.modules()] == modes
        assert [parameter.requires_grad for parameter in model.parameters()] == flags
        assert all(parameter.grad is None for parameter in model.parameters())
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), random)
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        assert not any(getattr(module, name) for module in model.modules() for name in hooks)

    def test_gradients_may_be_off_and_images_may_want_them(self) -> None:
        _, explainer, images = self._made()
        expected = explainer.concept_maps(images)
        with torch.no_grad():
            self._close(explainer.concept_maps(images), expected)
        with torch.inference_mode():
            self._close(explainer.concept_maps(images).clone(), expected)
        wanted = images.clone().requires_grad_()
        maps = explainer.concept_maps(wanted)
        assert not maps.requires_grad
        self._close(maps, expected)
        assert wanted.grad is None

    def test_what_is_no_batch_of_images_is_refused(self) -> None:
        _, explainer, images = self._made()
        for bad in (images[0], (images * 255).to(torch.uint8)):
            for call in (explainer.scores, explainer.concept_maps, explainer.explain):
                with self._refused():
                    call(bad)

    def test_it_is_saved_and_loaded(self) -> None:
        model, explainer, images = self._made()
        if not hasattr(explainer, "save") or not hasattr(type(explainer), "load"):
            return
        with tempfile.TemporaryDirectory() as folder:
            path = explainer.save(Path(folder) / "explainer.safetensors")
            again = type(explainer).load(path, model)
        assert list(again.concepts) == list(explainer.concepts)
        assert torch.equal(again.concept_maps(images), explainer.concept_maps(images))
        assert torch.equal(again.scores(images), explainer.scores(images))

    def test_what_it_prints_is_no_address(self) -> None:
        _, explainer, images = self._made()
        assert "object at 0x" not in repr(explainer) or type(explainer).__repr__ is object.__repr__
        assert isinstance(explainer.explain(images, top_k=1), ConceptExplanation)

    @contextmanager
    def _refused(self) -> Iterator[None]:
        try:
            yield
        except InputError as error:
            if not 0 < len(str(error)) <= 600:
                raise AssertionError(f"a message of {len(str(error))} characters") from error
        else:
            raise AssertionError("accepted, although it is wrong; an InputError is expected")
