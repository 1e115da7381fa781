"""Prompts in their order, recipes as users write them, rewards, and the arithmetic task."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recipes import arithmetic
from rlhf.config import Data, Reward
from rlhf.data import PromptStream, Renderer, load_rows, tokenize
from rlhf.judging import Judges
from rlhf.recipe import load_recipe
from rlhf.roles.reward import RewardFunction
from rlhf.types import Completion, Prompt, Score
from rollout_engine.models.checkpoint import Model, load_model

PROMPTS = "\ndef prompts(split): return [{'prompt': 'a', 'answer': '1'}, {'prompt': 'bb', 'answer': '2'}]\n"


def numbered(count: int) -> list[Prompt]:
    return [Prompt(i, str(i), (i,)) for i in range(count)]


def indices(prompts: list[Prompt]) -> list[int]:
    return [p.index for p in prompts]


# ---------------------------------------------------------------- the stream


def test_every_epoch_is_another_permutation() -> None:
    drawn = indices(PromptStream(numbered(20), seed=4).take(60))
    epochs = [tuple(drawn[i : i + 20]) for i in (0, 20, 40)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({*epochs, tuple(range(20))}) == 4


def test_the_order_depends_on_the_seed_alone() -> None:
    first, again, other = (indices(PromptStream(numbered(20), seed=s).take(40)) for s in (4, 4, 5))
    assert first == again != other


@pytest.mark.parametrize("size", [1, 3, 5, 8, 20])
def test_the_order_does_not_depend_on_how_many_are_taken(size: int) -> None:
    whole, parts = PromptStream(numbered(size), seed=1), PromptStream(numbered(size), seed=1)
    assert indices(parts.take(3)) + indices(parts.take(5)) == indices(whole.take(8))
    assert parts.position == whole.position == 8
    assert parts.take(0) == [] and parts.position == 8


@pytest.mark.parametrize("position", [0, 1, 6, 7, 13, 700])
def test_a_stream_resumes_from_its_position(position: int) -> None:
    whole = PromptStream(numbered(7), seed=2)
    whole.take(position)
    assert indices(PromptStream(numbered(7), seed=2, position=position).take(9)) == indices(whole.take(9))


# ---------------------------------------------------------------- tokenize


class Letters:
    """A tokenizer with a token a character and no special ones."""

    bos_token = chat_template = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


def letters(max_prompt_tokens: int) -> Renderer:
    return Renderer(Data(max_prompt_tokens=max_prompt_tokens), Letters())


def test_tokenize_keeps_columns_and_row_numbers_and_counts_what_it_drops() -> None:
    rows = [{"prompt": "ab", "answer": 1}, {"prompt": "abcd", "answer": 2}, {"prompt": "abc", "answer": 3}]
    prompts, dropped = tokenize(rows, letters(3))
    assert dropped == 1
    assert prompts == [Prompt(0, "ab", (97, 98), rows[0]), Prompt(2, "abc", (97, 98, 99), rows[2])]
    assert rows[0] == {"prompt": "ab", "answer": 1}


def test_an_empty_prompt_and_nothing_left_are_errors() -> None:
    with pytest.raises(ValueError, match="row 1: the prompt is empty"):
        tokenize([{"prompt": "a"}, {"prompt": ""}], letters(3))
    with pytest.raises(ValueError, match=r"all 2 prompts are longer than data\.max_prompt_tokens=1"):
        tokenize([{"prompt": "ab"}, {"prompt": "cd"}], letters(1))


# ---------------------------------------------------------------- recipes

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """``write(source)``: a recipe file with two prompts, unless told otherwise; its path."""

    def run(source: str, prompts: str = PROMPTS, name: str = "mine") -> str:
        (tmp_path / f"{name}.py").write_text(source + prompts)
        return str(tmp_path / f"{name}.py")

    return run


def judged(path: str, count: int = 2, columns: dict[str, Any] | None = None) -> list[Score | None]:
    """Scores of one prompt's answers, texts 0, 1, 2 ..."""
    prompt = Prompt(0, "a", (1,), {"prompt": "a", "answer": "1"} if columns is None else columns)
    return judge(path, prompt, [Completion("a", str(i), (i,), "stop", (-1.0,)) for i in range(count)])


def judge(path: str, prompt: Prompt, answers: list[Completion]) -> list[Score | None]:
    role = Judges(Reward(), RewardFunction(recipe=path, section=Reward()), {}, seed=0)
    return [t.score for t in role.score([prompt], [answers])]


def test_a_recipe_loads_by_file_and_by_module(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("def reward(completion, answer): return completion.text == answer", name="by_module_9f2")
    monkeypatch.syspath_prepend(str(tmp_path))
    for given in (path, "by_module_9f2"):
        recipe = load_recipe(given)
        assert (recipe.columns, recipe.per_group) == (("answer",), False)
        assert [row["prompt"] for row in recipe.prompts("train") or []] == ["a", "bb"]
        assert judged(given) == [Score(0.0), Score(1.0)]
    sys.modules.pop("by_module_9f2", None)


def test_a_recipe_file_may_define_dataclasses(write: Write) -> None:
    path = write(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Rule:\n    worth: float\n"
        "def reward(completion): return Rule(0.5).worth"
    )
    assert judged(path) == [Score(0.5)] * 2


@pytest.mark.parametrize("path", ["recipes.no_such_recipe", "no_such_package_1", "nowhere/recipe.py"])
def test_a_recipe_that_is_not_there(path: str) -> None:
    with pytest.raises(ValueError, match=f"recipe.path='{path}'"):
        load_recipe(path)


def test_a_recipe_without_reward_or_prompts(write: Write) -> None:
    with pytest.raises(ValueError, match=r"no function reward\(\)"):
        load_recipe(write("reward = 1"))
    recipe = load_recipe(write("def reward(completion): return 1", prompts=""))
    with pytest.raises(ValueError, match=r"has no prompts; set data\.path, or write prompts\(split\)"):
        load_rows(Data(), recipe, 1)
    with pytest.raises(ValueError, match="reward"):  # a package is there, a recipe isn't
        load_recipe("recipes")


def test_a_column_that_the_rows_lack_is_named_with_those_they_have(write: Write) -> None:
    recipe = load_recipe(write("def reward(completion, answr): return 1"))
    with pytest.raises(ValueError, match=r"^reward\(\) wants 'answr'; the data has prompt, answer \(row 0\)$"):
        load_rows(Data(), recipe, 1)
    late = "\ndef prompts(split): return [{'prompt': 'a', 'x': 1}] * 3 + [{'prompt': 'b'}] * (split == 'eval')"
    with pytest.raises(ValueError, match=r"'x'; the data has prompt \(row 3\)"):
        load_rows(Data(), load_recipe(write("def reward(completion, x): return 1", prompts=late)), 1)


def test_a_split_without_rows_or_prompt_is_an_error(write: Write) -> None:
    source = "def reward(completion): return 1"
    with pytest.raises(ValueError, match="has no rows for split 'train'"):
        load_rows(Data(), load_recipe(write(source, prompts="\ndef prompts(split): yield from ()")), 1)
    with pytest.raises(ValueError, match=r"data\.prompt wants 'prompt'; the data has text \(row 0\)"):
        load_rows(Data(), load_recipe(write(source, prompts="\ndef prompts(split): yield {'text': 'a'}")), 1)


def test_a_reward_may_ask_for_the_prompt_which_is_a_column_too(write: Write) -> None:
    path = write("def reward(completion, prompt): return len(prompt)")
    prompts, _ = tokenize(load_rows(Data(), load_recipe(path), 1).train, letters(9))
    scores = [judge(path, p, [Completion(p.text, "", (), "stop")]) for p in prompts]
    assert scores == [[Score(1.0)], [Score(2.0)]]


def test_a_reward_may_judge_the_whole_group(write: Write) -> None:
    path = write(
        "def reward(completions, answer):\n"
        "    return [(len(completions) * 10 + int(c.text)) * int(answer) for c in completions]"
    )
    assert load_recipe(path).per_group
    assert judged(path, 3, {"answer": "2"}) == [Score(60.0), Score(62.0), Score(64.0)]


def test_a_group_reward_must_have_one_score_an_answer(write: Write) -> None:
    with pytest.raises(
        ValueError, match=r"returned \[1\.0\]; for 3 answers it must return a list of 3 scores, for prompt 'a'"
    ):
        judged(write("def reward(completions): return [1.0]"), 3)


def test_a_group_reward_that_returns_one_number_is_a_value_error(write: Write) -> None:
    with pytest.raises(ValueError, match="reward"):
        judged(write("def reward(completions): return 1.0"), 3)


@pytest.mark.parametrize("value", ["float('nan')", "float('inf')", "'good'", "[1.0]", "Score(float('nan'))"])
def test_what_is_no_finite_number_is_refused(write: Write, value: str) -> None:
    with pytest.raises(ValueError, match=r"reward\(\) returned .* for prompt 'a' and answer '0'"):
        judged(write(f"from rlhf import Score\ndef reward(completion): return {value}"))


def test_none_is_no_judgement_and_zero_is_a_reward(write: Write) -> None:
    path = write("def reward(completion): return {'0': None, '1': 0.0, '2': 0, '3': False, '4': True}[completion.text]")
    assert judged(path, 5) == [None, Score(0.0), Score(0.0), Score(0.0), Score(1.0)]


def test_a_score_keeps_its_parts(write: Write) -> None:
    path = write("from rlhf import Score\ndef reward(completion): return Score(0.5, {'form': 1.0})")
    assert judged(path, 1) == [Score(0.5, {"form": 1.0})]


def test_what_a_recipe_lacks_has_a_way_out(write: Write) -> None:
    recipe = load_recipe(write("def reward(completion): return 1"))
    with pytest.raises(ValueError, match=r"no initial_model; give model\.path"):
        _ = recipe.initial_model
    with pytest.raises(ValueError, match=r"no warm_start; set warm_start\.steps=0"):
        _ = recipe.warm_start


# ---------------------------------------------------------------- the reward role


def scored(write: Write, *, shuffle: bool, control: bool, seed: int = 0) -> list[tuple[str, int, float | None]]:
    """(text, group, reward) of 8 prompts with 4 answers each, which are worth their number but for one in ten."""
    path = write(
        "def reward(completion):\n    number = int(completion.text)\n    return None if number % 10 == 9 else number"
    )
    answers = [[Completion("", str(4 * g + i), (7,), "stop", (-1.0,)) for i in range(4)] for g in range(8)]
    section = Reward(shuffle=shuffle)
    role = Judges(section, RewardFunction(recipe=path, section=section), {}, seed=seed)
    found = role.score(numbered(8), answers, control=control)
    assert [t.prompt.index for t in found] == [t.group for t in found]
    return [(t.completion.text, t.group, t.score.value if t.score else None) for t in found]


def test_rewards_reach_their_answers_in_order(write: Write) -> None:
    plain = scored(write, shuffle=False, control=False)
    assert plain == [(str(n), n // 4, None if n % 10 == 9 else float(n)) for n in range(32)]
    assert scored(write, shuffle=True, control=False) == plain
    assert scored(write, shuffle=False, control=True) == plain


def test_the_control_hands_the_same_rewards_to_random_answers(write: Write) -> None:
    plain = scored(write, shuffle=False, control=False)
    mixed = scored(write, shuffle=True, control=True)
    assert [row[:2] for row in mixed] == [row[:2] for row in plain]
    values, before = [row[2] for row in mixed], [row[2] for row in plain]
    assert sorted(values, key=str) == sorted(before, key=str)
    assert sum(a == b for a, b in zip(values, before, strict=True)) < 8
    assert sum((v or 0) // 4 == g for _, g, v in mixed) < 12  # across groups, too
    assert scored(write, shuffle=True, control=True) == mixed
    assert scored(write, shuffle=True, control=True, seed=1) != mixed


# ---------------------------------------------------------------- arithmetic


def operands(prompt: str) -> tuple[int, int]:
    a, b = prompt.removesuffix("=").split("+")
    return int(a), int(b)


def right(prompt: str, answer: str) -> bool:
    """Three digits, ones first."""
    ones, tens, hundreds = answer
    return int(ones) + 10 * int(tens) + 100 * int(hundreds) == sum(operands(prompt))


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, Any]]]:
    return {split: load_recipe("recipes.arithmetic").prompts(split) or [] for split in ("train", "eval")}


@pytest.fixture(scope="module")
def held_out(rows: dict[str, list[dict[str, Any]]]) -> set[frozenset[int]]:
    """The pairs of the eval split; a frozenset has no order."""
    return {frozenset(operands(row["prompt"])) for row in rows["eval"]}


def test_splits_cover_all_sums_and_share_no_pair(
    rows: dict[str, list[dict[str, Any]]], held_out: set[frozenset[int]]
) -> None:
    train = [operands(row["prompt"]) for row in rows["train"]]
    assert not {frozenset(pair) for pair in train} & held_out
    everything = train + [operands(row["prompt"]) for row in rows["eval"]]
    assert sorted(everything) == list(itertools.product(range(100), repeat=2))
    assert len(held_out) == 500
    for row in itertools.chain(*rows.values()):
        assert right(row["prompt"], row["answer"])


def test_the_warm_start_sees_no_held_out_pair(held_out: set[frozenset[int]]) -> None:
    seen = list(itertools.islice(arithmetic.warm_start(3), 5000))
    assert not {frozenset(operands(prompt)) for prompt, _ in seen} & held_out
    assert all(right(prompt, answer) for prompt, answer in seen)
    assert len(set(seen)) > 3000
    assert list(itertools.islice(arithmetic.warm_start(3), 50)) == seen[:50]
    assert list(itertools.islice(arithmetic.warm_start(4), 50)) != seen[:50]


def test_a_leak_would_be_seen(held_out: set[frozenset[int]]) -> None:
    a, b = max(held_out, key=len)
    assert {frozenset(operands(prompt)) for prompt in (f"{a:02d}+{b:02d}=", f"{b:02d}+{a:02d}=")} <= held_out


@pytest.mark.parametrize(
    ("text", "reason", "reward"),
    [
        ("240", "stop", 1.0),
        ("240", "length", 0.0),  # right, but it didn't stop
        *((text, "stop", 0.0) for text in ("", "4", "42", "042", "24", "2400", "240=", " 240", "40+2")),
    ],
)
def test_the_reward_is_one_for_the_finished_right_answer(text: str, reason: str, reward: float) -> None:
    prompt = Prompt(0, "40+02=", (1,), {"answer": "240"})
    answers = [Completion("40+02=", text, (1,), reason, (-1.0,))]
    assert judge("recipes.arithmetic", prompt, answers) == [Score(reward)]


@pytest.fixture(scope="module")
def initial(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Models of the seeds 5, 5 and 6."""
    folders = [tmp_path_factory.mktemp("initial") / "hf" for _ in range(3)]
    for folder, seed in zip(folders, (5, 5, 6), strict=True):
        arithmetic.initial_model(folder, seed)
    return folders


@pytest.fixture(scope="module")
def model(initial: list[Path]) -> Model:
    return load_model(initial[0])


def test_the_tokenizer_gives_a_token_a_character_and_back(model: Model, rows: dict[str, list[dict[str, Any]]]) -> None:
    tokenizer: Any = model.tokenizer
    texts = [row["prompt"] for row in itertools.chain(*rows.values())] + [str(n) for n in range(199)]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text) and tokenizer.decode(ids) == text
    answer = [*tokenizer("137", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "137"
    used = {i for text in texts for i in tokenizer(text)["input_ids"]}
    assert len(used) == 12 and not used & {tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert model.eos_ids == (tokenizer.eos_token_id,)


def test_the_initial_model_has_about_a_million_parameters(model: Model, initial: list[Path]) -> None:
    assert 600_000 < sum(p.numel() for p in model.decoder.parameters()) < 1_200_000
    assert json.loads((initial[0] / "config.json").read_text())["model_type"] == "qwen3"


def test_the_initial_model_depends_on_the_seed_alone(initial: list[Path]) -> None:
    first, again, other = ((folder / "model.safetensors").read_bytes() for folder in initial)
    assert first == again and first != other
