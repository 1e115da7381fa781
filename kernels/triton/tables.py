"""Tiles that are faster on a device than the formulas', as measured there: one JSON file a device, read once.

``python -m kernels.bench.tune`` makes them. Nothing is tried at run time; a device without a file has the formulas.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

FOLDER = Path(__file__).parent / "tables"

# What a table may say otherwise than the formula, by op, and the values that are worth a try. Not among it is what
# decides in which order numbers are added up, where that must not depend on how many tokens there are.
CHOICES: dict[str, dict[str, tuple[int, ...]]] = {
    "invariant_linear": {"tokens": (16, 32, 64, 128, 256), "out": (64, 128, 256), "warps": (4, 8), "stages": (3, 4, 6)},
    "head": {"rows": (64, 128, 256), "columns": (128, 256), "warps": (4, 8), "stages": (2, 3, 4)},
    "packed_forward": {"queries": (64, 128), "keys": (32, 64, 128), "warps": (4, 8), "stages": (2, 3, 4)},
    "packed_dq": {"queries": (64, 128), "keys": (32, 64, 128), "warps": (4, 8), "stages": (2, 3)},
    "packed_dkv": {"keys": (64, 128), "queries": (32, 64, 128), "warps": (4, 8), "stages": (2, 3)},
    "paged": {"warps": (2, 4, 8), "stages": (2, 3, 4, 5)},
}

Key = tuple[str, ...]  # an op of CHOICES, and what its tile depends on
Tile = TypeVar("Tile", bound=Any)  # a NamedTuple
Choice = TypeVar("Choice", bound=Callable[..., Any])

asked: dict[Key, Any] = {}  # every tile that was asked for since the last :func:`forget`, as the formula has it
_caches: list[Any] = []


def cached(choice: Choice) -> Choice:
    """A function that chooses a tile, its results kept until :func:`forget`."""
    kept = functools.cache(choice)
    _caches.append(kept)
    return cast(Choice, kept)


def forget() -> None:
    """Choose anew: a table has changed."""
    asked.clear()
    for kept in _caches:
        kept.cache_clear()


@functools.cache
def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def path_of(name: str) -> Path:
    return FOLDER / f"{name.replace(' ', '_')}.json"


@functools.cache
def table(name: str) -> dict[Key, dict[str, int]]:
    """A device's measured tiles: what differs from the formula's.

    Raises ValueError for a file that says what CHOICES doesn't know.
    """
    file = path_of(name)
    if not file.exists():
        return {}
    found = {tuple(row["key"]): dict(row["tile"]) for row in json.loads(file.read_text())["tiles"]}
    for key, tile in found.items():
        known = CHOICES.get(key[0], {})
        wrong = {field: value for field, value in tile.items() if value not in known.get(field, ())}
        if wrong:
            raise ValueError(f"{file}: {wrong} for {' '.join(key)}; expected {known}: measure anew, or remove the file")
    return found


def chosen(device: torch.device, formula: Tile, op: str, *depends_on: object) -> Tile:
    """The tile of an op on a device: the measured one, or the formula's."""
    key = (op, *(str(word).removeprefix("torch.") for word in depends_on))
    asked[key] = formula
    measured = table(device_name(device)).get(key)
    return formula._replace(**measured) if measured else formula
