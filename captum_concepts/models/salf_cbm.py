"""SALF-CBM: a classifier whose only way to its decision leads through maps of named concepts."""

from __future__ import annotations

from captum_concepts.models._salf_hub import SALFHub


class SALFCBM(SALFHub):
    r"""Spatially-aware, label-free concept bottleneck model (SALF-CBM, "Show and Tell").

    The backbone's features :math:`f(x)`, resized bilinearly to the grid, are projected by a 1 x 1 convolution into one
    map for each concept; the maps' means, standardised over the training data, are all that the linear head sees:

    .. math:: c(x) = g(f(x)) \in \mathbb{R}^{M \times h \times w}, \quad
        c^*_m = \frac{\operatorname{mean}_{ij} c_m(i, j) - \mu_m}{\sigma_m}, \quad z = W c^* + b

    so a decision explains itself by :math:`S(x, m, l) = W_{lm} c^*_m` (what, how much) and :math:`c(x)_m` (where).

    Args:
        backbone: any module that maps images to something; torchvision, timm, an open_clip tower, your own.
        layer: the layer whose output are the features: a module of the backbone or its dotted name (which
            ``model.layer`` then is). Nothing behind it is computed.
        concepts: the M names: a list, or a :class:`~captum_concepts.concepts.Vocabulary`.
        num_classes: L.
        grid: ``(h, w)`` of the concept maps, the grid of the prompts they were trained with.
        cls_token: concatenate the CLS token to each patch along the channels; D is then twice the layer's width.
        class_names: L names, or None.
        freeze_backbone: no parameter of the backbone is trained, and it stays in evaluation mode under ``train()``.
            Sets ``requires_grad`` of its parameters to False. If False, only those are frozen that have no influence
            on the layer, such as the old classifier.
        layout: of the layer's output: ``"auto"``, ``"NCHW"``, ``"NHWC"``, ``"NLC"`` or ``"LNC"``.
        prefix_tokens: tokens in front of the grid; None infers it.
        feature_dim: D, if known; None finds it by one forward of an empty image.
        input_size: ``(height, width)`` of that image; None takes what the backbone declares, or tries.
        metadata: what the model card shall say: a JSON-able dictionary.

    Attributes:
        bottleneck: ``nn.Conv2d(D, M, 1, bias=False)``.
        head: ``nn.Linear(M, L)``.
        concept_mean, concept_std: ``(M,)`` buffers, 0 and 1 until :meth:`set_standardization`.
        metadata: see above.

    Raises:
        InputError: concepts empty or named twice, a bad grid or number of classes, no CLS token.
        LayerError, LayoutError: unknown layer, or one without a grid.

    Reference:
        Benou, I., Riklin Raviv, T. *Show and Tell: Visually Explainable Deep Neural Nets via Spatially-Aware Concept
        Bottleneck Models.* CVPR 2025, arXiv:2502.20134.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from captum_concepts.models.salf_cbm import SALFCBM
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
        >>> model = SALFCBM(net, "0", ["fur", "wheels", "grass"], num_classes=2, grid=(7, 7))
        >>> images = torch.rand(4, 3, 64, 64)
        >>> model(images).shape, model.concept_maps(images).shape, model.concept_activations(images).shape
        (torch.Size([4, 2]), torch.Size([4, 3, 7, 7]), torch.Size([4, 3]))

        What it saw, where, and how much that moved a logit; in the whole image, and in a part of it:

        >>> explanation = model.explain(images, target=0, top_k=2)
        >>> explanation.scores.shape, explanation.maps.shape, explanation.contributions.shape
        (torch.Size([4, 2]), torch.Size([4, 2, 7, 7]), torch.Size([4, 2]))
        >>> len(model.explain_region(images, boxes=(0, 0, 32, 32), top_k=1).concepts)
        1

        What it would say without grass in the lower half, and its rules:

        >>> before, after = model.intervene(images, "grass", boxes=(0, 32, 64, 64), beta=-1.0)
        >>> bool((before != after).any()), len(model.decision_rules(0))
        (True, 3)
    """
