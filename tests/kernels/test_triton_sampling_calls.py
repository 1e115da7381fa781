"""How Triton's sampling is called: alone or among others, on rows that lie apart, wrongly, and with changing sizes."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accuracy import normal
from sampling_truth import case_of

from kernels import SampledTokens, reference
from kernels.triton.sampling import philox_uniform, sample_tokens

pytestmark = pytest.mark.usefixtures("poisoned")


def columns_equal(a: SampledTokens, b: SampledTokens) -> bool:
    return all(torch.equal(x, getattr(b, name)) for name, x in vars(a).items())


@pytest.mark.parametrize("setting", [(False,) * 4, (True,) * 4])
def test_bits_depend_neither_on_company_nor_on_the_run(setting: tuple[bool, ...], device: torch.device) -> None:
    case = case_of(1000, setting, device)
    uniform = philox_uniform(*torch.arange(24, device=device).view(3, 8))
    out = sample_tokens(**case.arguments(uniform))
    for rows in ([3], [6], [5, 1, 2], [0]):
        part = sample_tokens(**case.rows(rows).arguments(uniform[rows]))
        assert columns_equal(part, SampledTokens(*(column[rows] for column in vars(out).values())))
    one = case.rows([1])
    first = sample_tokens(**one.arguments(uniform[:1]))
    assert all(columns_equal(first, sample_tokens(**one.arguments(uniform[:1]))) for _ in range(20))


def test_rows_that_filter_or_ban_leave_their_neighbours_bits_alone(device: torch.device) -> None:
    z = normal(4, 1000, device=device)
    heat, uniform = torch.full((4,), 0.9, device=device), torch.linspace(0.05, 0.95, 4, device=device)
    plain = sample_tokens(z, heat, uniform)
    banned = torch.zeros_like(z, dtype=torch.bool)
    banned[0, plain.tokens[0]] = True
    top_k, top_p = torch.tensor([0, 5, 0, 0], device=device), torch.tensor([1.0, 1.0, 0.5, 1.0], device=device)
    mixed = sample_tokens(z, heat, uniform, top_k, top_p, torch.zeros(4, device=device), banned)
    for name, column in vars(mixed).items():
        assert torch.equal(column[3], getattr(plain, name)[3]), name
    assert mixed.tokens[0] != plain.tokens[0]
    assert (mixed.log_kept_mass[:3] < 0).all() and mixed.log_kept_mass[3] == 0


def test_rows_that_lie_apart_need_no_copy(device: torch.device) -> None:
    wide = normal(5, 700, device=device)
    case = case_of(300, (True,) * 4, device).rows([1, 2, 3, 5, 6])
    out = [
        sample_tokens(**{**case.arguments(torch.full((5,), 0.6, device=device)), "z": z})
        for z in (wide[:, 17:317], wide[:, 17:317].contiguous(), wide[:, 17:317].T.contiguous().T)
    ]
    assert columns_equal(out[0], out[1]) and columns_equal(out[0], out[2])
    assert len(sample_tokens(wide[:0], wide[:0, 0], wide[:0, 0]).tokens) == 0


def test_offsets_beyond_32_bits(device: torch.device) -> None:
    """The third row begins 2^31 entries after the first; between them is address space without memory."""
    apart, vocab = 1 << 30, 300
    if device.type == "cuda":
        far = torch.empty(2 * apart + vocab, device=device)
    else:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)  # named from 3.13 on
        far = torch.frombuffer(mmap.mmap(-1, 4 * (2 * apart + vocab), flags=flags), dtype=torch.float32)
    z = far.as_strided((3, vocab), (apart, 1)).copy_(normal(3, vocab, device=device))
    case = case_of(vocab, (True,) * 4, device).rows([1, 2, 3])
    given = case.arguments(torch.full((3,), 0.6, device=device))
    assert columns_equal(sample_tokens(**{**given, "z": z}), sample_tokens(**{**given, "z": z.contiguous()}))


def test_bad_arguments_are_named(device: torch.device) -> None:
    z, row = normal(3, 20, device=device), torch.ones(3, device=device)
    mask = torch.zeros(3, 20, dtype=torch.bool, device=device)
    for wrong, named in (
        ({"z": z[0]}, "z is"),
        ({"z": z[:, :0]}, "z is"),
        ({"temperature": row[:2]}, "temperature"),
        ({"uniform": row.double()}, "uniform"),
        ({"top_k": row}, "top_k"),
        ({"top_p": row[:, None]}, "top_p"),
        ({"min_p": row.long()}, "min_p"),
        ({"banned": mask[:, :10]}, "banned"),
        ({"banned": mask.int()}, "banned"),
    ):
        with pytest.raises(ValueError, match=f"sample_tokens: {named}.*expected"):
            sample_tokens(**{"z": z, "temperature": row, "uniform": row * 0, **wrong})
    with pytest.raises(ValueError, match=r"philox_uniform: position is torch.int32 \[3\]"):
        philox_uniform(row.long(), row.long(), row.int())


def test_float64_goes_to_plain_torch_with_a_warning(device: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    z, row = normal(8, 20, device=device).double(), torch.full((8,), 0.5, device=device)
    out = sample_tokens(z, row, row)
    assert columns_equal(out, reference.sample_tokens(z, row, row))


def test_nothing_is_compiled_anew_because_a_batch_is_larger() -> None:
    """50 random numbers of rows, and two vocabularies: at most one form of each kernel for each of these."""
    here = Path(__file__).parent
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "KERNELS")}
    environment["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parents[1])])
    code = "import shipped.sampling as s; s.count_compilations()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts == {
        "_philox_uniform_kernel": 1,
        "_sample_tiles_kernel": 2,
        "_sample_draw_kernel": 2,
        "_filter_kernel": 2,
    }
