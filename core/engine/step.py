"""One step as data: what the scheduler asks of the runner, and what comes back. Fit for a socket; no torch here.

A running sequence owns a row from admission to its end or preemption. The runner keeps token ids, block tables and
sampling state per row, so a step only carries what changed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.request import CoreRequest, TokenLogprobs


@dataclass
class NewRow:
    """A sequence enters a row, for the first time or after a preemption."""

    row: int  # the row it owns from now on
    request: CoreRequest  # with its parameters
    token_ids: list[int]  # prompt and output so far
    num_computed: int  # tokens whose keys and values are in the cache already (a prefix hit)
    block_ids: list[list[int]]  # per KV group, the blocks that it owns, freed ones as 0


@dataclass
class Work:
    """Tokens ``[start, start + num_tokens)`` of one row."""

    row: int  # which row
    start: int  # position of the first token
    num_tokens: int  # how many; 1 in decode
    # per KV group, blocks appended to the row's table before this step (not those of `NewRow`)
    new_blocks: list[list[int]]
    sample: bool  # the last token's logits choose the next token; false inside a prompt
    # prompt positions of this work whose logits are wanted for prompt logprobs: the first `num_prompt_logits` tokens
    num_prompt_logits: int = 0


@dataclass
class Step:
    """One step."""

    new_rows: list[NewRow] = field(default_factory=list)  # sequences that enter, applied after `freed_rows`
    freed_rows: list[int] = field(default_factory=list)  # rows given up since the last step
    work: list[Work] = field(default_factory=list)  # what to compute; at most one entry a row

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return sum(w.num_tokens for w in self.work)


@dataclass
class StepResult:
    """What a step gave, aligned with `Step.work`."""

    token_ids: list[int | None]  # the sampled token, or None where the work did not sample
    logprobs: list[TokenLogprobs | None]  # of the sampled token, where asked for
    prompt_logprobs: list[list[TokenLogprobs] | None]  # entries for the work's wanted prompt positions
    failed: list[str] = field(default_factory=list)  # ids of requests that cannot go on
    pooled: list[bytes | None] = field(default_factory=list)  # what ended the work's sequence, of a runner that pools
