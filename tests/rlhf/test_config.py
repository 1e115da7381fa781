"""The config, the plan's checks and the command line: what is accepted, and what a refusal says."""

from __future__ import annotations

import itertools
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from rlhf import algorithms
from rlhf.__main__ import main
from rlhf.config import Config, dump_config, load_config, parse_config
from rlhf.launch import prepare
from rlhf.plan import check, count_parameters
from rlhf.reward_model import config as reward_model
from rollout_engine.models import family
from rollout_engine.models.decoder import Decoder

PACKAGED = sorted(f.name for f in files("configs").iterdir() if f.name.endswith(".yaml"))
TEXT = """\
run: {name: tiny, dir: runs, steps: 3}
recipe: {path: recipes.arithmetic}
rollout: {prompts_per_step: 2, samples_per_prompt: 4, max_tokens: 5, kv_cache_gib: 0.01}
algorithm: {name: grpo, kl_coef: 1e-3}
train: {lr: 1e-6}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TEXT)
    return path


def message(file: Path, *overrides: str) -> str:
    """What loading with these overrides is refused with."""
    with pytest.raises(ValueError) as caught:
        load_config(file, overrides)
    return str(caught.value)


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize("name", ["arithmetic_grpo_cpu.yaml", *PACKAGED])
def test_packaged_configs_parse(name: str) -> None:
    path = Path(str(files("configs") / name))
    tree = yaml.safe_load(path.read_text())
    config = reward_model.load_config(path) if "pairs" in tree else load_config(path)
    assert config.run.name == tree["run"]["name"]
    assert config.train.lr == float(tree["train"]["lr"]) > 0
    if isinstance(config, Config):
        assert vars(config.make_algorithm())["name"] == tree["algorithm"]["name"]


def test_numbers_in_scientific_notation_are_numbers(file: Path) -> None:
    config = load_config(file)
    assert isinstance(config.train.lr, float) and config.train.lr == 1e-6
    assert vars(config.make_algorithm())["kl_coef"] == 1e-3
    assert load_config(file, ["train.lr=2e-6"]).train.lr == 2e-06
    assert vars(load_config(file, ["algorithm.kl_coef=5e-2"]).make_algorithm())["kl_coef"] == 0.05


def test_overrides_reach_sections_present_and_absent(file: Path) -> None:
    config = load_config(
        file, ["run.steps=7", "eval.every=0", "train.betas=[0.8, 0.9]", "reward.shuffle=true", "model.path=a=b"]
    )
    assert (config.run.steps, config.eval.every, config.reward.shuffle) == (7, 0, True)
    assert (config.train.betas, config.model.path) == ((0.8, 0.9), "a=b")
    assert load_config(file, ["run.steps=7", "run.steps=8"]).run.steps == 8
    assert load_config(file, ["model.path=null"]).model.path is None
    assert load_config(file).run.steps == 3  # the file itself is left alone


def test_an_override_of_an_empty_section_sets_the_key(file: Path) -> None:
    file.write_text(TEXT + "eval:\n")
    assert load_config(file, ["eval.every=5"]).eval.every == 5


@pytest.mark.parametrize(
    ("override", "key", "nearest"),
    [
        ("trian.lr=1", "trian", "train"),
        ("train.learning_rat=1", "train.learning_rat", "train."),
        ("train.warmup_step=1", "train.warmup_step", "train.warmup_steps"),
        ("rollout.max_token=1", "rollout.max_token", "rollout.max_tokens"),
        ("run.x.y=1", "run.x.y", "run."),
        ("algorithm.clip_hihg=0.3", "algorithm.clip_hihg", "clip_high"),
        ("algorithm.kl_coeff=0.3", "algorithm.kl_coeff", "kl_coef"),
        ("algorithm.leave_one=true", "algorithm.leave_one", "leave_one_out"),
    ],
)
def test_an_unknown_key_names_the_nearest(file: Path, override: str, key: str, nearest: str) -> None:
    said = message(file, override)
    assert f"unknown key {key!r}" in said
    suggestion = said.split("did you mean ")[1].split("?")[0].strip("'")
    assert suggestion.removeprefix("algorithm.").startswith(nearest)


def test_an_unknown_key_of_the_file_is_refused_too(file: Path) -> None:
    file.write_text(TEXT + "trackin: {wandb: disabled}\n")
    assert "unknown key 'trackin'; did you mean 'tracking'" in message(file)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("run.steps=many", ["run.steps='many'", "integer"]),
        ("run.steps=0", ["run.steps=0", "greater than 0"]),
        ("run.steps=1.5", ["run.steps=1.5", "integer"]),
        ("train.lr=fast", ["train.lr='fast'", "number"]),
        ("train.lr=-1e-3", ["train.lr=", "-1e-3", "greater than or equal to 0"]),
        ("train.lr=", ["train.lr=None", "number"]),
        ("train.schedule=cos", ["train.schedule='cos'", "'constant'", "'linear'", "'cosine'"]),
        ("train.zero_stage=4", ["train.zero_stage=4", "0, 1, 2 or 3"]),
        ("rollout.temperature=0", ["rollout.temperature=0", "greater than or equal to 0.0001"]),
        ("algorithm.clip_low=2", ["algorithm.clip_low=2", "less than or equal to 1"]),
        ("algorithm.tis_clip=0", ["algorithm.tis_clip=0", "greater than 0"]),
        ("algorithm.dual_clip=1", ["algorithm.dual_clip=1", "greater than 1"]),
        ("algorithm.baseline=prompt", ["algorithm.baseline='prompt'", "'group', 'batch', 'greedy' or 'none'"]),
        ("algorithm.updates_per_rollout=two", ["algorithm.updates_per_rollout='two'", "integer"]),
        ("algorithm.aggregation=mean", ["algorithm.aggregation='mean'", "'token_mean'", "'sequence_mean'"]),
        ("algorithm.name=gpro", ["algorithm.name='gpro'", "'grpo'"]),
    ],
)
def test_a_bad_value_says_key_value_and_what_is_allowed(file: Path, override: str, parts: list[str]) -> None:
    said = message(file, override)
    assert [part for part in parts if part not in said] == []


@pytest.mark.parametrize("override", ["train.lr", "lr=1", "=1", "train.=1", "train", "", "train.lr=[1", "eval.every={"])
def test_a_malformed_override_is_quoted(file: Path, override: str) -> None:
    assert repr(override) in message(file, override)


def test_all_that_is_wrong_is_said_at_once(file: Path) -> None:
    said = message(file, "run.steps=x", "trian.lr=1")
    assert "run.steps='x'" in said and "'trian'" in said


def test_a_missing_key_and_a_missing_section(file: Path) -> None:
    file.write_text(TEXT.replace(", steps: 3", "").replace("recipe: {path: recipes.arithmetic}\n", ""))
    said = message(file)
    assert "run.steps is missing" in said and "recipe is missing" in said


def test_a_missing_file_and_files_that_are_no_config(tmp_path: Path) -> None:
    assert "nowhere.yaml" in message(tmp_path / "nowhere.yaml")
    for name, text in (("list", "- 1\n- 2\n"), ("empty", ""), ("scalar", "run")):
        (tmp_path / f"{name}.yaml").write_text(text)
        assert f"{name}.yaml is not a mapping" in message(tmp_path / f"{name}.yaml")


def test_a_file_that_is_no_yaml_is_named(file: Path) -> None:
    file.write_text("run: {name: [\n")
    assert str(file) in message(file)


@pytest.mark.parametrize(
    "overrides",
    [(), ("train.max_grad_norm=.inf", "train.betas=[0.5, 0.6]", "model.path=somewhere", "algorithm.clip_high=0.28")],
)
def test_a_dumped_config_parses_to_itself(file: Path, overrides: tuple[str, ...]) -> None:
    config = load_config(file, overrides)
    text = dump_config(config)
    again = parse_config(yaml.safe_load(text))
    assert dump_config(again) == text
    assert again.model_copy(update={"algorithm": config.algorithm}) == config
    assert again.make_algorithm() == config.make_algorithm()


def test_a_dumped_config_spells_out_the_defaults(file: Path) -> None:
    config = load_config(file)
    tree = yaml.safe_load(dump_config(config))
    assert tree["checkpoint"] == {"every": 0, "keep_last": 2, "keep_best": "eval/accuracy", "max_restarts": 3}
    assert tree["train"]["betas"] == [0.9, 0.95]
    for name in Config.model_fields:
        if name != "algorithm":
            assert set(tree[name]) == set(type(getattr(config, name)).model_fields), name


def test_a_dumped_config_spells_out_the_algorithm(file: Path) -> None:
    config = load_config(file)
    tree = yaml.safe_load(dump_config(config))
    assert tree["algorithm"] == {key: value for key, value in vars(config.make_algorithm()).items() if key[0] != "_"}
    assert tree["algorithm"]["kl_coef"] == 1e-3


# ---------------------------------------------------------------- the plan


def hf_config(kind: type, **rest: Any) -> Any:
    sizes = {"vocab_size": 83, "intermediate_size": 52, "num_hidden_layers": 3, "max_position_embeddings": 64}
    heads = {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 20}
    return kind(**{**sizes, **heads, **rest})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("kind", "rest"),
    [
        (LlamaConfig, {}),
        (LlamaConfig, {"attention_bias": True}),
        (LlamaConfig, {"mlp_bias": True}),
        (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
        (Qwen3Config, {}),
        (Qwen3Config, {"attention_bias": True}),
        (MistralConfig, {}),
        (Qwen2Config, {}),
        (Phi3Config, {"hidden_size": 48, "pad_token_id": 0}),
        (Gemma2Config, {}),
        (Gemma3TextConfig, {}),
        (Gemma3TextConfig, {"attention_bias": True}),
    ],
)
def test_parameters_are_counted_as_the_decoder_has_them(kind: type, rest: dict[str, Any], tied: bool) -> None:
    hf = hf_config(kind, tie_word_embeddings=tied, **rest)
    config = family(hf).decoder_config(hf)
    ours = sum(p.numel() for p in Decoder(config, config.vocab_size).parameters())
    theirs = sum(p.numel() for p in AutoModelForCausalLM.from_config(hf).parameters())
    assert count_parameters(config) == ours == theirs


def check_tiny(file: Path, *overrides: str, longest_prompt: int = 10, tokens: int = 80) -> None:
    check(load_config(file, overrides), hf_config(Qwen3Config), range(tokens), longest_prompt)


def test_what_fits_is_let_through(file: Path) -> None:
    check_tiny(file)
    check_tiny(file, "rollout.max_tokens=54")  # 10 + 54 = 64, the context
    check_tiny(file, "algorithm.updates_per_rollout=4")
    check_tiny(file, tokens=83)
    for correction in ("tis_clip=2.0", "proximal=sampler"):
        check_tiny(file, "rollout.top_p=0.9", f"algorithm.{correction}")


@pytest.mark.parametrize(
    ("overrides", "prompt", "tokens", "parts"),
    [
        (["algorithm.updates_per_rollout=3"], 10, 80, ["= 8 answers", "updates_per_rollout=3"]),
        (["rollout.samples_per_prompt=1"], 10, 80, ["samples_per_prompt=1", "at least 2"]),
        (["rollout.max_tokens=55"], 10, 80, ["10 tokens", "max_tokens=55", "65", "64"]),
        (["rollout.max_tokens=5"], 60, 80, ["60 tokens", "max_tokens=5", "65", "64"]),
        # 2 * 3 layers * 3 heads * 20 * 4 bytes = 1440 bytes a token: 0.00005 GiB hold 37, one page of 32
        (["rollout.kv_cache_gib=0.00005", "rollout.max_tokens=30"], 10, 80, ["40 tokens", "kv_cache_gib=0.00005"]),
        (["rollout.page_size=48"], 10, 80, ["page_size=48", "32"]),
        (
            ["rollout.top_p=0.9"],
            10,
            80,
            ["top_p=0.9", "nothing corrects", "tis_clip=2.0", "proximal=sampler", "top_p=1"],
        ),
        (["rollout.top_k=5"], 10, 80, ["top_k=5", "nothing corrects"]),
        (["rollout.min_p=0.1", "algorithm.reject=token"], 10, 80, ["min_p=0.1", "nothing corrects"]),
        (["rollout.max_num_seqs=3"], 10, 80, ["samples_per_prompt=4", "max_num_seqs=3"]),
        ([], 10, 84, ["84 tokens", "83"]),
    ],
)
def test_what_can_not_work_is_refused_with_both_values(
    file: Path, overrides: list[str], prompt: int, tokens: int, parts: list[str]
) -> None:
    with pytest.raises(ValueError) as caught:
        check_tiny(file, *overrides, longest_prompt=prompt, tokens=tokens)
    said = str(caught.value).replace("5e-05", "0.00005")
    assert [part for part in parts if part not in said] == []


def test_a_kv_refusal_never_says_that_the_answer_fits(file: Path) -> None:
    """Pages are whole: 37 tokens of memory hold one page of 32, so 36 tokens are refused, though not by 37 < 36."""
    with pytest.raises(ValueError, match="36 tokens") as caught:
        check_tiny(file, "rollout.kv_cache_gib=0.00005", "rollout.max_tokens=26")
    held = re.search(r"holds (\d+)", str(caught.value))
    assert held is not None and int(held[1]) < 36


def test_prepare_makes_the_recipes_model_and_prompts(file: Path, tmp_path: Path) -> None:
    task = prepare(load_config(file), tmp_path / "good")
    assert (task.checkpoint / "config.json").exists()
    assert task.plan.num_prompts == len(task.prompts) > 8000 and task.plan.num_dropped == 0
    assert max(len(p.token_ids) for p in task.prompts) == 6  # 99+99=
    assert vars(task.recipe.module)["__name__"] == "recipes.arithmetic"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rollout.max_tokens=59"], r"\(6 tokens\).*max_tokens=59 make 65.*64"),
        (["rollout.samples_per_prompt=1"], "samples_per_prompt=1.*at least 2"),
        (["algorithm.updates_per_rollout=3"], "= 8 answers.*updates_per_rollout=3"),
        (["rollout.kv_cache_gib=1e-6"], "11 tokens.*kv_cache_gib=1e-06"),
        (["data.max_prompt_tokens=3"], r"prompts are longer than data\.max_prompt_tokens=3"),
    ],
)
def test_prepare_refuses(file: Path, tmp_path: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        prepare(load_config(file, overrides), tmp_path / "run")


# ---------------------------------------------------------------- the command line


def test_init_lists_and_prints(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["init"]) == 0
    assert [f"{line}.yaml" for line in capsys.readouterr().out.split()] == PACKAGED
    assert main(["init", "arithmetic_grpo_cpu"]) == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    assert load_config(tmp_path / "mine.yaml").recipe.path == "recipes.arithmetic"


def test_algorithms_are_listed_with_their_papers_and_every_axis_as_a_config_spells_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["algorithms"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in algorithms.names():
        assert sum(line.split()[:1] == [name] and "arXiv" in line for line in lines) == 1, name
        listed: dict[str, Any] = {}
        for titles, *rows in blocks(lines):
            starts = [m.start() for m in re.finditer(r"\S+", titles)]
            (row,) = [row for row in rows if row.split()[0] == name]
            cells = [row[a:b].strip() for a, b in itertools.pairwise([*starts, None])]
            listed.update({key: yaml.safe_load(cell) for key, cell in zip(titles.split(), cells, strict=True)})
        expected = vars(algorithms.load({"name": name}))
        listed = {key: value for key, value in listed.items() if key in expected or value is not None}  # not its own
        assert listed == {key: value for key, value in expected.items() if key != "name" and key[0] != "_"}
    assert max(map(len, lines[lines.index("") + 1 :][len(algorithms.names()) :])) <= 100


def blocks(lines: list[str]) -> list[list[str]]:
    """Runs of lines that start with a line of titles, which is indented."""
    runs = [list(run) for full, run in itertools.groupby(lines, bool) if full]
    return [run for run in runs if run[0].startswith(" ")]


def test_axes_that_contradict_each_other_are_refused_in_one_plain_sentence(file: Path) -> None:
    said = message(file, "algorithm.leave_one_out=true", "algorithm.baseline=batch", "algorithm.std=none")
    assert said.startswith("algorithm.leave_one_out=true") and said.endswith(
        "set baseline=group or leave_one_out=false"
    )


def test_one_sample_per_prompt_is_enough_for_a_baseline_over_the_batch(file: Path) -> None:
    check_tiny(file, "rollout.samples_per_prompt=1", "algorithm.name=reinforce_pp")
    with pytest.raises(ValueError, match=r"samples_per_prompt=1.*rloo.*at least 2.*reinforce_pp"):
        check_tiny(file, "rollout.samples_per_prompt=1", "algorithm.name=rloo")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["init", "nope"], "nope.*arithmetic_grpo_cpu"),
        (["dpo", "x"], "dpo: not built"),
        (["reward-model", "x"], "reward-model: no config file 'x'"),
        (["eval", "--some=thing", "x"], "eval: not built"),
        (["train", "FILE", "run.bogus=1"], "unknown key 'run.bogus'"),
        (["train", "FILE", "run.bogus=1", "--dry-run"], "unknown key 'run.bogus'"),
        (["train", "--dry-run", "FILE", "run.bogus=1"], "unknown key 'run.bogus'"),
        (["train", "FILE", "--dry-run", "run.bogus=1"], "unknown key 'run.bogus'"),
        (["train", "no/such.yaml"], r"no/such\.yaml"),
        (["train", "FILE", "recipe.path=no_such_module", "--dry-run"], "no_such_module"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_status_2(
    argv: list[str], said: str, file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    assert main([str(file) if word == "FILE" else word for word in argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and re.search(said, err)
    assert list(file.parent.iterdir()) == [file]


def test_a_dry_run_prints_the_plan_and_leaves_nothing(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    assert main(["train", str(file), "run.steps=9", "--dry-run"]) == 0
    out = capsys.readouterr().out
    for part in ("tiny, seed 0, 9 steps of 2 prompts x 4 samples = 8 answers", "grpo", "kl_coef=0.001", "reference"):
        assert part in out
    assert out.count("reward of an empty answer") == 4
    assert list(file.parent.iterdir()) == [file]
