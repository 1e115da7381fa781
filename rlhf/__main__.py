"""The command line: ``rlhf train|reward-model CONFIG``, ``rlhf init NAME``, ``rlhf doctor``, ``rlhf algorithms``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

# Before torch loads OpenMP, and inherited by Ray's workers: threads that spin while they wait make a step ten times
# slower as soon as anything else wants the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

NOT_BUILT = ("sft", "dpo", "eval", "export", "plan", "report")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status. Bad input prints one line and gives 2."""
    parser = argparse.ArgumentParser(
        prog="rlhf", description="RLHF in which the sampler and the trainer are one model."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="run a config")
    train.add_argument("config", nargs="?", help="YAML file")
    train.add_argument("--dry-run", action="store_true", help="check, print the plan and try the reward; start nothing")
    reward_model = commands.add_parser("reward-model", help="train a reward model on preference pairs")
    reward_model.add_argument("config", nargs="?", help="YAML file")
    reward_model.add_argument("--dry-run", action="store_true", help="check and print the plan; start nothing")
    for command in (train, reward_model):
        command.add_argument(
            "--resume", metavar="RUN", help="go on with the run in this folder instead of starting one"
        )
        command.add_argument("overrides", nargs="*", metavar="section.key=value")
    init = commands.add_parser("init", help="print a packaged config, a starting point of your own")
    init.add_argument("name", nargs="?", help="leave out to list them")
    commands.add_parser("algorithms", help="list the algorithms and their hyper-parameters")
    commands.add_parser("doctor", help="check this machine")
    for name in NOT_BUILT:
        commands.add_parser(name, help="not built yet")
    args, rest = parser.parse_known_args(argv)
    if args.command in NOT_BUILT:
        print(f"rlhf {args.command}: not built yet; see the README for what is", file=sys.stderr)
        return 2
    if args.command in ("train", "reward-model"):  # argparse leaves what follows a flag
        args.overrides += [word for word in rest if not word.startswith("-")]
        rest = [word for word in rest if word.startswith("-")]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    from rlhf.cluster import PlacementError, RoleDied

    try:
        return COMMANDS[args.command](args)
    except ValueError as error:
        print(f"rlhf {args.command}: {error}", file=sys.stderr)
        return 2
    except (RoleDied, PlacementError, TimeoutError) as error:
        print(f"rlhf {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"rlhf {args.command}: interrupted", file=sys.stderr)
        return 130


def _train(args: argparse.Namespace) -> int:
    from rlhf.config import load_config

    if args.resume is not None:
        overrides = _overrides_of_resume(args)
        from rlhf.launch import resume

        return 0 if resume(Path(args.resume), overrides).learnt else 1
    config = load_config(_config_file(args), args.overrides)
    from rlhf.launch import dry_run, launch

    if args.dry_run:
        print(dry_run(config))
        return 0
    return 0 if launch(config).learnt else 1


def _reward_model(args: argparse.Namespace) -> int:
    from rlhf.reward_model.config import load_config

    if args.resume is not None:
        overrides = _overrides_of_resume(args)
        from rlhf.reward_model.launch import resume

        resume(Path(args.resume), overrides)
        return 0
    config = load_config(_config_file(args), args.overrides)
    from rlhf.reward_model.launch import dry_run, launch

    if args.dry_run:
        print(dry_run(config))
    else:
        launch(config)
    return 0


def _overrides_of_resume(args: argparse.Namespace) -> list[str]:
    """The first one is where a config would be."""
    if args.dry_run:
        raise ValueError("--dry-run tries a config, and --resume goes on with a run; give one of the two")
    return [word for word in (args.config, *args.overrides) if word is not None]


def _config_file(args: argparse.Namespace) -> str:
    if args.config is None:
        raise ValueError("give a config (`rlhf init` lists the packaged ones), or --resume with a run folder")
    return str(args.config)


def _init(args: argparse.Namespace) -> int:
    folder = files("configs")
    names = sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))
    if args.name is None:
        print("\n".join(names))
    elif args.name in names:
        print((folder / f"{args.name}.yaml").read_text(), end="")
    else:
        raise ValueError(f"no packaged config {args.name!r}; choose one of {names}")
    return 0


def _algorithms(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from rlhf import algorithms
    from rlhf.config import spell

    rows = [asdict(algorithms.load({"name": name})) for name in algorithms.names()]  # type: ignore[call-overload]
    print("Presets for algorithm.name; every axis is a key of the config's algorithm section.\n")
    for row in rows:
        print(f"{row['name']:<14}{algorithms.summary(row['name'])}")
    columns = [
        _column(key, [spell(row[key]) if key in row else "" for row in rows])
        for key in dict.fromkeys(key for row in rows for key in row if key != "name")
    ]
    name = _column("", [row["name"] for row in rows])
    while columns:  # as many as fit a line, then the rest below
        block = name
        while columns and len(block[0]) + len(columns[0][0]) <= 100:
            block = [left + right for left, right in zip(block, columns.pop(0), strict=True)]
        print("", *(line.rstrip() for line in block), sep="\n")
    return 0


def _column(title: str, cells: Sequence[str]) -> list[str]:
    width = max(map(len, (title, *cells))) + 2
    return [cell.ljust(width) for cell in (title, *cells)]


def _doctor(args: argparse.Namespace) -> int:
    from rlhf.doctor import report

    lines, healthy = report()
    print("\n".join(lines))
    return 0 if healthy else 1


COMMANDS = {
    "train": _train,
    "reward-model": _reward_model,
    "init": _init,
    "algorithms": _algorithms,
    "doctor": _doctor,
}

if __name__ == "__main__":
    sys.exit(main())
