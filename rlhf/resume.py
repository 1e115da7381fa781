"""What a resumed run must have in common with the run that it continues: its config and its data (its weights, see
``rlhf.weights``)."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.config import Config, load_config, spell
from rlhf.types import Prompt

# What may be overridden: how long, how it is watched, kept and placed, how a reward that fails is treated, and where
# weights lie (that they are the same is checked). Whole sections, or keys. The number of threads decides how floats are
# summed, so that another one changes the last bits; a learning rate that decays does so until the new end.
FREE = (
    "run.steps", "eval.every", "checkpoint", "tracking", "rollout.kv_cache_gib", "cluster.kind", "cluster.placement",
    "cluster.threads", "cluster.timeout_s", "cluster.start_timeout_s", "reward.timeout_s", "reward.on_error",
    "reward.penalty", "reward.concurrency", "reward.models", "reward_model.revision", "model.path", "model.revision",
    "critic.path", "critic.revision", "reference.path", "reference.revision",
)  # fmt: skip


def resumed_config(folder: Path, overrides: Sequence[str]) -> Config:
    """The config of the run in ``folder`` with ``section.key=value`` overrides.

    Raises ValueError where there is no run, and for an override of what makes the run what it is.
    """
    file = folder / "config.yaml"
    for name in ("config.yaml", "data.json", "weights.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{str(folder)!r} is no folder of a run, it has no {name}; give one like runs/NAME/0001")
    config = load_config(file, overrides)
    old, new = load_config(file).model_dump(mode="json"), config.model_dump(mode="json")
    for section, values in new.items():
        for key, value in values.items():
            if value != old[section][key] and not {section, f"{section}.{key}"} & set(FREE):
                raise ValueError(
                    f"{section}.{key}={spell(value)} would make another run of {folder}, which has "
                    f"{spell(old[section][key])}. On resume these can change: {', '.join(FREE)}. Start a new run for "
                    "anything else"
                )
    return config


def fingerprint(prompts: Sequence[Prompt], eval_prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What tells data sets apart, by split: number of prompts, hashes of their token ids and of their columns."""
    splits = {"training": prompts, "held-out": eval_prompts}
    return {
        name: {
            "count": len(split),
            "token_ids": _hash([prompt.token_ids for prompt in split]),
            "columns": _hash([prompt.columns for prompt in split]),
        }
        for name, split in splits.items()
    }


def _hash(rows: Sequence[Any]) -> str:
    text = json.dumps(rows, sort_keys=True, default=lambda value: pickle.dumps(value).hex())
    return hashlib.sha256(text.encode()).hexdigest()


def check_same_data(run_folder: Path, now: dict[str, Any]) -> None:
    """Raises ValueError naming what of the data is no longer as it was when the run began."""
    then = json.loads((run_folder / "data.json").read_text())
    changed = []
    for split, found in now.items():
        expected = then[split]
        if found["count"] != expected["count"]:
            changed.append(f"{expected['count']} {split} prompts became {found['count']}")
        elif found["token_ids"] != expected["token_ids"]:
            changed.append(f"the {split} prompts differ (or their tokenizer, or chat template)")
        elif found["columns"] != expected["columns"]:
            changed.append(f"columns of the {split} rows differ")
    if changed:
        raise ValueError(
            f"the data is no longer what {run_folder} was trained on: {'; '.join(changed)}. Bring the old data back, "
            f"or start a new run from the weights: model.path={run_folder / 'checkpoints' / 'latest' / 'hf'}"
        )
