"""Models by name or from a file, with their preprocessing."""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from captum_concepts._artifacts import is_there
from captum_concepts._checks import integer
from captum_concepts.activations import capture, input_errors
from captum_concepts.errors import InputError, InputWarning, did_you_mean
from captum_concepts.images import (
    ImageSource,
    Preprocessing,
    checked_size,
    input_channels,
    open_images,
    preprocessing_of,
)

#: Preprocessing of models that do not define their own.
_ASSUMED = Preprocessing((224, 224))


@dataclass(frozen=True)
class LoadedModel:
    """A model and its preprocessing.

    Args:
        model: the model, frozen and in evaluation mode.
        preprocessing: its size, normalization and interpolation.
        classes: names of its outputs; empty if unknown.
    """

    model: nn.Module
    preprocessing: Preprocessing
    classes: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Side of the square input in pixels."""
        return self.preprocessing.size[0] if self.preprocessing.size else 224

    def prepare(self, images: Tensor) -> Tensor:
        """Model inputs from images in [0, 1]."""
        return self.preprocessing(images)

    def open(self, source: Any, **options: Any) -> ImageSource:
        """Images in [0, 1] at the model's size, by default unlabeled and without unreadable ones."""
        mode = {1: "L", 3: "RGB", None: "RGB"}.get(input_channels(self.model), "any")
        options = {"labels": False, "skip_broken": True, **options}
        return open_images(source, mode=mode, size=self.size, preprocessing=self.preprocessing, **options)

    def empty(self) -> Tensor:
        """One gray image, prepared, on the model's device."""
        parameter = next(self.model.parameters(), torch.zeros(()))
        channels = input_channels(self.model) or 3
        return self.prepare(torch.full((1, channels, self.size, self.size), 0.5, device=parameter.device))


def load_model(
    name: str,
    *,
    weights: str | None = None,
    size: int | None = None,
    resize: str | None = None,
    num_classes: int | None = None,
    random_weights: bool = False,
) -> LoadedModel:
    """A model by name or from a Python file.

    Args:
        name: ``demo:classifier`` or ``demo:vit`` (bundled), a torchvision or timm name (``timm/NAME`` if both have it),
            or ``FILE.py:FUNCTION``, where the function returns a ``torch.nn.Module`` that takes RGB in [0, 1].
        weights: a local ``.safetensors`` or ``.pt`` file; for torchvision and timm names also ``"pretrained"``, which
            downloads them. Bundled models include their weights.
        size: side of the input; None: the model's own, from its library's metadata, or 224.
        resize: how a photograph becomes that square: ``"crop"``, ``"squash"`` or ``"pad"``; None: the model's own.
        num_classes: number of outputs of a torchvision or timm model, if the weights differ from the default.
        random_weights: allow torchvision and timm models without ``weights``, which then have random weights.

    Raises:
        InputError: an unknown name, missing weights, or weights that do not match the model.
    """
    own = name.startswith("demo:") or ".py:" in name
    if own and num_classes is not None:
        raise InputError(f"--num-classes is for torchvision and timm names; the number of outputs of {name} is fixed")
    if own and weights is not None and (name.startswith("demo:") or weights == "pretrained"):
        raise InputError(f"--weights {weights}: {name} comes with its weights; leave --weights out")
    if name.startswith("demo:"):
        loaded = _bundled(name.removeprefix("demo:"))
    elif ".py:" in name:
        model = _from_python(name)
        if weights is not None:
            _load_weights(model, Path(weights), name)
        known = preprocessing_of(model)
        if size is None and known is None:
            warnings.warn(
                f"the model of {name} does not specify its input size, so images are read at 224 x 224 pixels; pass "
                "--size if it was trained at another size",
                InputWarning,
                stacklevel=2,
            )
        loaded = LoadedModel(model, known or _ASSUMED)
    else:
        loaded = _from_zoo(name, weights, num_classes, random_weights)
    preprocessing = loaded.preprocessing if size is None else replace(loaded.preprocessing, size=checked_size(size))
    if resize is not None:  # squash and pad use the whole image
        preprocessing = replace(preprocessing, resize=resize, crop=preprocessing.crop if resize == "crop" else 1.0)
    loaded = replace(loaded, model=loaded.model.eval().requires_grad_(False), preprocessing=preprocessing)
    if ".py:" in name:
        image = loaded.empty()
        what = f"the model of {name}, called with a gray image {tuple(image.shape)},"
        parts = list(loaded.model.modules())
        with _users_code(what, Path(name.rpartition(":")[0])), torch.no_grad(), input_errors((image,), parts):
            loaded.model(image)
    return loaded


def to_device(module: nn.Module, device: str) -> None:
    """Move ``module`` to ``device``.

    Raises:
        InputError: the device is not available.
    """
    try:
        module.to(device)
    except (RuntimeError, AssertionError) as error:  # depending on device and build
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"device {device!r} cannot be used here ({reason.rstrip('.')}); pass cpu, cuda or mps"
        ) from error


def _bundled(name: str) -> LoadedModel:
    from captum_concepts import demo
    from captum_concepts.datasets import CaptionedScenes

    if name not in ("classifier", "vit"):
        raise InputError(f"there is no bundled model {name!r}; pass demo:classifier or demo:vit")
    model = demo.load(name)
    return LoadedModel(model, _preprocessing(model), CaptionedScenes(1, seed=0, size=64).classes)


def _from_python(spec: str) -> nn.Module:
    model = _call_python(spec)
    if not isinstance(model, nn.Module):
        raise InputError(f"{spec} returned {type(model).__name__}; it must return a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(f"{spec} returned a torch.jit model, whose layers cannot be read; return the original module")
    return model


def _call_python(spec: str) -> Any:
    path, _, function = spec.rpartition(":")
    file = Path(path)
    if not is_there(file):
        raise InputError(f"no file at {path}")
    name = f"_{file.stem}_of_the_user"
    module_spec = importlib.util.spec_from_file_location(name, file.resolve())
    if module_spec is None or module_spec.loader is None:
        raise InputError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    folder = str(file.resolve().parent)
    sys.path.insert(0, folder)  # it may import modules next to it
    sys.modules[module_spec.name] = module  # dataclasses look up their module
    try:
        with _users_code(spec, file):
            module_spec.loader.exec_module(module)
            made = getattr(module, function, None)
            if made is None:
                hint = did_you_mean(function, [n for n in vars(module) if not n.startswith("_")])
                raise InputError(f"{path} has no function {function!r}.{hint}")
            if not callable(made):
                raise InputError(f"{function!r} in {path} is {type(made).__name__}, not a function")
            return made if isinstance(made, nn.Module) else made()
    finally:  # keep the folder for later imports, but last, so that it does not shadow other modules
        sys.path[:] = [*(entry for entry in sys.path if entry != folder), folder]


@contextmanager
def _users_code(what: str, file: Path) -> Iterator[None]:
    """A context for the user's code, with its errors as InputError and its output on standard error."""
    here = Path.cwd()
    sys.stdout.flush()
    try:
        output: int | None = os.dup(1)
        os.dup2(2, 1)  # includes output of native code
    except OSError:  # no standard output
        output = None
    try:
        yield
    except InputError:
        raise
    except (Exception, SystemExit, GeneratorExit) as error:
        raise InputError(f"{what} failed with {type(error).__name__}: {error}{_place(error, file)}") from error
    finally:
        os.chdir(here)
        if output is not None:
            os.dup2(output, 1)
            os.close(output)


def _place(error: BaseException, file: Path) -> str:
    """Description of the last line of ``file`` in an error's traceback."""
    lines = [entry for entry in traceback.extract_tb(error.__traceback__) if Path(entry.filename) == file.resolve()]
    return f" (line {lines[-1].lineno} of {file.name})" if lines else ""


def _from_zoo(name: str, weights: str | None, num_classes: int | None, random_weights: bool = False) -> LoadedModel:
    import timm
    import torchvision

    library, _, name = name.rpartition("/")
    in_torchvision = library != "timm" and name in torchvision.models.list_models(module=torchvision.models)
    if not in_torchvision and not timm.is_model(name):
        hint = did_you_mean(name, [*torchvision.models.list_models(module=torchvision.models), *timm.list_models()])
        raise InputError(
            f"neither torchvision nor timm has a model {name!r}.{hint} Pass your own model as FILE.py:FUNCTION"
        )
    if weights is None and not random_weights:
        raise InputError(
            f"{name} has random weights without --weights; pass --weights FILE (local .safetensors or .pt) or "
            "--weights pretrained (downloads them)"
        )
    pretrained = weights == "pretrained"
    if num_classes is not None:
        integer("--num-classes", num_classes)
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if in_torchvision:
        known = torchvision.models.get_model_weights(name).DEFAULT
        model = torchvision.models.get_model(name, weights=known if pretrained else None, **options)
        categories = list(known.meta.get("categories", []))
        loaded = LoadedModel(model, _preprocessing(known), categories if num_classes in (None, len(categories)) else [])
    else:
        model = timm.create_model(name, pretrained=pretrained, **options)
        loaded = LoadedModel(model, _preprocessing(model))
    if weights is not None and not pretrained:
        _load_weights(model, Path(weights), name)
    return loaded


def _preprocessing(model: Any) -> Preprocessing:
    return preprocessing_of(model) or _ASSUMED


#: Keys of the weights in checkpoints of training scripts (Lightning, timm, torchvision).
_WRAPPERS = ("state_dict", "model_state_dict", "model")


def _load_weights(model: nn.Module, path: Path, name: str) -> None:
    if not is_there(path):
        raise InputError(f"no weights file at {path}")
    try:
        if path.suffix.lower() == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            for wrapper in _WRAPPERS:
                state = state[wrapper] if isinstance(state, dict) and isinstance(state.get(wrapper), dict) else state
        consume_prefix_in_state_dict_if_present(state, "module.")
        state = {key: v.float() if v.is_floating_point() else v for key, v in state.items()}
        model.load_state_dict(state)
    except Exception as error:  # every reader has its own exceptions, which all mean the same here
        first = (line if len(line) < 300 else f"{line[:300]} ..." for line in str(error).strip().splitlines()[:4])
        raise InputError(f"{path} does not contain weights of {name}: {' '.join(first)}") from error


def load_encoder(name: str, weights: str | None = None) -> Any:
    """A vision-language encoder, from ``demo:clip``, ``FILE.py:FUNCTION``, or an open_clip name with ``weights``.

    Args:
        name: as above; the function returns an object with ``encode_image`` and ``encode_text``.
        weights: for an open_clip name, a local file or a pretrained tag of open_clip (downloads).

    Raises:
        InputError: an unknown name, missing weights, or an object that is not an encoder.
    """
    if name == "demo:clip":
        from captum_concepts import demo

        return demo.load("clip")
    if ".py:" in name:
        made = _call_python(name)
        from captum_concepts.vlm import check_encoder

        check_encoder(made, words=True)
        return made
    if weights is None:
        raise InputError(
            f"open_clip's {name} requires --encoder-weights: a local file, or a pretrained tag (downloads)"
        )
    from captum_concepts.vlm import OpenCLIPEncoder

    return OpenCLIPEncoder.from_pretrained(name, weights)


def without_head(model: nn.Module, image: Tensor) -> nn.Module:
    """The same model with its last linear layer replaced in place, so that its output is the embedding before it.

    A model whose output is not that of a linear layer is unchanged, as its output is the embedding.
    """
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and name]
    for name, module in reversed(linear):
        try:
            seen = capture(model, image, [module])
        except InputError:
            continue
        if isinstance(seen.output, Tensor) and torch.equal(seen.output, seen.layers[0]):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.Identity())
            return model
    return model
