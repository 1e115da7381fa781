"""Rows in, answers out, with no more rows in memory than keep the engine busy."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rollout_engine.types import RequestOutput, SamplingParams

if TYPE_CHECKING:
    from rollout_engine.admission import Prompt
    from rollout_engine.llm import LLM

WINDOW = 4  # ordered streams: answers pulled ahead of the oldest row that isn't out, in units of max_num_seqs


def stream(
    llm: LLM,
    rows: Iterator[Any],
    params: SamplingParams,
    prompt: Callable[[Any], Prompt],
    sample_ids: Callable[[Any], Sequence[int]] | None,
    ordered: bool,
) -> Iterator[RequestOutput]:
    """See :meth:`LLM.stream`."""
    window = max(1, WINDOW * llm.config.max_num_seqs // params.n)
    position_of: dict[int, int] = {}  # request id -> row, of those in flight
    held: dict[int, RequestOutput] = {}  # by row; finished, but an earlier row isn't
    pulled = given = 0  # rows
    more = True
    free = _free_slots(llm)
    try:
        while more or position_of:
            finished: list[tuple[int, RequestOutput]] = []
            if more and free >= params.n and (not ordered or pulled - given < window):
                try:
                    row = next(rows)
                except StopIteration:
                    more = False
                    continue
                try:
                    ids = sample_ids(row) if sample_ids else None
                    position_of[llm.add_request(prompt(row), params, sample_ids=ids)] = pulled
                    free -= params.n
                except ValueError as error:
                    finished.append((pulled, RequestOutput(-1, None, (), (), 0, error=str(error))))
                pulled += 1
            else:
                finished += [(position_of.pop(out.request_id), out) for out in llm.step_for(position_of)]
                if position_of and not finished and not llm.scheduler.has_work:
                    raise RuntimeError(
                        f"{len(position_of)} requests of this stream are gone: another caller's step() took their "
                        "answers, or its forward failed"
                    )
                free = _free_slots(llm)
            for position, out in finished:
                held[position] = replace(out, position=position)
            turns = itertools.takewhile(held.__contains__, itertools.count(given)) if ordered else list(held)
            for position in turns:
                given += 1
                yield held.pop(position)
    finally:
        for request in position_of:
            with suppress(ValueError):  # a failed forward has dropped it
                llm.abort(request)


def _free_slots(llm: LLM) -> int:
    return llm.config.max_num_seqs - sum(seq.num_samples for seq in llm.scheduler.sequences())
