"""Every op of the bench at real sizes, in bf16, on a GPU: no worse against float64 than the best library."""

from __future__ import annotations

import pytest
import torch

from kernels.bench.__main__ import FAMILIES, chosen
from kernels.bench.measure import REFUSALS, error

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("op", FAMILIES)
def test_errors_are_at_most_twice_those_of_the_libraries(op: str) -> None:
    for case in chosen([op], torch.device("cuda", 0), torch.bfloat16):
        inputs = case.make(0)
        theirs = []
        for peer in case.peers.values():
            try:
                theirs.append(error(case, peer, inputs))
            except REFUSALS:
                continue
        ours = error(case, case.ours, inputs)
        # Half a rounding step beside theirs, which may happen to be exact; alone, a few steps of the output's dtype.
        allowed = 2 * min(theirs) + torch.finfo(torch.bfloat16).eps / 2 if theirs else 0.02
        assert ours <= allowed, f"{case.op}, {case.label}: {ours:.1e}, libraries {theirs}"
