"""Image towers for dense embeddings: open_clip's own ViT and ResNet, timm trunks, and Hugging Face models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_concepts.errors import InputError
from captum_concepts.vlm.dense import Tower, attend, class_token_tower, multihead_projections, needs_class_token


def open_clip_tower(visual: Any, *, attention: str, remove_outliers: bool) -> Tower:
    """The :class:`Tower` of open_clip's ``model.visual``.

    Raises:
        InputError: an unknown tower; the message names the alternative.
    """
    options: dict[str, Any] = {"attention": attention, "remove_outliers": remove_outliers}
    if hasattr(visual, "trunk") and hasattr(visual, "head"):
        return _timm(visual, options)
    if hasattr(visual, "attnpool") and hasattr(visual, "layer4"):
        needs_class_token(attention, type(visual).__name__)
        return _attention_pooled(visual, visual.layer4, visual.attnpool)
    if hasattr(visual, "transformer") and hasattr(visual, "conv1"):
        return _vision_transformer(visual, options)
    raise _unknown(visual)


def _unknown(module: Any) -> InputError:
    return InputError(
        f"{type(module).__name__} has no dense regions here; use RegionPrompt('circle') or RegionPrompt('crop'), which "
        "need nothing but encode_image"
    )


def _vision_transformer(visual: Any, options: dict[str, Any]) -> Tower:
    block = visual.transformer.resblocks[-1]

    def pool(cells: Tensor) -> Tensor:
        tokens = cells[:, None].expand(-1, 2, -1)  # as class token and as patch
        pooled = visual._pool(tokens)[0]
        return pooled if visual.proj is None else pooled @ visual.proj

    def grid(pixels: Tensor) -> tuple[int, int]:
        height, width = visual.patch_size
        return pixels.shape[2] // height, pixels.shape[3] // width

    if visual.attn_pool is not None:  # CoCa: attention pooling over the output of the last block
        needs_class_token(options["attention"], "an attentional pooler")

        def features(pixels: Tensor) -> Tensor:
            tokens = visual.transformer(visual._embeds(pixels))
            return tokens[:, 1:].unflatten(1, grid(pixels))

        return Tower(features, pool)
    if not isinstance(getattr(block, "attn", None), nn.MultiheadAttention):
        raise _unknown(block)

    def project(tokens: Tensor, attention: str) -> Tensor:
        q, k, v = multihead_projections(block.attn, block.ln_1(tokens))
        return block.ls_1(block.attn.out_proj(attend(q, k, v, attention)))

    def run(pixels: Tensor) -> Any:
        return visual.transformer(visual._embeds(pixels))

    if not visual.transformer.batch_first:
        raise _unknown(visual.transformer)
    return class_token_tower(block, run, grid, 1, project, pool, **options)


def _attention_pooled(visual: Any, last: nn.Module, attention_pool: Any) -> Tower:
    """The tower of CLIP's ResNets, with attention over the positions of the last stage."""

    def features(pixels: Tensor) -> Tensor:
        x = visual.stem(pixels)
        for stage in (visual.layer1, visual.layer2, visual.layer3, last):
            x = stage(x)
        return x.permute(0, 2, 3, 1) + _positions(attention_pool.positional_embedding, *x.shape[2:]).to(x.dtype)

    def pool(cells: Tensor) -> Tensor:
        return attention_pool.c_proj(attention_pool.v_proj(cells))

    return Tower(features, pool)


def _positions(embedding: Tensor, height: int, width: int) -> Tensor:
    """``(h, w, C)`` of a position embedding ``(1 + h*w, C)`` whose first row is for the mean."""
    if len(embedding) != 1 + height * width:
        raise InputError(f"{len(embedding) - 1} position embeddings do not fit a map of {height} x {width}")
    return embedding[1:].unflatten(0, (height, width))


def _timm(visual: Any, options: dict[str, Any]) -> Tower:
    trunk, head = visual.trunk, visual.head
    pooling = getattr(head, "pool", None)
    if pooling is not None:  # open_clip's attention pooling of a convolutional trunk
        needs_class_token(options["attention"], type(pooling).__name__)
        return _timm_attention_pool(trunk, head, pooling)
    prefix = int(getattr(trunk, "num_prefix_tokens", 0) or 0)

    def as_cells(found: Tensor, pixels: Tensor) -> Tensor:
        if found.ndim == 3:
            return found[:, prefix:].unflatten(1, _patch_grid(trunk, pixels, found.shape[1] - prefix))
        channels_last = getattr(trunk, "output_fmt", None)
        return found if str(channels_last).endswith("NHWC") else found.permute(0, 2, 3, 1)

    def pool(cells: Tensor) -> Tensor:
        if tokens:
            return head(trunk.forward_head(cells[:, None].expand(-1, 1 + prefix, -1)))
        one = cells[:, None, None] if channels_last else cells[:, :, None, None]
        return head(trunk.forward_head(one))

    pool_kind = getattr(trunk, "global_pool", "")
    tokens = hasattr(trunk, "blocks") and hasattr(trunk, "cls_token")
    channels_last = str(getattr(trunk, "output_fmt", "")).endswith("NHWC")
    if tokens and pool_kind == "token":
        return _timm_class_token(trunk, prefix, pool, options)
    needs_class_token(options["attention"], type(trunk).__name__)
    return Tower(lambda pixels: as_cells(trunk.forward_features(pixels), pixels), pool)


def _timm_class_token(trunk: Any, prefix: int, pool: Any, options: dict[str, Any]) -> Tower:
    block = trunk.blocks[-1]
    attention: Any = getattr(block, "attn", None)
    if not (hasattr(attention, "proj") and hasattr(attention, "num_heads") and hasattr(block, "norm1")):
        raise _unknown(block)
    if options["attention"] != "value" and getattr(trunk, "rope", None) is not None:
        raise InputError(
            f"attention={options['attention']!r} is not for towers with rotary position embeddings; use 'value'"
        )

    def project(tokens: Tensor, kind: str) -> Tensor:
        q, k, v = (
            part.unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
            for part in _timm_projections(attention, block.norm1(tokens))
        )
        q, k = attention.q_norm(q), attention.k_norm(k)
        found = attention.proj(getattr(attention, "norm", nn.Identity())(attend(q, k, v, kind)))
        gamma = getattr(block, "gamma_1", None)
        return trunk.norm(getattr(block, "ls1", nn.Identity())(found if gamma is None else gamma * found))

    def grid(pixels: Tensor) -> tuple[int, int]:
        return _patch_grid(trunk, pixels, None)

    return class_token_tower(block, trunk.forward_features, grid, prefix, project, pool, **options)


def _timm_projections(attention: Any, tokens: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values ``(N, L, C)`` of timm's attention modules."""
    if getattr(attention, "qkv", None) is None:
        return attention.q_proj(tokens), attention.k_proj(tokens), attention.v_proj(tokens)
    bias = attention.qkv.bias
    if bias is None and getattr(attention, "q_bias", None) is not None:
        bias = torch.cat([attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias])
    return F.linear(tokens, attention.qkv.weight, bias).chunk(3, dim=2)


def _patch_grid(trunk: Any, pixels: Tensor, count: int | None) -> tuple[int, int]:
    height, width = trunk.patch_embed.patch_size
    size = (pixels.shape[2] // height, pixels.shape[3] // width)
    if count is not None and size[0] * size[1] != count:
        raise InputError(f"{type(trunk).__name__} has {count} tokens, not a grid of {size}; use RegionPrompt instead")
    return size


def _timm_attention_pool(trunk: Any, head: Any, pooling: Any) -> Tower:
    embedding: Any = getattr(pooling, "pos_embed", None)
    learned = isinstance(embedding, nn.Parameter)  # a rotary embedding affects only queries and keys

    def features(pixels: Tensor) -> Tensor:
        x = trunk.forward_features(pixels)
        cells = x.permute(0, 2, 3, 1)
        return cells + _positions(embedding, x.shape[2], x.shape[3]).to(x.dtype) if learned else cells

    def pool(cells: Tensor) -> Tensor:
        if getattr(pooling, "qkv", None) is not None:
            value = F.linear(cells, *(_last_third(part) for part in (pooling.qkv.weight, pooling.qkv.bias)))
        else:
            value = pooling.v(cells)
        after = [module for name, module in head.named_children() if name != "pool"]
        found = pooling.proj(value)
        for module in after:
            found = module(found)
        return found

    return Tower(features, pool)


def _last_third(part: Tensor | None) -> Any:
    return None if part is None else part.chunk(3)[2]


def transformers_tower(
    model: Any, inputs: Callable[[Tensor], dict[str, Tensor]], *, attention: str, remove_outliers: bool
) -> Tower:
    """The :class:`Tower` of a CLIP or SigLIP model of the transformers library.

    Args:
        model: the whole model.
        inputs: from pixels to the keyword arguments of its image tower.
        attention, remove_outliers: see :class:`~captum_concepts.vlm.DenseRegions`.
    """
    vision = model.vision_model
    names = {
        "pixel_values": "pixel_values",
        "pixel_attention_mask": "attention_mask",
        "spatial_shapes": "spatial_shapes",
    }

    def run(pixels: Tensor) -> Any:
        given = inputs(pixels)
        try:
            return vision(**given)
        except TypeError:  # the tower uses other argument names
            return vision(**{names[name]: value for name, value in given.items()})

    def grid(pixels: Tensor) -> tuple[int, int]:
        side = int(model.config.vision_config.patch_size)
        return pixels.shape[2] // side, pixels.shape[3] // side

    if callable(getattr(vision, "head", None)):
        needs_class_token(attention, "an attention pooling head")
        return Tower(
            lambda pixels: run(pixels).last_hidden_state.unflatten(1, grid(pixels)),
            lambda cells: vision.head(cells[:, None]),
        )
    block: Any = vision.encoder.layers[-1] if hasattr(getattr(vision, "encoder", None), "layers") else None
    if not (hasattr(block, "self_attn") and hasattr(model, "visual_projection")):
        raise _unknown(vision)

    def project(tokens: Tensor, kind: str) -> Tensor:
        own, normed = block.self_attn, block.layer_norm1(tokens)
        q, k, v = (
            part(normed).unflatten(2, (-1, own.head_dim)).transpose(1, 2)
            for part in (own.q_proj, own.k_proj, own.v_proj)
        )
        return own.out_proj(attend(q, k, v, kind))

    def pool(cells: Tensor) -> Tensor:
        return model.visual_projection(vision.post_layernorm(cells))

    options: dict[str, Any] = {"attention": attention, "remove_outliers": remove_outliers}
    return class_token_tower(block, run, grid, 1, project, pool, **options)
