"""The decoder, its families and its checkpoints. A family's module is named for its HF ``model_type``."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any

_NOT_FAMILIES = {"checkpoint", "config", "context", "decoder", "rope"}


def families() -> list[str]:
    """Names of the supported families."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _NOT_FAMILIES)


def family(hf_config: Any) -> ModuleType:
    """The module (``decoder_config``, ``name_map``) for a transformers config.

    Raises ValueError naming the supported families.
    """
    name = hf_config.model_type
    if name not in families():
        raise ValueError(
            f"model_type {name!r} is not supported; choose a checkpoint of one of {families()}, "
            f"or add rollout_engine/models/{name}.py"
        )
    return importlib.import_module(f"rollout_engine.models.{name}")
