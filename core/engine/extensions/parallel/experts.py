"""Expert parallel: each rank has whole experts, and tokens travel to them and back.

    rank r takes its share of the tokens
      -> sorts the pairs of token and expert by the expert's rank, and tells each rank how many it will get
      -> all-to-all of the tokens -> the experts of this rank -> all-to-all of the results
      -> adds up what each token's experts gave, weighted -> all-gather of the shares

The counts go through the host, so a step with experts that are dealt out is not captured.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import ConfigError
from engine.extensions.parallel.collectives import Group, bounds
from engine.extensions.parallel.cuts import cut_parameter

_numbers = itertools.count()
_dispatchers: weakref.WeakValueDictionary[int, _Dispatcher] = weakref.WeakValueDictionary()

_library: Any = torch.library.Library("engine", "FRAGMENT")
_library.define("dispatch(Tensor x, Tensor expert_ids, Tensor scores, Tensor handle) -> Tensor")


class _Dispatcher:
    """What stands before one layer of experts.

    Attributes:
        handle: int64 [], on the host; what the operation finds it by.
    """

    def __init__(self, module: nn.Module, num_experts: int, group: Group) -> None:
        self._run = functools.partial(type(module).forward, module)
        self._group = group
        ranks = range(group.size)
        self._begins = [bounds(num_experts, group.size, rank)[0] for rank in ranks]
        self._num_experts = num_experts
        self.handle = torch.tensor(next(_numbers))
        _dispatchers[int(self.handle)] = self

    def forward(self, x: Tensor, expert_ids: Tensor, scores: Tensor) -> Tensor:
        """Tokens [N, hidden], ids and scores [N, top_k], the same on all ranks, to [N, hidden]."""
        comm, rank, size = self._group.communicator, self._group.rank, self._group.size
        shares = [bounds(len(x), size, r) for r in range(size)]
        begin, end = shares[rank]
        mine, ids, weights = x[begin:end], expert_ids[begin:end], scores[begin:end]
        top_k = ids.shape[1]
        flat, order = ids.reshape(-1).sort(stable=True)
        counts = torch.bincount(flat, minlength=self._num_experts)
        per_rank = torch.stack([part.sum() for part in counts.tensor_split(self._begins[1:])])
        self._group.entered()
        every = comm.all_gather(per_rank[None]).tolist()  # [from][to], on the host
        send, receive = every[rank], [row[rank] for row in every]
        rows = comm.all_to_all(mine[order // top_k], send, receive)
        local = comm.all_to_all(flat[:, None], send, receive) - self._begins[rank]
        if len(rows):
            rows = self._run(rows, local, torch.ones_like(local, dtype=weights.dtype))
        back = comm.all_to_all(rows, receive, send)
        placed = torch.empty_like(back)
        placed[order] = back
        summed = (placed.view(-1, top_k, x.shape[1]) * weights[..., None]).sum(1).to(x.dtype)
        return comm.all_gather(summed, 0, [e - b for b, e in shares])

    def observe(self, x: Tensor, expert_ids: Tensor, scores: Tensor) -> Tensor:
        """On `meta`: the experts are called as `forward` will, with one a token."""
        result: Tensor = self._run(x, expert_ids[:, :1], scores[:, :1])
        return result


def _dispatch(x: Tensor, expert_ids: Tensor, scores: Tensor, handle: Tensor) -> Tensor:
    return _dispatchers[int(handle.item())].forward(x, expert_ids, scores)


_library.impl("dispatch", _dispatch, "CompositeExplicitAutograd")
torch.library.register_fake("engine::dispatch", lambda x, *_: torch.empty_like(x), lib=_library)


def deal_out(module: Any, group: Group) -> _Dispatcher:
    """Leave this rank its experts of a layer, whose parameters are on `meta`, and send tokens to the others'."""
    names = [name for name, _ in module.named_parameters(recurse=False)]
    num_experts = module._parameters[names[0]].shape[0]
    if num_experts < group.size:
        raise ConfigError(f"enable_expert_parallel: {num_experts} experts are too few for {group.size} ranks")
    if getattr(module, "has_post_expert_norm", False):
        raise ConfigError("enable_expert_parallel: experts with a norm after each are not dealt out; leave it out")
    span = bounds(num_experts, group.size, group.rank)
    for name in names:
        cut_parameter(module, name, 0, [span])
    dispatcher = _Dispatcher(module, num_experts, group)
    module.num_experts, module.engine_dispatch = span[1] - span[0], dispatcher.handle
    kind: Any = type(module)
    module.__class__ = _sending(kind)
    return dispatcher


@functools.cache
def _sending(experts: type[nn.Module]) -> type[nn.Module]:
    """A class of experts that sends tokens; one for all layers, so that they share compiled code."""

    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if hidden_states.is_meta:
            return _dispatchers[int(self.engine_dispatch)].observe(hidden_states, top_k_index, top_k_weights)
        result: Tensor = torch.ops.engine.dispatch(hidden_states, top_k_index, top_k_weights, self.engine_dispatch)
        return result

    return type(f"Sending{experts.__name__}", (experts,), {"forward": forward})
