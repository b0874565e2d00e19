"""Concept evidence of single positions, from the translator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_concepts.activations import full_precision
from captum_concepts.attr.concept_fusion.regions import TEMPERATURE, coarser_grid, resize
from captum_concepts.attr.concept_fusion.words import TextBank

_MOST_CELLS = 256  # each is one row of the translator, in total about a quarter of a ResNet-50's forward pass
_ROWS = 4096  # translator inputs at once
_ENTRIES = 2**22  # cells x concepts at once
_NOTHING = 1e-5  # rounding differences


@dataclass(frozen=True)
class LocalReading:
    r"""The translator's embedding of each cell of the layers, read as if the cell were the whole image.

    A gradient measures what would change the concept; a local reading measures what is present at the cell. A late
    layer's cell also depends on its surroundings, within its receptive field.

    Args:
        unit: ``(N, P, D)`` unit embeddings of the cells.
        log_sum: ``(N, P)`` values :math:`\log \sum_t \exp(S^t / u)` over all concepts.
        bank: the concepts.
        grid: of the P cells.
    """

    unit: Tensor
    log_sum: Tensor
    bank: TextBank
    grid: tuple[int, int]

    def excess(self, index: Tensor) -> Tensor:
        r"""``(N, J, h, w)`` excess, in [0, 1), of the likelihood of concept ``index[n, j]`` over its mean.

        .. math:: \max(q_p - \operatorname{mean}_p q_p, 0), \quad q_p = \frac{P_p}{\max_p P_p}, \quad
            P_p = \frac{\exp(S^t_p / u)}{\sum_s \exp(S^s_p / u)}

        A uniform reading returns zeros. For a single concept, the sum is left out.
        """
        logit = self.bank.scale * torch.einsum("npd,njd->njp", self.unit, self.bank.direction[index])
        logit = logit + self.bank.offset[index].unsqueeze(-1)
        log_p = logit / TEMPERATURE - self.log_sum.unsqueeze(1)
        q = torch.exp(log_p - log_p.amax(2, keepdim=True))
        return (q - q.mean(2, keepdim=True) - _NOTHING).relu().unflatten(2, self.grid)


@torch.no_grad()
def read_locally(translator: nn.Module, maps: Sequence[Tensor], grid: tuple[int, int], bank: TextBank) -> LocalReading:
    """The :class:`LocalReading` of the translator on every cell.

    Args:
        translator: maps a list of ``(n, C_l)`` to ``(n, D)``.
        maps: ``(N, C_l, h_l, w_l)`` each; finer layers are averaged over the cell, coarser ones interpolated.
        grid: of the cells, divided by the smallest integer that leaves at most 256.
    """
    grid = coarser_grid(grid, _MOST_CELLS)
    columns = []
    for activation in maps:
        finer = activation.shape[-2] >= grid[0] and activation.shape[-1] >= grid[1]
        cells = F.adaptive_avg_pool2d(activation, grid) if finer else resize(activation, grid)
        columns.append(cells.flatten(2).transpose(1, 2).flatten(0, 1))
    parts = [translator(list(part)) for part in zip(*(column.split(_ROWS) for column in columns), strict=True)]
    unit = F.normalize(full_precision(torch.cat(parts)), dim=-1)
    bank = bank.to(unit)
    log_sum = unit.new_zeros(len(unit))
    if len(bank.names) > 1:
        rows = max(1, _ENTRIES // len(bank.names))
        log_sum = torch.cat([(bank.logits(part) / TEMPERATURE).logsumexp(1) for part in unit.split(rows)])
    shape = (len(maps[0]), grid[0] * grid[1])
    return LocalReading(unit.unflatten(0, shape), log_sum.unflatten(0, shape), bank, grid)
