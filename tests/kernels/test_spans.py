"""Where packed sequences begin, and what a plan knows of it."""

from __future__ import annotations

import torch

from kernels import plan_tiles
from kernels.reference import Spans


def test_bounds_lengths_and_totals() -> None:
    spans = Spans.of([3, 0, 5], "cpu")
    assert spans.bounds.dtype == torch.int32 and spans.bounds.tolist() == [0, 3, 3, 8]
    assert spans.lengths.dtype == torch.int64 and spans.lengths.tolist() == [3, 0, 5]
    assert (spans.longest, spans.total) == (5, 8)
    assert spans.bounds is spans.bounds  # copied to the device once


def test_no_sequences() -> None:
    spans = Spans.of([], "cpu")
    assert (spans.bounds.tolist(), spans.longest, spans.total) == ([0], 0, 0)


def test_a_plan_knows_its_queries_and_contexts() -> None:
    plan = plan_tiles([2, 1, 0], [40, 1, 7], [[0, 1], [2], [3]])
    assert plan.query_spans.bounds.tolist() == [0, 2, 3, 3]
    assert plan.context_spans.bounds.tolist() == [0, 40, 41, 48]
    assert (plan.query_spans.longest, plan.context_spans.longest) == (2, 40)
    assert plan.query_spans is plan.query_spans


def test_tiles_cover_every_row_once_heaviest_first() -> None:
    spans = Spans.of([3, 0, 5], "cpu")
    last, first = spans.tiles(2, "last"), spans.tiles(2, "first")
    assert last.dtype == torch.int32
    assert last.tolist() == [[2, 4], [0, 2], [2, 2], [0, 0], [2, 0]]  # sequence, first row: by how many come before
    assert first.tolist() == [[2, 0], [0, 0], [2, 2], [0, 2], [2, 4]]  # by how many are left
    assert spans.tiles(2, "last") is last  # copied to the device once
    assert spans.tiles(4, "first").tolist() == [[2, 0], [0, 0], [2, 4]]
    assert Spans.of([], "cpu").tiles(4, "first").shape == (0, 2)
