"""What a resumed run must have in common with the run that it continues: its config and its data (its weights, see
``rlhf.weights``)."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rlhf.config import Section, spell
from rlhf.reward_model.pairs import Pair
from rlhf.types import Prompt

# What may be overridden: how long, how it is watched, kept and placed, how a reward that fails is treated, and where
# weights lie (that they are the same is checked). Whole sections, or keys. The number of threads decides how floats are
# summed, so that another one changes the last bits; a learning rate that decays does so until the new end.
FREE = (
    "run.steps", "pairs.steps", "pairs.epochs", "eval.every", "checkpoint", "tracking", "rollout.kv_cache_gib",
    "cluster.kind", "cluster.placement", "cluster.threads", "cluster.timeout_s", "cluster.start_timeout_s",
    "reward.timeout_s", "reward.on_error", "reward.penalty", "reward.concurrency", "reward.models",
    "reward_model.revision", "model.path", "model.revision", "critic.path", "critic.revision", "reference.path",
    "reference.revision",
)  # fmt: skip
Found = TypeVar("Found", bound=Section)


def resumed_config(load: Callable[[Path, Sequence[str]], Found], folder: Path, overrides: Sequence[str]) -> Found:
    """The config of the run in ``folder`` with ``section.key=value`` overrides. ``load``: its kind's ``load_config``.

    Raises ValueError where there is no run, and for an override of what makes the run what it is.
    """
    file = folder / "config.yaml"
    for name in ("config.yaml", "data.json", "weights.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{str(folder)!r} is no folder of a run, it has no {name}; give one like runs/NAME/0001")
    config = load(file, overrides)
    old, new = load(file, ()).model_dump(mode="json"), config.model_dump(mode="json")
    known = {*new, *(f"{section}.{key}" for section, values in new.items() for key in values)}
    free = [name for name in FREE if name in known]
    for section, values in new.items():
        for key, value in values.items():
            if value != old[section][key] and not {section, f"{section}.{key}"} & set(free):
                raise ValueError(
                    f"{section}.{key}={spell(value)} would make another run of {folder}, which has "
                    f"{spell(old[section][key])}. On resume these can change: {', '.join(free)}. Start a new run for "
                    "anything else"
                )
    return config


def fingerprint(training: Sequence[Prompt | Pair], held_out: Sequence[Prompt | Pair]) -> dict[str, Any]:
    """What tells data sets apart, by split: number of rows, hashes of their token ids and of their columns."""
    splits = {"training": training, "held-out": held_out}
    return {
        name: {
            "count": len(split),
            "token_ids": _hash([_parts(row)[0] for row in split]),
            "columns": _hash([_parts(row)[1] for row in split]),
        }
        for name, split in splits.items()
    }


def _parts(row: Prompt | Pair) -> tuple[Any, Any]:
    """Token ids, and columns."""
    if isinstance(row, Pair):
        return (row.chosen, row.rejected), (row.margin, row.kind)
    return row.token_ids, row.columns


def _hash(rows: Sequence[Any]) -> str:
    text = json.dumps(rows, sort_keys=True, default=lambda value: pickle.dumps(value).hex())
    return hashlib.sha256(text.encode()).hexdigest()


def check_same_data(run_folder: Path, now: dict[str, Any], what: str = "prompts") -> None:
    """Raises ValueError naming what of the data is no longer as it was when the run began. ``what``: its rows are."""
    then = json.loads((run_folder / "data.json").read_text())
    changed = []
    for split, found in now.items():
        expected = then[split]
        if found["count"] != expected["count"]:
            changed.append(f"{expected['count']} {split} {what} became {found['count']}")
        elif found["token_ids"] != expected["token_ids"]:
            changed.append(f"the {split} {what} differ (or their tokenizer, or chat template)")
        elif found["columns"] != expected["columns"]:
            changed.append(f"columns of the {split} rows differ")
    if changed:
        raise ValueError(
            f"the data is no longer what {run_folder} was trained on: {'; '.join(changed)}. Bring the old data back, "
            f"or start a new run from the weights: model.path={run_folder / 'checkpoints' / 'latest' / 'hf'}"
        )
