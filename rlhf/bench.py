"""``python -m rlhf.bench step``: one GRPO step by phase, beside the same work done plainly with transformers and torch.

Ours is the loop of ``rlhf/train.py`` on roles in this process. The peer starts from the same checkpoint: padded
``generate``, the same reward and advantages, a padded forward with all logits, the policy-gradient loss, clipping,
``torch.optim.AdamW``. The two take turns on the same prompts; medians are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads OpenMP: see rlhf.__main__

import torch
import transformers
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from kernels.device import default_device
from rlhf.algorithms import Algorithm
from rlhf.cluster.local import LocalCluster
from rlhf.config import Config, load_config
from rlhf.data import PromptStream
from rlhf.judging import Judges, spawn_judges
from rlhf.launch import Task, prepare
from rlhf.packing import pack
from rlhf.roles.policy import Policy
from rlhf.types import Completion, Prompt
from rollout_engine import SamplingParams
from rollout_engine.models.checkpoint import architecture

WARM_UP = 2  # steps that aren't counted


class Clock:
    """Seconds by phase, of the device's work too; :meth:`time` nests, and an inner phase is taken off the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner: list[float] = [0.0]
        self._open: list[tuple[str, float]] = []

    @staticmethod
    def now() -> float:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()

    def start(self, phase: str) -> None:
        self._open.append((phase, self.now()))
        self._inner.append(0.0)

    def stop(self) -> None:
        phase, started = self._open.pop()
        spent = self.now() - started
        self.seconds[phase] = self.seconds.get(phase, 0.0) + spent - self._inner.pop()
        self._inner[-1] += spent

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        self.start(phase)
        try:
            yield
        finally:
            self.stop()

    def take(self) -> dict[str, float]:
        seconds, self.seconds = self.seconds, {}
        return seconds


class Ours:
    """The roles and one turn of the loop."""

    def __init__(self, config: Config, task: Task, cluster: LocalCluster, folder: Path, clock: Clock) -> None:
        self.rollout, self.clock = config.rollout, clock
        self.algorithm: Algorithm = config.make_algorithm()
        self.policy = cluster.spawn(
            "policy",
            Policy,
            checkpoint=task.checkpoint,
            run_folder=folder,
            model=config.model,
            rollout=config.rollout,
            train=config.train,
            algorithm=self.algorithm,
            total_updates=config.run.steps,
            seed=config.run.seed,
            timeout_s=config.cluster.timeout_s,
        )
        decoder = self.policy.model.decoder
        decoder.register_forward_pre_hook(lambda *_: clock.start("forward"))
        decoder.register_forward_hook(lambda *_: clock.stop())
        self.num_samples = 0

    def step(self, prompts: Sequence[Prompt], sampling: SamplingParams, reward: Judges) -> int:
        """Tokens of the batch."""
        clock = self.clock
        with clock.time("generate"):
            for finished in self.policy.generate(prompts, sampling, first_sample_id=self.num_samples):
                reward.submit([(group, prompts[group], answers) for group, answers in finished])
            self.num_samples += len(prompts) * sampling.n
        with clock.time("reward"):
            trajectories = reward.collect()
        with clock.time("pack"):
            batch = self.algorithm.advantages(pack(trajectories, mask_truncated=self.algorithm.mask_truncated))
            minibatches = list(self.algorithm.minibatches(batch, self.rollout.max_tokens))
        with clock.time("backward"):  # and what else an update does outside forward and optimizer
            for minibatch in minibatches:
                self.policy.update(minibatch)
        with clock.time("swap"):
            self.policy.publish()
        return batch.num_tokens


class Peer:
    """The same step in transformers and torch, as one would write it in an afternoon."""

    def __init__(self, config: Config, task: Task, clock: Clock) -> None:
        self.clock, self.train, self.tokenizer = clock, config.train, task.tokenizer
        hf_config = transformers.AutoConfig.from_pretrained(task.checkpoint)
        model_class = getattr(transformers, architecture(hf_config))
        self.model = model_class.from_pretrained(task.checkpoint, dtype=config.model.dtype).to(default_device())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.train.lr, betas=config.train.betas)

    def step(self, prompts: Sequence[Prompt], sampling: SamplingParams, reward: Judges) -> int:
        """Tokens of the batch, without padding."""
        clock = self.clock
        with clock.time("generate"):
            ids, mask, answers = self._generate(prompts, sampling)
        with clock.time("reward"):
            trajectories = reward.score(prompts, answers)
        with clock.time("pack"):
            values = torch.tensor([t.score.value for t in trajectories if t.score is not None])
            grouped = values.view(len(prompts), -1)
            std, mean = torch.std_mean(grouped, 1, keepdim=True)
            advantages = ((grouped - mean) / (std + 1e-6)).flatten().to(ids.device)
        with clock.time("forward"):
            trained = mask.clone()
            trained[:, : ids.shape[1] - sampling.max_tokens] = 0
            logits = self.model(input_ids=ids, attention_mask=mask).logits[:, :-1] / sampling.temperature
            logprobs = torch.log_softmax(logits, -1).gather(2, ids[:, 1:, None])[..., 0]
            weight = trained[:, 1:] / trained[:, 1:].sum()
            loss = -(weight * advantages[:, None] * torch.exp(logprobs - logprobs.detach())).sum()
        with clock.time("backward"):
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.train.max_grad_norm)
        self.optimizer.step()  # its hooks keep the time
        self.optimizer.zero_grad()
        return int(mask.sum())

    @torch.no_grad()
    def _generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams
    ) -> tuple[Tensor, Tensor, list[list[Completion]]]:
        """Token ids and mask [prompts * n, width], left-padded; and the answers."""
        width = max(len(p.token_ids) for p in prompts)
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        gaps = [width - len(p.token_ids) for p in prompts]
        ids, mask = torch.tensor(
            [
                [[pad] * gap + list(p.token_ids) for p, gap in zip(prompts, gaps, strict=True)],
                [[0] * gap + [1] * len(p.token_ids) for p, gap in zip(prompts, gaps, strict=True)],
            ],
            device=self.model.device,
        )
        generation = transformers.GenerationConfig(
            do_sample=True,
            temperature=sampling.temperature,
            top_k=0,
            max_new_tokens=sampling.max_tokens,
            num_return_sequences=sampling.n,
            pad_token_id=pad,
            eos_token_id=eos,
        )
        out = self.model.generate(ids, attention_mask=mask, generation_config=generation)
        out = torch.nn.functional.pad(out, (0, width + sampling.max_tokens - out.shape[1]), value=pad)
        new = out[:, width:]
        ended = ((new == eos).cumsum(1) - (new == eos).int()) > 0  # after the first eos
        mask = torch.cat((mask.repeat_interleave(sampling.n, 0), (~ended).long()), 1)
        completions = []
        for row, length in zip(new.tolist(), (~ended).sum(1).tolist(), strict=True):
            reason = "stop" if row[length - 1] == eos else "length"
            text = self.tokenizer.decode(row[:length], skip_special_tokens=True)
            completions.append(Completion("", text, tuple(row[:length]), reason, (0.0,) * length))
        return out, mask, [completions[i : i + sampling.n] for i in range(0, len(completions), sampling.n)]


def bench_step(config: Config, steps: int) -> dict[str, Any]:
    """Median seconds by phase of our step and the peer's, and their ratio."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    clock = Clock()
    r = config.rollout
    sampling = SamplingParams(n=r.samples_per_prompt, temperature=r.temperature, max_tokens=r.max_tokens)
    hooks = [
        register_optimizer_step_pre_hook(lambda *_: clock.start("optimizer")),
        register_optimizer_step_post_hook(lambda *_: clock.stop()),
    ]
    with tempfile.TemporaryDirectory() as folder:
        task = prepare(config, Path(folder))
        cluster = LocalCluster(config.cluster, Path(folder))
        reward = spawn_judges(config, cluster, task.weights)
        engines: dict[str, Ours | Peer] = {
            "onpolicy": Ours(config, task, cluster, Path(folder), clock),
            "transformers": Peer(config, task, clock),
        }
        taken: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
        tokens: dict[str, list[float]] = {name: [] for name in engines}
        stream = PromptStream(task.prompts, config.run.seed)
        for step in range(WARM_UP + steps):
            prompts = stream.take(r.prompts_per_step)
            for name, engine in engines.items():
                count = engine.step(prompts, sampling, reward)
                seconds = clock.take()
                if step >= WARM_UP:
                    taken[name].append(seconds)
                    tokens[name].append(count / sum(seconds.values()))
        cluster.shutdown()
    for hook in hooks:
        hook.remove()
    total = {name: statistics.median(sum(s.values()) for s in seconds) for name, seconds in taken.items()}
    return {
        "threads": torch.get_num_threads(),
        "steps": steps,
        "answers_per_step": r.prompts_per_step * r.samples_per_prompt,
        "seconds": total,
        "tokens_per_s": {name: statistics.median(values) for name, values in tokens.items()},
        "phases": {
            name: {phase: statistics.median(s[phase] for s in seconds) for phase in seconds[0]}
            for name, seconds in taken.items()
        },
        "ratio": total["transformers"] / total["onpolicy"],
    }


def table(found: dict[str, Any]) -> str:
    """The report for a person."""
    ours, peer = found["phases"]["onpolicy"], found["phases"]["transformers"]
    lines = [
        f"{found['answers_per_step']} answers a step, {found['threads']} threads, median of {found['steps']} steps, ms",
        f"  {'':<12}{'onpolicy':>10}{'transformers':>14}",
    ]
    for phase in dict.fromkeys((*ours, *peer)):
        cells = [f"{1e3 * side[phase]:.1f}" if phase in side else "" for side in (ours, peer)]
        lines.append(f"  {phase:<12}{cells[0]:>10}{cells[1]:>14}")
    lines.append(
        f"  {'step':<12}{1e3 * found['seconds']['onpolicy']:>10.1f}{1e3 * found['seconds']['transformers']:>14.1f}"
        f"   onpolicy is {found['ratio']:.2f} x"
    )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rlhf.bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("step", help="a training step by phase")
    packaged = str(files("configs") / "arithmetic_grpo_cpu.yaml")
    step.add_argument("--config", default=packaged, help="YAML file; the quickstart's if left out")
    step.add_argument("--steps", type=int, default=20)
    step.add_argument("--json", type=Path, help="write the numbers there, too")
    step.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args(argv)
    found = bench_step(load_config(args.config, args.overrides), args.steps)
    print(table(found))
    if args.json:
        tmp = args.json.with_name(args.json.name + ".tmp")
        tmp.write_text(json.dumps(found, indent=1))
        tmp.replace(args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
