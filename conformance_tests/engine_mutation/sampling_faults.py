"""Draws, penalties and log probabilities that are nearly what was asked for."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from engine_mutation.catalogue import Ops, fault
from engine_sdk import REFERENCE_OPS, DrawInputs, OpSet

_DRAW = "test_sampling.py::test_draw"
_PENALISE = "test_sampling.py::test_penalise"
_LOGPROBS = "test_sampling.py::test_logprobs"
_REPETITION, _FREQUENCY, _PRESENCE = range(3)


@fault("L1", "test_sampling.py::test_greedy")
class TieToTheLast(Ops):
    """Of equal logits the last is taken, where the first is the rule."""

    @staticmethod
    def draw(logits: Tensor, inputs: DrawInputs | None) -> Tensor:
        if inputs is not None:
            return REFERENCE_OPS.draw(logits, inputs)
        return logits.shape[1] - 1 - logits.flip(-1).max(-1).indices


@fault("L1", "test_sampling.py::test_greedy")
class TieAtRandom(Ops):
    """Of equal logits any is taken."""

    @staticmethod
    def draw(logits: Tensor, inputs: DrawInputs | None) -> Tensor:
        if inputs is not None:
            return REFERENCE_OPS.draw(logits, inputs)
        best = (logits == logits.amax(-1, keepdim=True)).float() + 1e-9
        return best.multinomial(1).squeeze(1)


@fault("L1", "test_sampling.py::test_greedy")
class MaskedRowDrawsNan(Ops):
    """A row of which every token is masked gives an id beyond the vocabulary."""

    @staticmethod
    def draw(logits: Tensor, inputs: DrawInputs | None) -> Tensor:
        ids = REFERENCE_OPS.draw(logits, inputs)
        return torch.where(logits.isneginf().all(-1), logits.shape[1], ids)


@fault("L1", "test_sampling.py::test_greedy")
class NanNeverTaken(Ops):
    """NaN counts as -inf, which hides what went wrong before."""

    @staticmethod
    def draw(logits: Tensor, inputs: DrawInputs | None) -> Tensor:
        return REFERENCE_OPS.draw(logits.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf), inputs)


@fault("L1", _DRAW)
class OneNumberForTheBatch(Ops):
    """All rows are drawn with the first row's random number."""

    @staticmethod
    def draw(logits: Tensor, inputs: DrawInputs | None) -> Tensor:
        if inputs is not None:
            inputs = replace(inputs, u=inputs.u[:1].expand_as(inputs.u).contiguous())
        return REFERENCE_OPS.draw(logits, inputs)


@fault("L1", _DRAW)
class OneTemperatureForTheBatch(Ops):
    """All rows are drawn with the first row's temperature."""

    @staticmethod
    def draw(logits: Tensor, inputs: DrawInputs | None) -> Tensor:
        if inputs is not None:
            inputs = replace(inputs, scale=inputs.scale[:1].expand_as(inputs.scale).contiguous())
        return REFERENCE_OPS.draw(logits, inputs)


@fault("L1", _DRAW)
class TopKOneMore(Ops):
    """One token more than asked for stays."""

    @staticmethod
    def draw(logits: Tensor, inputs: DrawInputs | None) -> Tensor:
        if inputs is not None:
            more = torch.where(inputs.top_k > 1, inputs.top_k + 1, inputs.top_k).clamp(max=logits.shape[1])
            largest = int(torch.where(more < logits.shape[1], more, 0).max())
            inputs = replace(inputs, top_k=more, max_top_k=largest)
        return REFERENCE_OPS.draw(logits, inputs)


@fault("L1", _DRAW)
class TopPIgnored(Ops):
    """Nucleus sampling keeps every token."""

    @staticmethod
    def draw(logits: Tensor, inputs: DrawInputs | None) -> Tensor:
        if inputs is not None:
            inputs = replace(inputs, top_p=torch.full_like(inputs.top_p, DrawInputs.ONE), any_top_p=False)
        return REFERENCE_OPS.draw(logits, inputs)


@fault("L1", _DRAW)
class MinPIgnored(Ops):
    """The least share of the likeliest token's probability is not looked at."""

    @staticmethod
    def draw(logits: Tensor, inputs: DrawInputs | None) -> Tensor:
        if inputs is not None:
            inputs = replace(inputs, cut=torch.full_like(inputs.cut, DrawInputs.LAST), any_min_p=False)
        return REFERENCE_OPS.draw(logits, inputs)


@fault("L1", "test_sampling.py::test_draw_does_not_see_the_batch")
class TopKIgnoredBesideTopP(Ops):
    """Where both filters are asked for, the nucleus is cut out of all tokens, not of the k likeliest."""

    @staticmethod
    def draw(logits: Tensor, inputs: DrawInputs | None) -> Tensor:
        if inputs is not None and inputs.any_top_p and inputs.max_top_k:
            wide = torch.where(inputs.top_p < DrawInputs.ONE, logits.shape[1], inputs.top_k)
            wide = torch.where(inputs.top_k == 1, 1, wide)
            largest = int(torch.where(wide < logits.shape[1], wide, 0).max())
            inputs = replace(inputs, top_k=wide, max_top_k=largest if largest > 1 else 0)
        return REFERENCE_OPS.draw(logits, inputs)


@fault("L1", "test_sampling.py::test_draw_from_a_large_vocabulary")
class VocabularyOf16Bits(Ops):
    """Token ids are kept in 16 bits."""

    @staticmethod
    def draw(logits: Tensor, inputs: DrawInputs | None) -> Tensor:
        return REFERENCE_OPS.draw(logits, inputs) & 0xFFFF


@fault("L1", "test_sampling.py::test_draw_from_a_large_vocabulary")
class DrawnFromSixteenBits(Ops):
    """Logits are rounded to bf16 before the draw."""

    @staticmethod
    def draw(logits: Tensor, inputs: DrawInputs | None) -> Tensor:
        return REFERENCE_OPS.draw(logits.bfloat16(), inputs)


@fault("L1", _DRAW)
class LogitsChangedByTheDraw(Ops):
    """The draw scales the caller's logits in place."""

    @staticmethod
    def draw(logits: Tensor, inputs: DrawInputs | None) -> Tensor:
        ids = REFERENCE_OPS.draw(logits, inputs)
        if inputs is not None:
            logits.mul_(inputs.scale[:, None].to(logits.dtype))
        return ids


@fault("L1", "test_sampling.py::test_draws_spread_as_they_should")
class DrawSkipsTheRarest(Ops):
    """Tokens less likely than one in a hundred are never drawn."""

    @staticmethod
    def draw(logits: Tensor, inputs: DrawInputs | None) -> Tensor:
        if inputs is not None:
            inputs = replace(inputs, cut=inputs.cut.clamp(max=7 << 16), any_min_p=True)
        return REFERENCE_OPS.draw(logits, inputs)


@fault("L1", _PENALISE)
class RepetitionDividesNegatives(Ops):
    """The repetition penalty divides negative logits too, and so rewards them."""

    @staticmethod
    def penalise(logits: Tensor, history: Tensor, places: Tensor, penalties: Tensor) -> None:
        index, slots = places
        x, seen = logits[index].clone(), history[slots] > 0
        REFERENCE_OPS.penalise(logits, history, places, penalties)
        ratio = penalties[_REPETITION][:, None] ** 2
        made = logits[index]
        logits[index] = torch.where(seen & (x < 0), made / ratio, made)


@fault("L1", _PENALISE)
class PromptCountsAsOutput(Ops):
    """Frequency and presence penalties count the prompt's tokens."""

    @staticmethod
    def penalise(logits: Tensor, history: Tensor, places: Tensor, penalties: Tensor) -> None:
        prompt = (history >= OpSet.PROMPT).int()
        REFERENCE_OPS.penalise(logits, history + prompt, places, penalties)


@fault("L1", _PENALISE)
class PenaltiesOfTheFirstRow(Ops):
    """Every row has the first one's penalties."""

    @staticmethod
    def penalise(logits: Tensor, history: Tensor, places: Tensor, penalties: Tensor) -> None:
        REFERENCE_OPS.penalise(logits, history, places, penalties[:, :1].expand_as(penalties).contiguous())


@fault("L1", _PENALISE)
class HistoryByRow(Ops):
    """A row's history is looked up by the row, not by its slot."""

    @staticmethod
    def penalise(logits: Tensor, history: Tensor, places: Tensor, penalties: Tensor) -> None:
        rows = torch.stack((places[0], torch.arange(places.shape[1]) % len(history)))
        REFERENCE_OPS.penalise(logits, history, rows, penalties)


@fault("L1", _PENALISE)
class BannedIsOnlyUnlikely(Ops):
    """A token that is not allowed gets a large negative logit instead of -inf."""

    @staticmethod
    def penalise(logits: Tensor, history: Tensor, places: Tensor, penalties: Tensor) -> None:
        REFERENCE_OPS.penalise(logits, history, places, penalties)
        logits.clamp_(min=-1e9)


@fault("L1", _LOGPROBS)
class LogprobsOfTheLikeliest(Ops):
    """The chosen token's log probability is that of the likeliest one."""

    @staticmethod
    def logprobs(logits: Tensor, token_ids: Tensor, num: int) -> Tensor:
        found = REFERENCE_OPS.logprobs(logits, token_ids, num)
        best = logits.float().log_softmax(-1).amax(-1)
        found[:, num + 1] = best.view(torch.int32)
        return found


@fault("L1", _LOGPROBS)
class RankFromZero(Ops):
    """The likeliest token has rank 0."""

    @staticmethod
    def logprobs(logits: Tensor, token_ids: Tensor, num: int) -> Tensor:
        found = REFERENCE_OPS.logprobs(logits, token_ids, num)
        found[:, -1] -= 1
        return found


@fault("L1", _LOGPROBS)
class LogprobsInSixteenBits(Ops):
    """Log probabilities are computed in bf16."""

    @staticmethod
    def logprobs(logits: Tensor, token_ids: Tensor, num: int) -> Tensor:
        return REFERENCE_OPS.logprobs(logits.float().log_softmax(-1).bfloat16(), token_ids, num)
