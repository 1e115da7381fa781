"""The weights that model roles start from: where they are, whether they will do, and what tells them from others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf.config import Config
from rollout_engine.models import family
from rollout_engine.models.checkpoint import (
    has_scalar_head,
    load_hf_config,
    load_tokenizer,
    open_weights,
    resolve,
    weight_files,
)

Weights = Mapping[str, Path]  # folders by role; one that isn't there starts from the policy's

CALIBRATION = "calibration.json"  # beside the weights of a reward model
SAY_MORE = ("config.json", "generation_config.json", CALIBRATION)  # with others, the same weights say something else
PIECE = 1 << 20  # bytes
PIECES = 64


def key_of(config: Config, role: str) -> str:
    """What names the weights of a role in the config."""
    names = {model_role: f"reward.models.{name}" for name, model_role in config.reward.model_roles.items()}
    return names.get(role) or ("model.path" if role == "policy" else f"{role}.path")


@contextmanager
def named(key: str) -> Iterator[None]:
    """What is wrong with a checkpoint is told with the key that names it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def resolve_weights(config: Config, policy: Path) -> Weights:
    """The folders of ``config.ranks``' roles; ``policy`` is the policy's. Hub ids are downloaded.

    Links are followed once, here: ``latest`` may lead elsewhere by the time that a role is started anew. A role that
    names no weights of its own is left out. Raises ValueError with the key of what isn't there.
    """
    found = {"policy": policy.resolve()}
    paths = {role: config.reward.models[name] for name, role in config.reward.model_roles.items()}
    for role in config.ranks:
        if role == "policy":
            continue
        section = config.section_of(role)
        path = paths.get(role, section.path)
        if path is not None:
            with named(key_of(config, role)):
                found[role] = resolve(path, section.revision or "main").resolve()
    return found


def check_weights(config: Config, weights: Weights, tokenizer: Any, longest: int) -> None:
    """Refuse what a role can't start from, without reading weights: the wrong head, lacking tensors, another tokenizer
    than the policy's, a context below ``longest``, the tokens of a prompt with its answer.

    Raises ValueError with the key, what was found and the way out.
    """
    for role, folder in weights.items():
        if role != "policy":
            with named(key_of(config, role)):
                _check(role, folder, tokenizer, longest)


def _check(role: str, folder: Path, tokenizer: Any, longest: int) -> None:
    hf_config = load_hf_config(folder)
    decoder = family(hf_config).decoder_config(hf_config)
    if role == "reference" and has_scalar_head(folder):
        raise ValueError(f"{folder} has a scalar head; the reference is a language model, such as the policy's start")
    if role.startswith("reward_model") and not has_scalar_head(folder):
        raise ValueError(f"{folder} has no scalar head; `rlhf reward-model` trains one")
    names = family(hf_config).name_map(decoder)
    # A scalar head takes the place of the vocabulary's.
    open_weights(folder, {ours: parts for ours, parts in names.items() if role == "reference" or ours != "head.weight"})
    if load_tokenizer(folder).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"{folder} has another tokenizer than the policy, whose token ids it is shown; take weights that were "
            "trained from the policy's model family"
        )
    if longest > decoder.max_position:
        raise ValueError(
            f"{folder} has a context of {decoder.max_position} tokens; a prompt with its answer may have {longest}. "
            "Lower data.max_prompt_tokens or rollout.max_tokens"
        )


def by_key(config: Config, weights: Weights) -> dict[str, Path]:
    """Folders by what names them in the config."""
    return {key_of(config, role): folder for role, folder in weights.items()}


def fingerprint(folders: Mapping[str, Path]) -> dict[str, Any]:
    """What tells the weights in these folders, by the key that names them, from others: the folder (of a Hub id it ends
    with the commit), and of every file its bytes and a hash.

    Raises ValueError for a checkpoint that lacks files.
    """
    found = {}
    for key, folder in folders.items():
        with named(key):
            files = [*weight_files(folder), *(folder / name for name in SAY_MORE if (folder / name).exists())]
            found[key] = {
                "folder": str(folder),
                "files": {file.name: {"bytes": file.stat().st_size, "hash": hash_of(file)} for file in files},
            }
    return found


def hash_of(file: Path) -> str:
    """sha256 of a file of at most 64 MiB; of 64 evenly spread MiB of a larger one, its first and last among them.

    The first holds the header with names and shapes. Reading all of a 16 GB model would hold up every start, resume
    and restart for 10 to 20 s, and for minutes from a network disk, to find what this finds too: training, and so
    another training, changes weights all over the file. What it can't see is damage to a few bytes.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        if size <= PIECES * PIECE:
            return hashlib.file_digest(opened, "sha256").hexdigest()
        digest = hashlib.sha256()
        for i in range(PIECES):
            opened.seek((size - PIECE) * i // (PIECES - 1))
            digest.update(opened.read(PIECE))
        return digest.hexdigest()


def check_same_weights(run_folder: Path, now: dict[str, Any]) -> None:
    """Raises ValueError naming the first model that is no longer what the run began with, and the way out."""
    then = json.loads((run_folder / "weights.json").read_text())
    if list(then) != list(now):
        raise ValueError(
            f"{run_folder} began with the weights of {', '.join(then)}, in this order, and would go on with those of "
            f"{', '.join(now)}. Leave the roles and their order as they were; only where the weights lie may change"
        )
    for key, found in now.items():
        if changes := _changes(then[key]["files"], found["files"]):
            raise ValueError(
                f"{key}: the model in {found['folder']} is not what {run_folder} began with: {'; '.join(changes)}. "
                f"The run found its model in {then[key]['folder']}: bring it back, or give {key} the folder where it "
                "is now when you resume; or start a new run from what was learnt, "
                f"model.path={run_folder / 'checkpoints' / 'latest' / 'hf'}"
            )


def _changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    found = []
    for name in sorted({*then, *now}):
        old, new = then.get(name), now.get(name)
        if old is None or new is None:
            found.append(f"{name} is {'new' if old is None else 'gone'}")
        elif old["bytes"] != new["bytes"]:
            found.append(f"{name} had {old['bytes']} bytes and has {new['bytes']}")
        elif old["hash"] != new["hash"]:
            found.append(f"{name} differs")
    return found
