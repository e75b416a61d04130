"""Pipeline parallel: each stage has some of the layers, and a step passes through the stages one after another.

    stage 0    embedding, layers 0 to 1, [sends] ........................................... no logits
    stage 1    zeros,     ............. [receives], layers 2 to 3, norm, logits

As many steps are under way as there are stages, each with other sequences, so that all stages work at once:

    stage 0    | a | b | a | b |         the driver gives step b to the ranks while a is under way; what
    stage 1        | a | b | a | b |     the last stage draws for a comes back through it, before a goes on

States travel in one direction only, and each stage runs the steps in the same order, so none waits for itself.

Every stage runs the model's own forward pass. What another stage has is there by name, without weights: layers pass on
what they get, and the last one before a stage's own receives the states, the first one after them sends them on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.errors import ConfigError, UnsupportedModelError
from engine.extensions.parallel.collectives import Group, bounds
from engine.extensions.parallel.cuts import cut_away
from engine.logprobs import DeviceLogprobs
from engine.model import probe
from engine.model.adapt import AdaptedModel, use
from engine.request import CoreRequest
from engine.runner import InFlight, ModelRunner
from engine.sampler import Sampled, Sampler, SamplingPlan
from engine.staging import Staging


class Pipeline:
    """Leaves a model its layers of one stage.

    Args:
        group: a rank of each stage, in order.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._first, self._last = group.rank == 0, group.rank == group.size - 1

    def cut(self, adapted: AdaptedModel) -> None:
        """See `engine.model.share.Share.cut`."""
        model = adapted.model
        begins, layers, ends = _plan(model)
        if len(layers) < self._group.size:
            raise ConfigError(
                f"pipeline_parallel_size {self._group.size} is more than the model's {len(layers)} layers"
            )
        vocab_size = self._look(adapted, layers)
        begin, end = bounds(len(layers), self._group.size, self._group.rank)
        away: list[nn.Module] = [*layers[:begin], *layers[end:]]
        for index, layer in enumerate(layers):
            if not begin <= index < end:
                self._pass_on(layer, receives=index == begin - 1, sends=index == end)
        if not self._first:
            for module in begins:
                _give_zeros(module)
            away += begins
        if not self._last:
            for module in ends:
                _give(module, _same)
            away += ends
            head: Any = model.get_output_embeddings()
            head._forward_hooks.clear()  # nothing is joined
            head.__class__, head.out_features = _NoLogits, vocab_size
            away.append(head)
        cut_away(model, away)

    def _look(self, adapted: AdaptedModel, layers: list[nn.Module]) -> int:
        """The size of the vocabulary; raises where a layer takes or gives more than the states."""
        outputs: list[tuple[object, object]] = []

        def keep(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
            outputs.append((args[0] if args else None, output))

        handles = [layer.register_forward_hook(keep) for layer in layers]
        use(adapted.model, probe.IMPLEMENTATION)
        seen = probe.observe(adapted.model, adapted.run, torch.device("meta"))
        for handle in handles:
            handle.remove()
        plain = all(isinstance(x, Tensor) for pair in outputs for x in pair)
        if len(outputs) != len(layers) or not plain:
            raise UnsupportedModelError(
                f"{type(adapted.model).__name__} has layers that take or give more than one tensor of states, or run "
                "several times, so it is not cut into stages; use tensor_parallel_size"
            )
        return seen.vocab_size

    def _pass_on(self, layer: Any, *, receives: bool, sends: bool) -> None:
        communicator, rank, entered = self._group.communicator, self._group.rank, self._group.entered

        def forward(states: Tensor, *args: Any, **options: Any) -> Tensor:
            if states.is_meta:
                return states
            if receives:
                entered()
                return communicator.receive(states, rank - 1)
            if sends:
                entered()
                communicator.send(states, rank + 1)
            return states

        layer.forward = forward


class _NoLogits(nn.Linear):
    """Stands where logits would be made: no linear layer that anyone fuses. A probe sees their shape."""

    def forward(self, input: Tensor) -> Tensor:
        return input.new_zeros(*input.shape[:-1], self.out_features if input.is_meta else 1)


class _NoSampler(Sampler):
    """Stands where another stage draws."""

    def admit(self, row: int, request: CoreRequest, token_ids: list[int]) -> None:
        """Nothing depends on the request."""

    def plan(self, rows: list[int], positions: list[int], staging: Staging) -> SamplingPlan:
        """Stages nothing."""
        return SamplingPlan(len(rows))

    def sample(self, logits: Tensor, plan: SamplingPlan) -> Sampled:
        """Ids that nobody reads."""
        return Sampled(torch.zeros(len(logits), dtype=torch.int64, device=logits.device))

    def prompt_logprobs(self, logits: Tensor, next_token_ids: Tensor, num: int) -> DeviceLogprobs:
        """None."""
        return DeviceLogprobs(logits.new_zeros(0, 1, dtype=torch.int32), [], [], 0)


def draw_nothing(runner: ModelRunner) -> None:
    """Make `runner` one of an earlier stage: it has no logits, and learns what the last one drew."""
    runner.sampler = _NoSampler(1, runner.scheduler_config.max_num_seqs, torch.device("cpu"), runner.platform.ops())


def learn(runner: ModelRunner, step: InFlight, token_ids: list[int | None]) -> None:
    """Tell an earlier stage what the last one drew for `step`, in the order of its work."""
    for at in step.batch.sampled:
        work, token = step.batch.work[at], token_ids[step.batch.order[at]]
        if token is not None and runner.requests.get(work.row) is step.requests[at]:  # else the row has another owner
            rows = runner.builder.rows
            rows.token_ids[work.row, work.start + work.num_tokens], rows.sampled_at[work.row] = token, -1


def _plan(model: PreTrainedModel) -> tuple[list[nn.Module], list[nn.Module], list[nn.Module]]:
    """What comes before the layers, the layers, and what comes after them; without the layer that makes logits.

    A model without a plan has its layers in the one list of modules that is no part of another, and every stage has
    all but these and the embedding.
    """
    head = model.get_output_embeddings()
    listed = [module for name, module in model.named_modules() if name in (model.pp_plan or ()) and module is not head]
    if not listed:
        outer: list[nn.Module] = []
        for module in model.modules():
            if isinstance(module, nn.ModuleList) and not any(module in list(other.modules()) for other in outer):
                outer.append(module)
        listed = [model.get_input_embeddings(), *outer]
    stacks = [index for index, module in enumerate(listed) if isinstance(module, nn.ModuleList)]
    if len(stacks) != 1 or not isinstance(head, nn.Linear):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no plan for stages, and not one list of layers; use tensor_parallel_size, or "
            "data_parallel_size"
        )
    (at,) = stacks
    stack: Any = listed[at]
    return listed[:at], list(stack), listed[at + 1 :]


def _give_zeros(module: nn.Module) -> None:
    """In place of what another stage computes: of the same shape."""
    if not isinstance(module, nn.Embedding):
        _give(module, _same)
        return
    width, dtype = module.embedding_dim, module.weight.dtype
    _give(module, lambda ids, *args: torch.zeros(*ids.shape, width, dtype=dtype, device=ids.device))


def _give(module: Any, forward: Callable[..., Tensor]) -> None:
    module.forward = forward


def _same(states: Tensor, *args: Any, **options: Any) -> Tensor:
    return states
