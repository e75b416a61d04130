"""Draws of which the conformance suite has few: each way through the kernel, many ties, long lists, many programs."""

import pytest
import torch
from torch import Tensor

from engine_sdk import REFERENCE_OPS, DrawInputs
from engine_sdk.triton import sampling
from engine_sdk.triton.sampling import draw

ONE, LAST, LEVELS = DrawInputs.ONE, DrawInputs.LAST, DrawInputs.LEVELS


def inputs(rows: list[tuple[int, int, int]], vocab: int, scale: float, seed: int) -> DrawInputs:
    """Rows of (top_k, top_p, cut), 0 for none of the first."""
    top_k, top_p, cut = torch.tensor(rows).T
    top_k = torch.where(top_k == 0, vocab, top_k.clamp(max=vocab))
    u = torch.randint(ONE, (len(rows),), generator=torch.Generator().manual_seed(seed))
    limit = int(torch.where((top_k > 1) & (top_k < vocab), top_k, 0).max())
    scales = torch.full((len(rows),), scale)
    return DrawInputs(top_k, top_p, cut, u, scales, limit, bool((top_p < ONE).any()), bool((cut < LAST).any()))


ROWS = [(0, ONE, LAST), (0, ONE, 3 * LEVELS), (0, ONE // 2, LAST), (40, ONE, LAST), (40, ONE // 2, 5 * LEVELS)]
ROWS += [(1, ONE, LAST), (2, 1, LAST), (2000, ONE - 1, 0), (4000, ONE * 3 // 4, LAST)]


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, LEVELS * 1.5), (torch.bfloat16, 1.0)])
@pytest.mark.parametrize("kind", ["distinct", "few values", "one value", "masked", "rising"])
def test_every_way(kind: str, scale: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal logits overflow a list, and some lists are longer than a tile."""
    monkeypatch.setattr(sampling, "_LISTED", 2500)
    vocab = 5_003
    logits = torch.randn(len(ROWS), vocab, generator=torch.Generator().manual_seed(1)) * 3
    match kind:
        case "few values":
            logits = logits.round()
        case "one value":
            logits = torch.full_like(logits, -2.5)
        case "masked":
            logits[:, ::7], logits[:, 3000:] = -torch.inf, -torch.inf
        case "rising":
            logits = logits.sort(-1).values
    logits = logits.to(dtype)
    made = inputs(ROWS, vocab, scale, seed=2)
    assert draw(logits, made).tolist() == REFERENCE_OPS.draw(logits, made).tolist()
    assert draw(logits, None).tolist() == REFERENCE_OPS.draw(logits, None).tolist()


@pytest.mark.parametrize("programs", [1, 3, 1000])
def test_programs_of_a_row(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as a device has cores for, and counters that are zero again."""
    monkeypatch.setattr(sampling, "_PROGRAMS_PER_CORE", programs)
    monkeypatch.setattr(sampling, "_LEAST", 128)
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0))
    made = inputs(ROWS[:1] * 3, 5000, LEVELS * 1.0, seed=0)
    for _ in range(2):
        assert draw(logits, made).tolist() == REFERENCE_OPS.draw(logits, made).tolist()


def test_strided_rows() -> None:
    """Rows of a wider buffer, as a head that is padded leaves them."""
    wide = torch.randn(4, 700, generator=torch.Generator().manual_seed(0))
    made = inputs(ROWS[:4], 600, LEVELS * 1.0, seed=3)
    narrow: Tensor = wide[:, :600]
    assert draw(narrow, made).tolist() == REFERENCE_OPS.draw(narrow.contiguous(), made).tolist()
