"""Tensor parallel: which module is split how, from the model's own plan, or from rules where it has none.

    colwise      x whole -> this rank's columns of the output      (q, k, v, gate, up)
    rowwise      this rank's columns of x -> partial sums -> their sum over the ranks      (o, down)
    gathered     colwise, and the columns of all ranks are joined      (lm_head; what is normed or sliced as a whole)
    split input  x whole -> its columns of this rank -> rowwise
    vocabulary   rows of the embedding; a token that is not here gives zeros, and the ranks' results are added

Attention is split by heads; a head of keys and values that several ranks need lies on each of them. Other widths need
not be divisible. What a plan leaves out, every rank has whole.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.errors import ConfigError, UnsupportedModelError
from engine.extensions.parallel.collectives import Group, bounds
from engine.extensions.parallel.context import check_heads
from engine.extensions.parallel.cuts import cut_parameter
from engine.extensions.parallel.experts import deal_out
from engine.model import probe
from engine.model.adapt import AdaptedModel, use

_ONE_CARD = "run it on one rank, or several whole ones with data_parallel_size"

WHOLE = frozenset({"replicate", "replicated_with_grad_allreduce", "mla_kv_a_proj", "local_params"})
WHOLE |= {"embedding_rowwise", "embedding_colwise"}
"""Styles whose modules take and give whole tensors, so that every rank may have them whole."""

_COLWISE = ("colwise",)
_GATHERED = ("colwise_gather_output", "colwise_rep")
_ROWWISE = ("rowwise",)
_SPLIT_INPUT = ("rowwise_split_input", "rowwise_rep")
_SUMS = ("moe_tp_experts", "all_reduce")

_RULES = (
    ({"q_proj", "k_proj", "v_proj", "qkv_proj", "q_lin", "k_lin", "v_lin", "query_key_value"}, "colwise"),
    ({"gate_proj", "up_proj", "fc1", "wi", "wi_0", "wi_1", "lin1", "dense_h_to_4h", "fc_in"}, "colwise"),
    ({"o_proj", "out_proj", "out_lin", "down_proj", "fc2", "wo", "lin2", "dense_4h_to_h", "fc_out"}, "rowwise"),
)
"""For models without a plan: the names that Transformers' models give their linear layers."""

_WRONG = {"Gemma3nForCausalLM": "its activation looks at all columns at once, which its plan splits"}
"""Models whose own plan gives something else than the whole model."""

_COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads", "num_kv_heads", "n_head", "embed_dim")
"""Attributes of attention modules that count what a rank has a share of; read by modules that have no plan."""


class TensorParallel:
    """Splits models over the ranks of `group`.

    Args:
        group: the ranks.
        experts: whole experts are dealt out to the ranks, in place of a part of each.
        context: so many neighbours among the ranks have a part of each sequence's tokens each.
    """

    def __init__(self, group: Group, *, experts: bool = False, context: int = 1) -> None:
        self._group, self._experts, self._context = group, experts, context
        self._biases: list[str] = []
        self._kept: list[object] = []

    def cut(self, adapted: AdaptedModel) -> None:
        """See `engine.model.share.Share.cut`."""
        model = adapted.model
        if reason := _WRONG.get(type(model).__name__):
            raise UnsupportedModelError(f"{type(model).__name__} cannot be split: {reason}; {_ONE_CARD}")
        use(model, probe.IMPLEMENTATION)
        self._seen = self._observe(adapted)
        if self._context > 1:
            check_heads(self._seen, self._group.size, self._context)
        self._names = {module: name for name, module in model.named_modules()}
        self._heads = {self._names[call.module]: call for call in self._seen.attention}
        plan, ruled = self._plan(model)
        self._dealt = self._deal_out(model) if self._experts else ()
        for name, style in plan.items():
            if not name.startswith(self._dealt):
                self._apply(model, name, style)
        if ruled:
            self._share_counts()
        self._vocabulary(model)
        self._share_sinks({name.rpartition(".")[0] for name, style in plan.items() if style in _COLWISE})
        self._check(adapted)

    def settle(self, model: nn.Module) -> None:
        """The weights are there: sums get the biases of one rank."""
        for name in self._biases if self._group.rank else ():
            model.get_parameter(f"{name}.bias").data.zero_()

    def _plan(self, model: PreTrainedModel) -> tuple[dict[str, str], bool]:
        """Style by the name of a module or parameter, and whether it comes from our rules."""
        outputs = model.get_output_embeddings()
        given = {n: s for n, s in (model.tp_plan or {}).items() if s not in WHOLE}
        names = [name for name, _ in (*model.named_modules(), *model.named_parameters()) if name]
        plan = {name: given[key] for name in names if (key := _generic(name)) in given and name != self._of(outputs)}
        if plan:
            return plan, False
        plan = {
            name: style
            for name, module in model.named_modules()
            if module in self._seen.linears
            for known, style in _RULES
            if name.rpartition(".")[2] in known and self._pairs(model, name)
        }
        if not plan:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no plan for tensor parallel, and none of our rules fits it; {_ONE_CARD}"
            )
        return plan, True

    def _pairs(self, model: PreTrainedModel, name: str) -> bool:
        """Whether the parent of `name` has layers that split and one that sums, and the widths between them agree."""
        path = name.rpartition(".")[0]
        children = model.get_submodule(path).named_children()
        styles = {child: style for child, _ in children for known, style in _RULES if child in known}
        linears: dict[str, Any] = {child: model.get_submodule(f"{path}.{child}") for child in styles}
        sums = {linears[child].in_features for child, style in styles.items() if style == "rowwise"}
        split = {linears[child].out_features for child, style in styles.items() if style == "colwise"}
        return len(sums) == 1 and (sums == split or (path in self._heads and bool(split)))

    def _of(self, module: object) -> str | None:
        return self._names.get(module) if isinstance(module, nn.Module) else None

    def _apply(self, model: PreTrainedModel, name: str, style: str) -> None:
        parent, _, last = name.rpartition(".")
        owner = model.get_submodule(parent)
        if last in owner._parameters:
            self._cut_parameter(owner, last, style)
            return
        module = model.get_submodule(name)
        if style in _SUMS:
            module.register_forward_hook(lambda module, args, output: self._group.all_reduce(output))
        elif style == "moe_identity_expert":
            module.register_forward_pre_hook(lambda module, args: (args[0] / self._group.size, *args[1:]))
        elif not isinstance(module, nn.Linear):
            raise UnsupportedModelError(f"{name} is split {style!r}, and is a {type(module).__name__}; {_ONE_CARD}")
        elif style in _COLWISE:
            self._columns(module, self._spans(name, module.out_features))
        elif style in _GATHERED:
            self._gathered(module, module.out_features)
        elif style in _ROWWISE:
            self._rows(module, self._spans(name, module.in_features))
        elif style in _SPLIT_INPUT:
            begin, end = self._bounds(module.in_features)
            module.register_forward_pre_hook(lambda module, args: (args[0][..., begin:end], *args[1:]))
            self._rows(module, [(begin, end)])
        elif style == "packed_colwise":
            self._columns(module, self._packed(module.out_features))
        else:
            known = ", ".join(sorted({*_COLWISE, *_ROWWISE, *_GATHERED, *_SPLIT_INPUT, *_SUMS, *WHOLE}))
            raise UnsupportedModelError(f"{name} has the style {style!r}, which is none of {known}; {_ONE_CARD}")

    def _bounds(self, size: int) -> tuple[int, int]:
        if size < self._group.size:
            raise ConfigError(f"tensor_parallel_size {self._group.size} is more than the {size} columns of a layer")
        return bounds(size, self._group.size, self._group.rank)

    def _spans(self, name: str, size: int) -> list[tuple[int, int]]:
        """This rank's part of a split width: by heads within attention."""
        call = next((c for path, c in self._heads.items() if name.startswith(f"{path}.")), None)
        if call is None:
            return [self._bounds(size)]
        heads, kv_heads = call.query.shape[1], call.key.shape[1]
        ranks, rank = self._group.size, self._group.rank
        if heads % ranks:
            fitting = [str(n) for n in range(1, heads + 1) if heads % n == 0]
            raise ConfigError(
                f"tensor_parallel_size {ranks} does not divide the {heads} heads of {_generic(name)}; choose one of "
                f"{', '.join(fitting)}"
            )
        count = heads
        if heads != kv_heads and size in (kv_heads * call.key.shape[3], kv_heads * call.value.shape[3]):
            count = kv_heads if re.match(r"(k|v)(_|$)|key|value", name.rpartition(".")[2]) else heads
        if size % count:
            raise UnsupportedModelError(f"{name} has {size} columns for {count} heads; {_ONE_CARD}")
        width = size // count
        if count % ranks == 0:
            begin, end = bounds(count, ranks, rank)
        elif ranks % count == 0:
            begin = rank * count // ranks
            end = begin + 1
        else:
            raise ConfigError(
                f"tensor_parallel_size {ranks} and the {count} heads of {_generic(name)} do not divide one another; "
                "choose another size"
            )
        return [(begin * width, end * width)]

    def _packed(self, size: int) -> list[tuple[int, int]]:
        """This rank's parts of two halves."""
        begin, end = self._bounds(size // 2)
        return [(begin, end), (size // 2 + begin, size // 2 + end)]

    def _cut_parameter(self, module: nn.Module, name: str, style: str) -> None:
        """A parameter that belongs to no linear layer, such as those of packed experts."""
        shape = module._parameters[name].shape  # type: ignore[union-attr]
        last = len(shape) - 1
        dim = max(0, last - 1) if style in ("colwise", "packed_colwise") else last
        if name.endswith("bias"):
            if style in ("rowwise", "packed_rowwise"):
                return
            dim = last
        if style not in ("colwise", "rowwise", "packed_colwise", "packed_rowwise"):
            raise UnsupportedModelError(f"{self._names[module]}.{name} has the style {style!r}; {_ONE_CARD}")
        path = f"{self._names[module]}.{name}"
        spans = self._packed(shape[dim]) if style.startswith("packed") else self._spans(path, shape[dim])
        cut_parameter(module, name, dim, spans)

    def _columns(self, linear: nn.Linear, spans: list[tuple[int, int]]) -> None:
        cut_parameter(linear, "weight", 0, spans)
        cut_parameter(linear, "bias", 0, spans)
        linear.out_features = linear.weight.shape[0]

    def _gathered(self, linear: nn.Linear, size: int) -> None:
        """Shares are padded to equal widths, since that is quicker to join; the padding is dropped again."""
        width = -(-size // self._group.size)
        begin = self._group.rank * width
        self._columns(linear, [(begin, begin + width)])
        sizes = [width] * self._group.size
        linear.register_forward_hook(lambda module, args, output: self._group.all_gather(output, sizes)[..., :size])

    def _rows(self, linear: nn.Linear, spans: list[tuple[int, int]]) -> None:
        cut_parameter(linear, "weight", 1, spans)
        linear.in_features = linear.weight.shape[1]
        linear.register_forward_hook(lambda module, args, output: self._group.all_reduce(output))
        if linear.bias is not None:
            self._biases.append(self._names[linear])

    def _share_sinks(self, split: set[str]) -> None:
        """Sinks [heads] go with their heads, in attention modules that are split."""
        for call in self._seen.attention:
            sinks = call.kwargs.get("s_aux")
            name = next((name for name, p in call.module._parameters.items() if p is sinks), None)
            if sinks is not None and name is not None and self._names[call.module] in split:
                cut_parameter(call.module, name, 0, [self._bounds(len(sinks))])

    def _share_counts(self) -> None:
        """Models without a plan count heads by attributes of their modules."""
        for call in self._seen.attention:
            for name in _COUNTS:
                if isinstance(count := getattr(call.module, name, None), int):
                    setattr(call.module, name, max(1, count // self._group.size))

    def _vocabulary(self, model: PreTrainedModel) -> None:
        """Split the embedding of tokens and the layer that makes logits, unless something else reads their weights."""
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
        table, head = ends
        users = {name.rpartition(".")[0] for name, p in model.named_parameters(remove_duplicate=False)
                 if any(p is getattr(end, "weight", None) for end in ends)}  # fmt: skip
        alone = users <= {self._of(end) for end in ends}
        tied = getattr(table, "weight", None) is getattr(head, "weight", 0)
        if not alone or (tied and not (isinstance(table, nn.Embedding) and isinstance(head, nn.Linear))):
            return
        if isinstance(head, nn.Linear) and head in self._seen.linears:
            self._gathered(head, head.out_features)
        elif tied:
            return
        if isinstance(table, nn.Embedding) and table.max_norm is None:
            width = -(-table.num_embeddings // self._group.size)
            begin = self._group.rank * width
            if tied:
                table.weight = head.weight
            else:
                cut_parameter(table, "weight", 0, [(begin, begin + width)])
            table.padding_idx = None
            self._embed_share(table, begin, width)

    def _embed_share(self, table: nn.Embedding, begin: int, width: int) -> None:
        def forward(input: Tensor) -> Tensor:
            rows = input - begin
            here = (rows >= 0) & (rows < width)
            whole: Tensor = type(table).forward(table, rows.clamp(0, width - 1))  # its class may be exchanged
            return self._group.all_reduce(whole * here[..., None])

        table.forward = forward  # type: ignore[method-assign]

    def _deal_out(self, model: PreTrainedModel) -> tuple[str, ...]:
        """Deal whole experts out; the names of the modules that have them, with a dot."""
        found = []
        for module in self._seen.experts:
            self._kept.append(deal_out(module, self._group))
            found.append(self._names[module])
        if not found:
            raise ConfigError(
                f"enable_expert_parallel: {type(model).__name__} has no experts, or has them as modules of their own; "
                "leave it out"
            )
        return tuple(found)

    def _observe(self, adapted: AdaptedModel) -> probe.Observations:
        try:
            return probe.observe(adapted.model, adapted.run, torch.device("meta"))
        except UnsupportedModelError as error:
            raise UnsupportedModelError(
                f"{type(adapted.model).__name__} does not run split over {self._group.size} ranks: {error}; {_ONE_CARD}"
            ) from error

    def _check(self, adapted: AdaptedModel) -> None:
        """Look again: the model still runs, and attends with its share of the heads."""
        before, now = self._seen, self._observe(adapted)
        if now.vocab_size != before.vocab_size or len(now.attention) != len(before.attention):
            raise UnsupportedModelError(f"{type(adapted.model).__name__} gives something else when split; {_ONE_CARD}")
        for old, new in zip(before.attention, now.attention, strict=True):
            share = (old.query.shape[1], old.query.shape[1] // self._group.size)
            same = old.query.shape[2:] == new.query.shape[2:] and old.kwargs.get("scaling") == new.kwargs.get("scaling")
            slopes = old.kwargs.get("alibi_slopes") is None or old.query.shape[1] == new.query.shape[1]
            sinks = (s := new.kwargs.get("s_aux")) is None or len(s) == new.query.shape[1]
            if new.query.shape[1] not in share or not same or not slopes or not sinks:
                raise UnsupportedModelError(f"{self._names[old.module]} attends otherwise when split; {_ONE_CARD}")


def _generic(name: str) -> str:
    """A name as plans have it: with a star for each number."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
