"""Raw attention of vision transformers, from the class token of a block to the patches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from captum_concepts._checks import integer
from captum_concepts._undo import undone, unharming
from captum_concepts.activations.capture import (
    Inputs,
    check_images,
    copied,
    eager_mode,
    evaluation_mode,
    forward_arguments,
)
from captum_concepts.activations.layers import find_model, full_precision
from captum_concepts.activations.layout import ModelTraits, check_prefix_tokens, token_grid
from captum_concepts.errors import LayerError


@unharming
def attention_maps(
    forward_func: Callable[..., Any],
    inputs: Inputs,
    *,
    block: int = -1,
    prefix_tokens: int | None = None,
    additional_forward_args: Any = None,
) -> Tensor:
    r"""``(N, heads, h, w)`` raw attention of a vision transformer.

    The map is the row of the class token and the columns of the patches of one block's attention,

    .. math:: A = \mathrm{softmax}(Q K^T / \sqrt{d})

    or the mean over all rows without a class token. It depends on neither class nor concept; SALF-CBM's paper compares
    it with its maps (Figure 9).

    Args:
        forward_func: the model, one of its methods, or any callable. The weights are read from its forward
            pass, whether it uses torch's fused kernel, ``nn.MultiheadAttention``, or products and a softmax.
        inputs: images ``(N, C, H, W)``.
        block: index of the attention in execution order; -1 is the last one.
        prefix_tokens: number of tokens before the grid; None infers it.
        additional_forward_args: passed to ``forward_func`` after the inputs.

    Raises:
        LayerError: no self-attention over all tokens of an image ran (a convolutional network, or attention within
            windows), or the block does not exist.
        LayoutError: the tokens do not form a grid for the images' size.

    Example:
        >>> from captum_concepts import demo
        >>> attention_maps(demo.load("vit"), torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 4, 8, 8])
    """
    integer("block", block, least=-(10**6))
    check_prefix_tokens(prefix_tokens)
    given = check_images(inputs)
    images, model = given[0], find_model(forward_func)
    seen = _Softmaxes(len(images))
    fast = torch.backends.mha.get_fastpath_enabled()
    with undone(lambda: torch.backends.mha.set_fastpath_enabled(fast)):
        torch.backends.mha.set_fastpath_enabled(False)  # a fused block does not expose its weights
        with eager_mode(), torch.no_grad(), evaluation_mode(model), sdpa_kernel(SDPBackend.MATH), seen:
            forward_func(*copied((*given, *forward_arguments(additional_forward_args))))
    if not seen.rows:
        raise LayerError("no self-attention over all tokens of an image ran; attention_maps is for vision transformers")
    if not -len(seen.rows) <= block < len(seen.rows):
        raise LayerError(f"block={block}, but {len(seen.rows)} attention blocks ran; -1 selects the last one")
    first, mean = seen.rows[block]
    size = (images.shape[-2], images.shape[-1])
    traits = ModelTraits() if model is None else ModelTraits.of(dict(model.named_modules()))
    shape = (len(images), first.shape[-1], 0)
    grid, prefix = token_grid(shape[1], size, prefix_tokens, traits, f"attention {block}", shape)
    return full_precision(first if prefix else mean)[..., prefix:].unflatten(2, grid).contiguous()


class _Softmaxes(TorchDispatchMode):
    """Records the first row and the mean over the rows of every softmax over the tokens of an image."""

    def __init__(self, examples: int) -> None:
        super().__init__()
        self.examples = examples
        self.rows: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten._softmax, torch.ops.aten._safe_softmax):
            length = result.shape[-1] if result.ndim > 2 else 0
            if length > 1 and result.shape[-2] == length:
                weights = result.detach().reshape(-1, length, length)
                heads, left = divmod(len(weights), self.examples)
                whole = result.ndim == 3 or result.shape[0] == self.examples  # not the windows of each image
                if heads and not left and whole:
                    kept = (weights[:, 0].clone(), weights.mean(1))
                    self.rows.append(tuple(x.unflatten(0, (self.examples, heads)) for x in kept))
        return result
