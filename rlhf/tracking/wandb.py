"""W&B through the real client, offline where there is no key. The only importer of wandb."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from typing import Any

import wandb

from rlhf.config import Config
from rlhf.reward_model.config import RewardModelConfig
from rlhf.run_folder import write_atomic

COLUMNS = ("step", "prompt", "answer", "reward", "parts", "advantage", "finish_reason", "version", "logprob")


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


class WandbTracker:
    """One W&B run, which a resumed run continues; after a restart, steps that are done again are there twice.

    Scalars have three x-axes: step, samples, tokens; samples go to incremental tables.
    """

    def __init__(self, config: Config | RewardModelConfig, folder: Path) -> None:
        wanted = config.tracking.wandb
        mode: str = wanted
        if wanted == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
        run_id = folder / "wandb_id.txt"
        self.run = wandb.init(
            id=run_id.read_text() if run_id.exists() else None,
            resume="allow",
            project=config.tracking.project,
            name=f"{config.run.name}-{folder.name}",
            dir=folder,
            mode=mode,  # type: ignore[arg-type]
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
        )
        write_atomic(run_id, self.run.id)
        for axis in ("step", "samples", "tokens"):
            self.run.define_metric(f"progress/{axis}")
        self.run.define_metric("*", step_metric="progress/step")
        self.tables: dict[str, wandb.Table] = {}

    def log_metrics(self, row: dict[str, Any]) -> None:
        """The step's scalars; ``step`` becomes the axis progress/step."""
        self.run.log({("progress/step" if name == "step" else name): value for name, value in row.items()})

    def log_samples(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Append rows to the table ``name``."""
        if name not in self.tables:
            self.tables[name] = wandb.Table(columns=list(COLUMNS), log_mode="INCREMENTAL")
        for row in rows:
            cells = {**row, "parts": ", ".join(f"{part} {value:g}" for part, value in row["parts"].items())}
            self.tables[name].add_data(*(cells[column] for column in COLUMNS))
        self.run.log({name: self.tables[name]})

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))
