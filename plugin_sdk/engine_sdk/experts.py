"""Layers of experts in plain torch.

N tokens, k experts a token, S = N * k assignments. Each way makes one row per assignment, [N, k, hidden], and sums the
rows in fp32 in the order of the columns: which way was taken does not show, but in rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.interfaces import ExpertsMethod, ExpertsSpec, ExpertWeights


class TorchExperts(ExpertsMethod):
    """Any device: on a host the experts that were hit; elsewhere all of them, since asking which would wait for it."""

    def __init__(self, spec: ExpertsSpec) -> None:
        self.spec = spec

    def apply(self, x: Tensor, expert_ids: Tensor, scores: Tensor, weights: ExpertWeights) -> Tensor:
        """See `ExpertsMethod.apply`."""
        rows = self._hit(x, expert_ids, weights) if x.device.type == "cpu" else self._all(x, expert_ids, weights)
        return combine(rows, expert_ids, scores, self.spec.num_experts)

    def _expert(self, x: Tensor, index: int, weights: ExpertWeights) -> Tensor:
        """One expert for tokens [n, hidden]."""
        return self._product(
            weights.activate(self._product(x, index, weights.up, weights.up_bias)),
            index,
            weights.down,
            weights.down_bias,
        )

    def _product(self, x: Tensor, index: int, weight: Tensor, bias: Tensor | None) -> Tensor:
        matrix = weight[index].T if self.spec.transposed else weight[index]
        return F.linear(x, matrix, None if bias is None else bias[index])

    def _hit(self, x: Tensor, expert_ids: Tensor, weights: ExpertWeights) -> Tensor:
        flat = expert_ids.flatten()
        order = flat.argsort(stable=True)
        counts = flat.clamp(max=self.spec.num_experts).bincount(minlength=self.spec.num_experts)
        rows = x.new_zeros(flat.shape[0], x.shape[1])
        start = 0
        for expert, count in enumerate(counts.tolist()[: self.spec.num_experts]):
            if count:
                assigned = order[start : start + count]
                start += count
                rows[assigned] = self._expert(x[assigned // expert_ids.shape[1]], expert, weights)
        return rows.view(*expert_ids.shape, x.shape[1])

    def _all(self, x: Tensor, expert_ids: Tensor, weights: ExpertWeights) -> Tensor:
        rows = x.new_zeros(*expert_ids.shape, x.shape[1])
        for expert in range(self.spec.num_experts):
            made = self._expert(x, expert, weights)
            rows = torch.where((expert_ids == expert)[..., None], made[:, None], rows)
        return rows


class GroupedExperts(ExpertsMethod):
    """Two grouped matrix products over all experts; for devices whose `torch.nn.functional.grouped_mm` does not wait.

    The inner sizes times the dtype's size must be multiples of 16 bytes.
    """

    def __init__(self, spec: ExpertsSpec) -> None:
        self.spec = spec

    def apply(self, x: Tensor, expert_ids: Tensor, scores: Tensor, weights: ExpertWeights) -> Tensor:
        """See `ExpertsMethod.apply`."""
        experts, top_k = self.spec.num_experts, expert_ids.shape[1]
        flat = expert_ids.flatten().clamp(max=experts)
        order = flat.argsort(stable=True)
        expert_of_row = flat[order]
        # Rows past the last expert's end belong to no expert and hold garbage, which `combine` leaves out.
        ends = torch.searchsorted(expert_of_row, torch.arange(experts, device=x.device), right=True, out_int32=True)
        bias_of_row = expert_of_row.clamp(max=experts - 1)

        def product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            made = F.grouped_mm(rows, weight if self.spec.transposed else weight.transpose(1, 2), offs=ends)
            return made if bias is None else made + bias[bias_of_row]

        inner = weights.activate(product(x[order // top_k], weights.up, weights.up_bias))
        made = product(inner, weights.down, weights.down_bias)
        rows = torch.empty_like(made).index_copy_(0, order, made)
        return combine(rows.view(*expert_ids.shape, x.shape[1]), expert_ids, scores, experts)


def combine(rows: Tensor, expert_ids: Tensor, scores: Tensor, num_experts: int) -> Tensor:
    """Sum over the columns, in fp32 and in their order, of ``scores * rows``, where the expert exists.

    Args:
        rows: [N, k, hidden], the experts' outputs; garbage where the expert does not exist.
        expert_ids: int64 [N, k].
        scores: [N, k].
        num_experts: ids from here on do not exist.

    Returns:
        [N, hidden], dtype of `rows`.
    """
    exists = (expert_ids < num_experts)[..., None]
    total = torch.zeros(rows.shape[0], rows.shape[2], dtype=torch.float32, device=rows.device)
    for column in range(rows.shape[1]):
        weighted = rows[:, column].float() * scores[:, column, None].float()
        total += torch.where(exists[:, column], weighted, 0.0)
    return total.to(rows.dtype)
