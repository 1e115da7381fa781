"""The weights that roles start from are found once, and a run refuses to go on with others."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_resume import files_of, metrics_of

from recipes import arithmetic
from rlhf import weights
from rlhf.cluster import RoleDied
from rlhf.config import Config, load_config
from rlhf.launch import launch, resume
from rlhf.tracking import Tracker
from rlhf.weights import by_key, check_same_weights, fingerprint, hash_of, resolve_weights
from rollout_engine.models.checkpoint import load_scalar_model, save_model

CONFIG = Path(__file__).parents[2] / "configs" / "arithmetic_grpo_cpu.yaml"
SMALL = ["run.steps=2", "warm_start.steps=0", "rollout.prompts_per_step=4", "rollout.kv_cache_gib=0.02",
         "eval.prompts=4", "eval.every=0", "checkpoint.every=1", "cluster.threads=1", "cluster.kind=local",
         "tracking.wandb=disabled"]  # fmt: skip
RECIPE = """
import itertools
from recipes import arithmetic
from recipes.arithmetic import initial_model

def prompts(split):
    return itertools.islice(arithmetic.prompts(split), 8)
"""


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy") / "hf"
    arithmetic.initial_model(folder, 0)
    return folder


def train_judge(policy: Path, folder: Path, seed: int) -> Path:
    """What another training of the same reward model leaves: other numbers in the same places."""
    model = load_scalar_model(policy)
    torch.manual_seed(seed)
    torch.nn.init.normal_(model.decoder.score.weight)
    save_model(model, folder)
    (folder / "calibration.json").write_text('{"midpoint": 0.25}')
    return folder


@pytest.fixture
def latest(policy: Path, tmp_path: Path) -> Path:
    """A link to the newer of the two runs of a reward model; the first, for now."""
    for run in (1, 2):
        train_judge(policy, tmp_path / "judges" / f"000{run}" / "hf", run)
    link = tmp_path / "judges" / "latest"
    link.symlink_to("0001")
    return link


def move(link: Path) -> None:
    link.unlink()
    link.symlink_to("0002")


@pytest.fixture
def config(latest: Path, tmp_path: Path) -> Config:
    """Of a small run that a reward model alone judges, by way of the link."""
    (tmp_path / "task.py").write_text(RECIPE)
    models = yaml.safe_dump({"helpful": str(latest / "hf")}, default_flow_style=True)
    words = [*SMALL, f"run.dir={tmp_path / 'runs'}", f"recipe.path={tmp_path / 'task.py'}", f"reward.models={models}"]
    return load_config(CONFIG, words)


# ---------------------------------------------------------------- hashes


def test_small_files_are_hashed_whole(tmp_path: Path) -> None:
    file = tmp_path / "some"
    file.write_bytes(bytes(range(256)) * 40)
    assert hash_of(file) == hashlib.sha256(bytes(range(256)) * 40).hexdigest()


@pytest.mark.parametrize("size", [4001, 4002, 9999, 123_457])
def test_of_large_files_pieces_count_from_the_first_byte_to_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(weights, "PIECE", 1000)
    monkeypatch.setattr(weights, "PIECES", 4)
    file = tmp_path / "some"
    content = bytes((i * i) % 251 for i in range(size))
    file.write_bytes(content)
    starts = [0, (size - 1000) // 3, (size - 1000) * 2 // 3, size - 1000]
    assert hash_of(file) == hashlib.sha256(b"".join(content[at : at + 1000] for at in starts)).hexdigest()


def test_the_cost_has_a_bound(tmp_path: Path) -> None:
    """A terabyte with nothing in it, which nobody reads to its end here."""
    file = tmp_path / "some"
    with file.open("wb") as opened:
        opened.truncate(1 << 40)
    assert hash_of(file) == hashlib.sha256(bytes(1 << 26)).hexdigest()
    with file.open("r+b") as opened:
        opened.seek((1 << 40) - 1)
        opened.write(b"x")
    assert hash_of(file) != hashlib.sha256(bytes(1 << 26)).hexdigest()


# ---------------------------------------------------------------- a run


def test_a_run_keeps_to_the_models_it_began_with(config: Config, latest: Path) -> None:
    folder = launch(config).folder
    first = latest.parent / "0001" / "hf"
    kept = json.loads((folder / "weights.json").read_text())
    assert kept["reward.models.helpful"]["folder"] == str(first) and next(iter(kept)) == "model.path"
    assert f"reward model {first}" in " ".join((folder / "plan.txt").read_text().split())
    move(latest)
    with pytest.raises(ValueError) as caught:
        resume(folder, ["run.steps=3"])
    said = str(caught.value)
    assert said.startswith(f"reward.models.helpful: the model in {latest.parent / '0002' / 'hf'} is not what {folder}")
    assert "began with: model.safetensors differs." in said and f"found its model in {first}: bring it back" in said
    assert f"model.path={folder / 'checkpoints' / 'latest' / 'hf'}" in said
    assert len(metrics_of(folder)) == 2  # nothing was done
    resume(folder, ["run.steps=3", f"reward.models={{helpful: {first}}}"])
    assert [row["step"] for row in metrics_of(folder)] == [1, 2, 3]
    assert str(first) in (folder / "config.yaml").read_text()  # for the next time


@pytest.fixture
def die_at_1() -> Iterator[list[Callable[[], None]]]:
    """The policy dies at the end of the first step, once; what is in the list happens then."""
    todo: list[Callable[[], None]] = []
    log, deaths = Tracker.log, [1]

    def dying(self: Tracker, step: int, metrics: dict[str, float]) -> None:
        log(self, step, metrics)
        if deaths:
            deaths.pop()
            for something in todo:
                something()
            raise RoleDied("role policy died")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracker, "log", dying)
        yield todo


def test_a_restart_follows_no_link(config: Config, latest: Path, die_at_1: list[Callable[[], None]]) -> None:
    die_at_1.append(lambda: move(latest))
    disturbed = launch(config).folder
    assert "restart 1 of" in (disturbed / "train.log").read_text()
    latest.unlink()
    latest.symlink_to("0001")
    whole = launch(config).folder
    assert metrics_of(disturbed) == metrics_of(whole) and files_of(disturbed) == files_of(whole)


def test_a_restart_with_other_weights_is_refused(
    config: Config, latest: Path, die_at_1: list[Callable[[], None]]
) -> None:
    first, second = (latest.parent / run / "hf" / "model.safetensors" for run in ("0001", "0002"))
    die_at_1.append(lambda: shutil.copy(second, first))
    with pytest.raises(ValueError, match=r"^reward\.models\.helpful: .* began with: model\.safetensors differs\."):
        launch(config)
    (folder,) = (config.run.dir / config.run.name).iterdir()
    assert [row["step"] for row in metrics_of(folder)] == [1]


# ---------------------------------------------------------------- every role


@pytest.fixture
def ppo(policy: Path, tmp_path: Path) -> Config:
    """PPO whose critic and reference have weights of their own."""
    folders = {role: str(shutil.copytree(policy, tmp_path / role)) for role in ("critic", "reference")}
    return load_config(CONFIG, ["algorithm.name=ppo", *(f"{role}.path={folder}" for role, folder in folders.items())])


def kept(config: Config, policy: Path, folder: Path) -> dict[str, Any]:
    """The fingerprint of the beginning, in the run folder."""
    found = fingerprint(by_key(config, resolve_weights(config, policy)))
    (folder / "weights.json").write_text(json.dumps(found))
    return found


def scramble(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def grow(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"0123456789")


def loosen_norm(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rms_norm_eps": 0.5}))


@pytest.mark.parametrize("role", ["critic", "reference"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (scramble, r"model\.safetensors differs"),
        (grow, r"model\.safetensors had (\d+) bytes and has \d+"),
        (loosen_norm, r"config\.json had \d+ bytes and has \d+|config\.json differs"),
        (lambda folder: (folder / "generation_config.json").unlink(), r"generation_config\.json is gone"),
        (lambda folder: (folder / "calibration.json").write_text("{}"), r"calibration\.json is new"),
        (lambda folder: (folder / "model.safetensors").unlink(), None),
    ],
)
def test_every_role_is_watched(
    ppo: Config, policy: Path, tmp_path: Path, role: str, change: Callable[[Path], object], said: str | None
) -> None:
    check_same_weights(tmp_path, kept(ppo, policy, tmp_path))
    change(tmp_path / role)
    message = rf"the model in .*{role} is not what .* began with: ({said})\." if said else ".* lacks the weight files"
    with pytest.raises(ValueError, match=rf"^{role}\.path: {message}"):
        check_same_weights(tmp_path, fingerprint(by_key(ppo, resolve_weights(ppo, policy))))


def test_weights_that_moved_are_the_same(ppo: Config, policy: Path, tmp_path: Path) -> None:
    kept(ppo, policy, tmp_path)
    (tmp_path / "critic").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"^critic\.path: .*critic' is not a folder"):
        resolve_weights(ppo, policy)
    moved = ppo.model_copy(update={"critic": ppo.critic.model_copy(update={"path": str(tmp_path / "elsewhere")})})
    check_same_weights(tmp_path, fingerprint(by_key(moved, resolve_weights(moved, policy))))


def test_roles_with_weights_of_their_own_stay_the_same_ones(ppo: Config, policy: Path, tmp_path: Path) -> None:
    kept(ppo, policy, tmp_path)
    fewer = load_config(CONFIG, ["algorithm.name=ppo", f"critic.path={ppo.critic.path}"])
    with pytest.raises(
        ValueError, match=r"weights of model\.path, reference\.path, critic\.path, .* model\.path, crit"
    ):
        check_same_weights(tmp_path, fingerprint(by_key(fewer, resolve_weights(fewer, policy))))


def test_a_hub_id_is_kept_with_its_commit(policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The revision is the role's own; the policy's belongs to another model."""
    asked = []

    def download(repo: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.append((repo, revision))
        return str(shutil.copytree(policy, tmp_path / "snapshots" / f"commit-of-{revision}", dirs_exist_ok=True))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    words = ["model.revision=v9", "critic.path=some/critic", "critic.revision=v1", "reference.path=some/start"]
    config = load_config(CONFIG, ["algorithm.name=ppo", *words])
    found = fingerprint(by_key(config, resolve_weights(config, policy)))
    assert asked == [("some/start", "main"), ("some/critic", "v1")]
    assert found["critic.path"]["folder"].endswith("/snapshots/commit-of-v1")
