"""From a config to a finished run folder: check everything that can be checked, then start what is heavy."""

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
from rlhf.config import Config, dump_config, load_config
from rlhf.data import Renderer, load_rows, tokenize
from rlhf.evaluate import Evaluation
from rlhf.judging import Judges, check_judges
from rlhf.plan import Plan, check
from rlhf.recipe import Recipe, load_recipe
from rlhf.restarts import with_restarts
from rlhf.resume import check_same_data, fingerprint, resumed_config
from rlhf.roles.reward import RewardFunction
from rlhf.run_folder import RunFolder
from rlhf.tracking import Tracker
from rlhf.tracking.console import Console, ConsoleHandler
from rlhf.types import Completion, Prompt
from rlhf.weights import Weights, by_key, check_same_weights, check_weights, resolve_weights
from rlhf.weights import fingerprint as fingerprint_weights

log = logging.getLogger("rlhf")  # the package's, not this module's


@dataclass(frozen=True)
class Task:
    """What a run trains on, checked."""

    recipe: Recipe
    weights: Weights  # to start from
    tokenizer: Any
    prompts: list[Prompt]
    eval_prompts: list[Prompt]
    plan: Plan

    @property
    def checkpoint(self) -> Path:
        """What the policy starts from."""
        return self.weights["policy"]


@dataclass(frozen=True)
class Result:
    folder: Path
    before: Evaluation
    after: Evaluation
    learnt: bool  # False: every update of the policy was skipped


def prepare(config: Config, folder: Path) -> Task:
    """Load recipe, tokenizer and prompts, check the arithmetic, and that all weights are there (without reading them).

    ``folder`` is where a recipe's model is made.

    Raises ValueError with what was given, what is allowed and the way out.
    """
    from rollout_engine.models import family
    from rollout_engine.models.checkpoint import load_hf_config, load_tokenizer, open_weights, resolve

    recipe = load_recipe(config.recipe.path, needs_reward=config.reward.needs_function)
    rows = load_rows(config.data, recipe, config.eval.prompts)
    if config.model.path is None:
        checkpoint = folder / "initial"
        if not checkpoint.exists():  # a resumed run has it
            recipe.initial_model(checkpoint, config.run.seed)
    else:
        checkpoint = resolve(config.model.path, config.model.revision)
    if config.warm_start.steps:
        _ = recipe.warm_start  # raises where the recipe has none
    hf_config = load_hf_config(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    render = Renderer(config.data, tokenizer)
    prompts, dropped = tokenize(rows.train, render)
    eval_prompts = tokenize(rows.eval, render)[0][: config.eval.prompts]
    longest = max(len(prompt.token_ids) for prompt in (*prompts, *eval_prompts))
    decoder = check(config, hf_config, tokenizer, longest)
    open_weights(checkpoint, family(hf_config).name_map(decoder))
    weights = resolve_weights(config, checkpoint)
    check_weights(config, weights, tokenizer, longest + config.rollout.max_tokens)
    judges = check_judges(config, weights, recipe, prompts[0])
    plan = Plan(config, decoder, judges, rows.source, len(prompts), dropped, len(eval_prompts))
    return Task(recipe, weights, tokenizer, prompts, eval_prompts, plan)


def dry_run(config: Config) -> str:
    """The plan, a prompt as the model sees it, and what function and servers say to an empty answer to four of them;
    starts nothing.

    Raises ValueError for a reward that fails, whatever ``reward.on_error`` says.
    """
    with tempfile.TemporaryDirectory() as folder:
        task = prepare(config, Path(folder))
    lines = [str(task.plan), "the first prompt, as the model sees it:", task.prompts[0].text, ""]
    if config.reward.models:
        lines.append(f"not started, and so missing from rewards here: reward models {', '.join(config.reward.models)}")
    section = config.reward.model_copy(update={"on_error": "fail"})
    reward = Judges(section, RewardFunction(recipe=config.recipe.path, section=section), {}, config.run.seed)
    tried = task.prompts[:4] if reward.names else []
    for t in reward.score(tried, [[Completion(prompt.text, "", (), "stop")] for prompt in tried]):
        parts = f" {t.score.parts}" if t.score and t.score.parts else ""
        value = t.score.value if t.score else None
        lines.append(f"reward of an empty answer to {t.prompt.question!r:.200}: {value}{parts}")
    return "\n".join(lines)


def launch(config: Config) -> Result:
    """Run a config to its end. The run folder is kept whatever happens."""
    with tempfile.TemporaryDirectory() as folder:  # bad input leaves no run folder behind
        task = prepare(config, Path(folder))
        run = RunFolder.create(config.run.dir, config.run.name)
        if task.checkpoint.is_relative_to(Path(folder).resolve()):  # made by the recipe
            made = Path(shutil.move(task.checkpoint, run.path))
            task = replace(task, weights={**task.weights, "policy": made})
    with run.locked():
        run.write("data.json", json.dumps(fingerprint(task.prompts, task.eval_prompts), indent=1))
        run.write("weights.json", json.dumps(fingerprint_weights(by_key(config, task.weights)), indent=1))
        run.write("config.yaml", dump_config(config))
        run.write_environment()
        return _run(config, task, run)


def resume(folder: Path, overrides: Sequence[str] = ()) -> Result:
    """Go on with the run in ``folder`` from its newest whole checkpoint, or else from its start.

    Raises ValueError for overrides, data and weights that would make it another run, and where nothing is left to do.
    """
    run = RunFolder(folder.resolve())
    config = resumed_config(load_config, run.path, overrides)
    with run.locked():
        done = Checkpoints(run.path, config.checkpoint).last_step
        if done >= config.run.steps:
            raise ValueError(
                f"{folder} has finished: {done} steps are done, and run.steps={config.run.steps}. To train on, give it "
                f"more: rlhf train --resume {folder} run.steps={2 * done}"
            )
        task = prepare(config, run.path)
        check_same_data(run.path, fingerprint(task.prompts, task.eval_prompts))
        check_same_weights(run.path, fingerprint_weights(by_key(config, task.weights)))
        run.write("config.yaml", dump_config(config))
        return _run(config, task, run)


def _run(config: Config, task: Task, run: RunFolder) -> Result:
    """Train in a run folder that has its config, and say how it went."""
    from rlhf.report import before_and_after, draw_curve

    console = Console(run.path / "train.log")
    handler = ConsoleHandler(console)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    run.write("plan.txt", str(task.plan))
    console.line(str(task.plan))
    console.line(f"run folder  {run.path}")
    tracker: Tracker | None = None
    learnt = False
    try:
        tracker = Tracker(config, run, console)
        folders, train = by_key(config, task.weights), partial(_train, config, task, run, tracker, console)
        before, after = with_restarts(config, folders, run, console, train)
        draw_curve(tracker.history, before, run.path / "curve.png")
        console.line(before_and_after(before, after))
        gain = {axis: [f"{e.metrics[f'eval/{axis}']:.3f}" for e in (before, after)] for axis in ("accuracy", "reward")}
        if gain["accuracy"] == gain["reward"]:
            del gain["reward"]
        gains = ", ".join(f"{axis} {' -> '.join(ends)}" for axis, ends in gain.items())
        console.line(f"held-out {gains}; curve, samples and checkpoint in {run.path}")
        run.link_as_latest()
        last = tracker.history[-1]
        learnt = last["policy/version"] > 0 or not last.get("policy/skipped_updates")
        if not learnt:
            console.line(
                f"NOTHING WAS LEARNT: all {last['policy/skipped_updates']:.0f} updates of the policy were skipped: "
                f"their gradients are not finite. Their batches are {run.path}/skipped-policy-*.pt"
            )
    except BaseException:
        console.line(f"ended early; to go on: rlhf train --resume {run.path}")
        raise
    finally:
        log.removeHandler(handler)
        console.close()
        if tracker:  # last: without a network it may take its time, or fail
            tracker.close(failed=not learnt)
    return Result(run.path, before, after, learnt)


def _train(
    config: Config, task: Task, run: RunFolder, tracker: Tracker, console: Console, cluster: Cluster
) -> tuple[Evaluation, Evaluation]:
    """Warm start and training, from the last checkpoint where there is one."""
    from rlhf.train import train
    from rlhf.warm_start import warm_start

    checkpoint = task.checkpoint
    if config.warm_start.steps:
        checkpoint = warm_start(config, task.recipe, task.tokenizer, checkpoint, cluster, run, console)
    weights = {**task.weights, "policy": checkpoint}
    return train(config, config.make_algorithm(), cluster, tracker, run, weights, task.prompts, task.eval_prompts)
