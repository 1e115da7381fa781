"""Which bundle of devices each rank of each model role sits in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

Seats = dict[str, range]  # by role: the bundles of its ranks


def seats(placement: Literal["colocated", "separate"], ranks: Mapping[str, int]) -> Seats:
    """Bundles of the roles, whose numbers of ranks are ``ranks``; they are counted from 0, without gaps.

    ``colocated``: rank r of every role sits in bundle r. ``separate``: every rank has a bundle of its own. The warm
    start's policy ends before the policy starts, and leaves it its seats.
    """
    taken, first = {}, 0
    for role, count in ranks.items():
        taken[role] = range(first, first + count)
        first += count * (placement == "separate")
    return {**taken, "warm_start": taken["policy"]} if "policy" in taken else taken


def share(placement: Literal["colocated", "separate"], taken: Seats) -> float:
    """What a rank asks for of the device in its bundle: all of it, or as much as lets all roles sit on one, the warm
    start's policy with them. Rounded down to the ten-thousandths that Ray counts in."""
    return 1.0 if placement == "separate" else math.floor(1e4 / max(1, len(taken))) / 1e4


def num_bundles(taken: Seats) -> int:
    return max((bundles.stop for bundles in taken.values()), default=1)
