"""From the config of a reward model to a finished run folder: check what can be checked, then start what is heavy."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rlhf.checkpoint import Checkpoints
from rlhf.cluster import Cluster
from rlhf.config import dump_config
from rlhf.data import Renderer
from rlhf.plan import GIB, count_parameters
from rlhf.recipe import Recipe, load_recipe
from rlhf.restarts import with_restarts
from rlhf.resume import check_same_data, resumed_config
from rlhf.resume import fingerprint as fingerprint_data
from rlhf.reward_model.config import RewardModelConfig, load_config
from rlhf.reward_model.metrics import PairEvaluation
from rlhf.reward_model.pairs import PairData, load_pair_rows, tokenize_pairs
from rlhf.run_folder import RunFolder
from rlhf.tracking import MetricLog
from rlhf.tracking.console import Console, ConsoleHandler
from rlhf.weights import check_same_weights, fingerprint
from rollout_engine.models.config import DecoderConfig

log = logging.getLogger("rlhf")


@dataclass(frozen=True)
class Task:
    """What a run trains on, checked."""

    config: RewardModelConfig
    recipe: Recipe | None
    checkpoint: Path  # the weights to start from
    tokenizer: Any
    data: PairData
    decoder: DecoderConfig

    @property
    def plan(self) -> str:
        """What the run will do."""
        c, data = self.config, self.data
        steps, ranks = c.pairs.num_steps(len(data.train)), c.ranks["reward_model"]
        dropped = ", ".join(f"{count} {reason}" for reason, count in data.dropped.items())
        parameters = count_parameters(self.decoder)
        lines = [
            f"run         {c.run.name}, seed {c.run.seed}, {steps} steps of {c.pairs.batch_size} pairs = "
            f"{steps * c.pairs.batch_size / len(data.train):.1f} epochs",
            f"data        {data.source}: {len(data.train)} pairs, {len(data.held_out)} held out; dropped: {dropped}",
            f"model       {parameters / 1e6:.2f} M parameters with the vocabulary's head, {c.model.dtype}",
            f"roles       reward model; cluster {c.cluster.kind}, {ranks} rank{'s' * (ranks > 1)}, "
            f"{c.cluster.threads} threads each",
            f"training    DeepSpeed ZeRO {c.train.zero_stage}, AdamW, "
            f"{parameters * 12 / GIB:.3f} GiB of gradients and moments",
        ]
        if c.warm_start.steps:
            lines.append(f"warm start  {c.warm_start.steps} steps of {c.warm_start.batch_size} worked answers")
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Result:
    folder: Path
    before: PairEvaluation
    after: PairEvaluation


def prepare(config: RewardModelConfig, folder: Path) -> Task:
    """Load recipe, tokenizer and pairs, and check that all weights are there (without reading them).

    Raises ValueError with what was given, what is allowed and the way out.
    """
    from rollout_engine.models import family
    from rollout_engine.models.checkpoint import architecture, load_hf_config, load_tokenizer, open_weights, resolve

    if config.checkpoint.keep_best == "eval/reward":
        raise ValueError("checkpoint.keep_best=eval/reward: held-out pairs have no reward; set eval/accuracy, or null")
    recipe = load_recipe(config.recipe.path) if config.recipe.path else None
    train_rows, held_out_rows, source = load_pair_rows(config, recipe)
    if config.model.path is not None:
        checkpoint = resolve(config.model.path, config.model.revision).resolve()
    elif recipe is not None:
        checkpoint = folder / "initial"
        if not checkpoint.exists():  # a resumed run has it
            recipe.initial_model(checkpoint, config.run.seed)
    else:
        raise ValueError("model.path and recipe.path are both missing; one of them gives the model to start from")
    if config.warm_start.steps:
        if recipe is None:
            raise ValueError(f"warm_start.steps={config.warm_start.steps} needs a recipe with warm_start(seed)")
        _ = recipe.warm_start  # raises where the recipe has none
    hf_config = load_hf_config(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    render = Renderer(config.data, tokenizer)
    train, dropped = tokenize_pairs(train_rows, render, config.pairs)
    held_out, dropped_too = tokenize_pairs(held_out_rows, render, config.pairs)
    decoder = family(hf_config).decoder_config(hf_config)
    architecture(hf_config, scalar=True)
    longest = max(len(ids) for pair in (*train, *held_out) for ids in (pair.chosen, pair.rejected))
    if longest > decoder.max_position:
        raise ValueError(
            f"the longest prompt and answer have {longest} tokens; the model's context is {decoder.max_position}. "
            "Lower pairs.max_tokens"
        )
    names = {ours: parts for ours, parts in family(hf_config).name_map(decoder).items() if ours != "head.weight"}
    open_weights(checkpoint, names)
    _check_cluster(config)
    dropped = {reason: count + dropped_too[reason] for reason, count in dropped.items()}
    return Task(config, recipe, checkpoint, tokenizer, PairData(train, held_out, source, dropped), decoder)


def _check_cluster(config: RewardModelConfig) -> None:
    ranks, gpus = config.ranks["reward_model"], config.cluster.gpus
    if config.cluster.placement == "separate":
        raise ValueError("cluster.placement=separate: a reward model is trained alone; leave it colocated")
    if ranks > 1 and config.cluster.kind == "local":
        raise ValueError(f"cluster.ranks={ranks}: cluster.kind=local runs one rank; set cluster.kind=ray")
    if gpus and ranks != gpus:
        raise ValueError(f"cluster.ranks={ranks} do not divide over cluster.gpus={gpus}: each rank has one GPU")


def dry_run(config: RewardModelConfig) -> str:
    """The plan, and the first pair as the model sees it; starts nothing."""
    with tempfile.TemporaryDirectory() as folder:
        task = prepare(config, Path(folder))
    first = task.data.train[0]
    shown = [f"{name}  {task.tokenizer.decode(getattr(first, name))!r}" for name in ("chosen", "rejected")]
    return "\n".join([task.plan, "the first pair, as the model sees it:", *shown, f"margin {first.margin:g}"])


def launch(config: RewardModelConfig) -> Result:
    """Run a config to its end. The run folder is kept whatever happens."""
    with tempfile.TemporaryDirectory() as folder:  # bad input leaves no run folder behind
        task = prepare(config, Path(folder))
        run = RunFolder.create(config.run.dir, config.run.name)
        if task.checkpoint.is_relative_to(folder):  # made by the recipe
            task = replace(task, checkpoint=Path(shutil.move(task.checkpoint, run.path)))
    with run.locked():
        run.write("data.json", json.dumps(fingerprint_data(task.data.train, task.data.held_out), indent=1))
        run.write("weights.json", json.dumps(fingerprint({"model.path": task.checkpoint}), indent=1))
        run.write("config.yaml", dump_config(config))
        run.write_environment()
        return _run(config, task, run)


def resume(folder: Path, overrides: Sequence[str] = ()) -> Result:
    """Go on with the run in ``folder``, as :func:`rlhf.launch.resume`."""
    run = RunFolder(folder.resolve())
    config = resumed_config(load_config, run.path, overrides)
    with run.locked():
        task = prepare(config, run.path)
        check_same_data(run.path, fingerprint_data(task.data.train, task.data.held_out), "pairs")
        check_same_weights(run.path, fingerprint({"model.path": task.checkpoint}))
        done, steps = Checkpoints(run.path, config.checkpoint).last_step, config.pairs.num_steps(len(task.data.train))
        if done >= steps:
            longer = "epochs" if config.pairs.epochs else "steps"
            raise ValueError(
                f"{folder} has finished: {done} of {steps} steps are done. To train on, give it more: "
                f"rlhf reward-model --resume {folder} pairs.{longer}={2 * getattr(config.pairs, longer)}"
            )
        run.write("config.yaml", dump_config(config))
        return _run(config, task, run)


def _run(config: RewardModelConfig, task: Task, run: RunFolder) -> Result:
    """Train in a run folder that has its config, and say how it went."""
    console = Console(run.path / "train.log")
    handler = ConsoleHandler(console)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    run.write("plan.txt", task.plan)
    console.line(task.plan)
    console.line(f"run folder  {run.path}")
    tracker: MetricLog | None = None
    finished = False
    try:
        tracker = MetricLog(config, config.pairs.num_steps(len(task.data.train)), run, console)
        train = partial(_train, config, task, run, tracker, console)
        before, after = with_restarts(config, {"model.path": task.checkpoint}, run, console, train)
        console.line(str(after))
        found = "  ".join(f"{name} {value:.3f}" for name, value in after.metrics.items())
        console.line(f"held out: {found}; checkpoint in {run.path / 'checkpoints' / 'latest' / 'hf'}")
        run.link_as_latest()
        finished = True
    except BaseException:
        console.line(f"ended early; to go on: rlhf reward-model --resume {run.path}")
        raise
    finally:
        log.removeHandler(handler)
        console.close()
        if tracker:  # last: without a network it may take its time, or fail
            tracker.close(failed=not finished)
    return Result(run.path, before, after)


def _train(
    config: RewardModelConfig, task: Task, run: RunFolder, tracker: MetricLog, console: Console, cluster: Cluster
) -> tuple[PairEvaluation, PairEvaluation]:
    """Warm start and training, from the last checkpoint where there is one."""
    from rlhf.reward_model.train import train_reward_model
    from rlhf.warm_start import warm_start

    checkpoint = task.checkpoint
    if config.warm_start.steps:
        assert task.recipe is not None
        checkpoint = warm_start(config, task.recipe, task.tokenizer, checkpoint, cluster, run, console)
    return train_reward_model(config, cluster, tracker, run, checkpoint, task.data)
