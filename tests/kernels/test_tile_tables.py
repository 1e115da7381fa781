"""Measured tiles: what a table says is what is launched, and the tuner finds the fastest and nothing that is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accuracy import assert_close_to_truth, normal
from packed import layout, naive, qkv

from kernels import AttentionKind
from kernels.bench import tune
from kernels.bench.case import Case
from kernels.triton import matmul, tables, tiles
from kernels.triton.logits import form_of
from kernels.triton.packed_attention import packed_attention
from kernels.triton.tables import Key, chosen

NARROW_AND_WIDE = (torch.bfloat16, torch.float64)
CPU = torch.device("cpu")
FORMULA = matmul.BUCKETS[16]
KEY = ("invariant_linear", "bfloat16", "16")


@pytest.fixture(autouse=True)
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[Key, dict[str, int]]]:
    """That of the CPU, which has none in truth."""
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    renew()
    yield tables.table("cpu")
    renew()


def renew() -> None:
    """As in a process that begins."""
    tables.table.cache_clear()
    tables.forget()


def test_without_a_table_the_formula_holds(table: dict[Key, dict[str, int]]) -> None:
    assert table == {} and chosen(CPU, FORMULA, *KEY) == FORMULA


def test_a_table_is_read_from_its_file(tmp_path: Path) -> None:
    tables.table("cpu")[KEY] = {"warps": 8}
    tune.save("cpu")
    renew()
    assert tables.table("cpu") == {KEY: {"warps": 8}}
    assert matmul.tile_for(16, 64, torch.bfloat16, CPU) == FORMULA._replace(warps=8)
    assert matmul.tile_for(17, 64, torch.bfloat16, CPU) == matmul.BUCKETS[32]
    assert matmul.tile_for(16, 64, torch.float16, CPU) == FORMULA


@pytest.mark.parametrize("tile", [{"k": 32}, {"warps": 3}, {"colour": 1}])
def test_a_table_may_not_say_what_is_not_a_choice(tile: dict[str, int], tmp_path: Path) -> None:
    """``k`` among it: a sum is divided alike for any number of tokens."""
    (tmp_path / "cpu.json").write_text(json.dumps({"tiles": [{"key": list(KEY), "tile": tile}]}))
    renew()
    with pytest.raises(ValueError, match=r"cpu\.json: .* for invariant_linear bfloat16 16; expected .*measure anew"):
        matmul.tile_for(16, 64, torch.bfloat16, CPU)


def test_every_op_of_the_choices_asks_and_has_their_fields() -> None:
    matmul.tile_for(16, 64, torch.bfloat16, CPU)
    tiles.attention_tiles(4, 64, torch.bfloat16, False, CPU)
    tensors = [x.requires_grad_() for x in qkv([3], [3], (1, 1), 16, torch.bfloat16)]
    packed_attention(*tensors, *layout([3], [3])).sum().backward()
    form_of(torch.empty(16, 64, dtype=torch.bfloat16))
    assert {key[0] for key in tables.asked} == set(tables.CHOICES)
    for key, formula in tables.asked.items():
        assert set(tables.CHOICES[key[0]]) <= set(formula._fields)


def test_measured_tiles_compute_the_same(table: dict[Key, dict[str, int]]) -> None:
    tensors, rest = qkv([70], [70], (2, 1), 16, torch.bfloat16), layout([70], [70])
    before = packed_attention(*tensors, *rest)
    table["packed_forward", "bfloat16", "16"] = {"queries": 64, "keys": 32}
    tables.forget()
    found = packed_attention(*tensors, *rest)
    assert not torch.equal(found, before)  # other blocks, other rounding
    plain, truth = (naive(*(x.to(dtype) for x in tensors), [70], [70], AttentionKind())[0] for dtype in NARROW_AND_WIDE)
    assert_close_to_truth(found, truth, plain)


def case_of(name: str) -> Case:
    return Case("op", name, lambda seed: (), normal, {}, normal)


def test_the_tuner_keeps_what_is_faster_and_works(table: dict[Key, dict[str, int]]) -> None:
    tried = []

    def timed(case: Case) -> float:
        """Fastest with 4 warps and 6 stages; faster still, but wrong, with tiles of 256; and too much with 256 rows."""
        tile = chosen(CPU, FORMULA._replace(warps=8), *KEY)
        tried.append(tile)
        if tile.out == 256:
            raise RuntimeError("out of resource: shared memory")
        return 1.0 - 0.3 * (tile.warps == 4) - 0.2 * (tile.stages == 6) if tile.tokens != 256 else float("inf")

    said = tune.tune(KEY, [case_of("one")], table, timed)
    assert table == {KEY: {"warps": 4, "stages": 6}}
    assert said == "invariant_linear bfloat16 16, 1 cases: warps 4, stages 6; 1000.000 -> 500.000 ms"
    assert len(set(tried)) > 8


def test_a_tile_that_harms_one_of_its_cases_is_not_taken(table: dict[Key, dict[str, int]]) -> None:
    def timed(case: Case) -> float:
        eight = chosen(CPU, FORMULA, *KEY).warps == 8
        return {"one": 0.5 if eight else 1.0, "other": 0.35 if eight else 0.3}[case.name]

    assert tune.tune(KEY, [case_of("one")], table, timed).endswith("warps 8; 1000.000 -> 500.000 ms")
    table.clear()
    said = tune.tune(KEY, [case_of("one"), case_of("other")], table, timed)
    assert table == {} and "as the formula has it" in said


def test_noise_changes_nothing(table: dict[Key, dict[str, int]]) -> None:
    times = iter([1.0, *(0.99, 1.01) * 50])

    def timed(case: Case) -> float:
        chosen(CPU, FORMULA, *KEY)
        return next(times)

    tune.tune(KEY, [case_of("one")], table, timed)
    assert table == {}


def test_a_tile_that_gives_something_else_takes_forever() -> None:
    factor = torch.ones(1)
    case = Case("op", "one", lambda seed: (normal(8),), lambda x: x * factor, {}, normal)
    timer = tune.Timer([case], CPU, 0.01)
    assert timer(case) < 1
    factor += 0.05
    assert timer(case) == float("inf")
    factor[0] = torch.nan
    assert timer(case) == float("inf")


def test_cases_by_the_tiles_they_ask_for() -> None:
    def gates(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        return normal(3, 64, dtype=torch.bfloat16), normal(8, 64, dtype=torch.bfloat16)

    ours = Case("op", "one", gates, matmul.invariant_linear, {}, normal)
    other = Case("op", "other", gates, lambda x, w: x, {}, normal)
    assert tune.by_tile([ours, other]) == {KEY: [ours]}


def test_tuning_is_refused_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        tune.main([])
    assert "tuned on a GPU" in capsys.readouterr().err
