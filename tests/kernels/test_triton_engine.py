"""Engine and trainer on the Triton kernels, in the interpreter or on a GPU, against the same model on plain torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from second_device import DEVICE, Visits, second_device
from torch import Tensor
from transformers import Qwen3Config

from kernels import dispatch
from kernels.device import default_device
from rlhf.config import ModelSection, Train
from rlhf.packing import pack
from rlhf.roles import frozen, reference
from rlhf.types import Completion, Prompt, Score, Trajectory
from rollout_engine import LLM, RequestOutput, SamplingParams
from rollout_engine.decode_graphs import DecodeGraphs, Recorder
from rollout_engine.models import qwen3
from rollout_engine.models.checkpoint import Model
from rollout_engine.models.context import PackedAttention
from rollout_engine.models.decoder import Decoder

VOCAB = 67
PROMPTS = [[5, 6, 7], list(range(1, 41)), [*range(1, 34), 9]]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """``use("triton")``: from now on ops go there, as by ``KERNELS``."""

    def forget() -> None:
        dispatch.forced.cache_clear()
        dispatch.implementation.cache_clear()

    def choose(kernels: str) -> None:
        monkeypatch.setenv("KERNELS", kernels)
        forget()

    yield choose
    monkeypatch.undo()
    forget()


@pytest.fixture
def visits() -> Iterator[Visits | None]:
    """What the host did with a device beside the CPU, on which mixed devices show; None on a machine with a GPU."""
    if torch.cuda.is_available():
        yield None
    else:
        with second_device() as found:
            yield found


@pytest.fixture
def device(visits: Visits | None) -> torch.device:
    return DEVICE if visits else default_device()


@pytest.fixture
def dtype() -> torch.dtype:
    return torch.float32


@pytest.fixture
def model(device: torch.device, dtype: torch.dtype) -> Model:
    hf = Qwen3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, max_position_embeddings=512,
    )  # fmt: skip
    decoder = Decoder(qwen3.decoder_config(hf), VOCAB)
    decoder.init_weights(0, std=0.1)
    return Model(decoder.to(dtype).to(device), hf, None, (0,))


def engine(model: Model, record: Recorder | None = None, **settings: object) -> LLM:
    llm = LLM(
        model, **{"kv_cache_gib": 0.002, "max_num_seqs": 16, "numerics": "fast", "cuda_graphs": False, **settings}
    )
    if record:
        llm.graphs = llm.runner.graphs = DecodeGraphs(model.decoder, llm.kv_cache, record)
    return llm


def answered(llm: LLM, prompts: list[list[int]] = PROMPTS) -> list[RequestOutput]:
    params = SamplingParams(n=2, max_tokens=4, temperature=0.9, seed=3)
    outs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)
    llm.check_integrity()
    return outs


def answers(model: Model, record: Recorder | None = None, **settings: object) -> list[RequestOutput]:
    return answered(engine(model, record, **settings))


class Launches:
    """Stands for CUDA graphs: a recording's launches are those of ``run``, made again on the same memory. And none of
    them may wait for the device or send it data, which a graph can't."""

    def __init__(self, visits: Visits | None) -> None:
        self.visits = visits
        self.forgotten = self.replayed = 0

    def forget(self) -> None:
        self.forgotten += 1

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        before = self.visits and (self.visits.waits, self.visits.uploads)
        out = run().clone()
        assert before == (self.visits and (self.visits.waits, self.visits.uploads))

        def replay() -> None:
            self.replayed += 1
            out.copy_(run())

        return replay, out


def samples(outs: list[RequestOutput]) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    return [(a.token_ids, a.policy_logprobs) for out in outs for a in out.outputs]


def trained_logprobs(model: Model, outs: list[RequestOutput], exact: bool, grad: bool = False) -> Tensor:
    """The trainer's packed forward over all answers."""
    sequences = [[*out.prompt_token_ids, *answer.token_ids] for out in outs for answer in out.outputs]
    device = model.decoder.norm.weight.device
    starts = [0, *itertools.accumulate(map(len, sequences))]
    own = [len(out.prompt_token_ids) for out in outs for _ in out.outputs]
    rows = [at + i - 1 for at, seq, n in zip(starts, sequences, own, strict=False) for i in range(n, len(seq))]
    tokens = torch.tensor(list(itertools.chain(*sequences)), device=device)
    ctx = PackedAttention.from_lengths([len(s) for s in sequences], device, exact=exact)
    index = torch.tensor(rows, device=device)
    with torch.set_grad_enabled(grad):
        return model.decoder(tokens, ctx, index, tokens[index + 1], torch.full((len(rows),), 0.9, device=device))[0]


def test_tokens_and_logprobs_are_those_of_plain_torch(model: Model, use: Callable[[str], None]) -> None:
    use("torch")
    plain = answers(model)
    use("triton")
    found = answers(model)
    # Noise of 1e-6 moves no token here unless a uniform lies that near a step: none of these does.
    for (tokens, logprobs), (wanted, truth) in zip(samples(found), samples(plain), strict=True):
        assert tokens == wanted
        assert logprobs == pytest.approx(truth, abs=1e-5)


def test_losses_and_gradients_are_those_of_plain_torch(model: Model, use: Callable[[str], None]) -> None:
    use("torch")
    outs = answers(model)
    found = {}
    for kernels in ("torch", "triton"):
        use(kernels)
        model.decoder.zero_grad()
        loss = -trained_logprobs(model, outs, exact=False, grad=True).mean()
        loss.backward()
        found[kernels] = [loss.detach(), *(p.grad.clone() for p in model.decoder.parameters() if p.grad is not None)]
    assert len(found["torch"]) > 10
    for plain, ours in zip(found["torch"], found["triton"], strict=True):
        assert (plain - ours).abs().max() <= 1e-5 * max(1.0, plain.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_engine_and_trainer_agree_bitwise(model: Model, use: Callable[[str], None]) -> None:
    """By kernels of one configuration: prompts in pieces, decoded, cached and packed."""
    use("triton")
    outs = answers(model, numerics="exact", max_batch_tokens=24)
    reported = torch.tensor([value for _, logprobs in samples(outs) for value in logprobs])
    assert torch.equal(reported, trained_logprobs(model, outs, exact=True).cpu())


def test_a_reference_scores_in_exact_what_the_engine_reports(
    model: Model, device: torch.device, use: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KL to the starting weights is 0 at the start."""
    use("triton")
    outs = answers(model, numerics="exact")
    monkeypatch.setattr(reference, "load_model", lambda *_, **__: model)
    monkeypatch.setattr(frozen, "default_device", lambda: device)
    model.decoder.set_exact(False)
    role = reference.Reference(checkpoint=tmp_path, model=ModelSection(), train=Train(lr=0), timeout_s=60, exact=True)
    trajectories = [
        Trajectory.from_completion(
            Prompt(i, "", out.prompt_token_ids),
            Completion("", "", a.token_ids, a.finish_reason, a.policy_logprobs, temperature=0.9),
            i,
            Score(0.0),
        )
        for i, out in enumerate(outs)
        for a in out.outputs
    ]
    batch = pack(trajectories)
    scored = role.score(batch)
    assert torch.equal(scored.ref_logprobs[batch.loss_mask], batch.rollout_logprobs[batch.loss_mask])


def test_recorded_decode_steps_change_nothing(model: Model, use: Callable[[str], None], visits: Visits | None) -> None:
    """Padded batches and padded work lists, filled anew for every step."""
    use("triton")
    launches = Launches(visits)
    assert samples(answers(model, launches)) == samples(answers(model))
    assert launches.replayed > 1


def test_recorded_steps_of_a_long_prompt_that_samples_share(
    model: Model, use: Callable[[str], None], visits: Visits | None
) -> None:
    """A cascade: the parts of a row, what is shared and the rest, are merged."""
    use("triton")
    prompt = [[*range(1, 67)] * 4 + [*range(9, 40)]]
    recorded = engine(model, Launches(visits))
    found = samples(answered(recorded, prompt))
    use("torch")
    for (tokens, logprobs), (wanted, truth) in zip(found, samples(answered(engine(model), prompt)), strict=True):
        assert tokens == wanted and logprobs == pytest.approx(truth, abs=1e-5)
    assert recorded.graphs is not None
    made = [work for found in recorded.graphs._recordings.values() for work in found.ctx.plans[None].prepared.values()]
    assert any(len(work.merges) for work in made)


def test_a_step_waits_for_the_device_once(model: Model, use: Callable[[str], None], visits: Visits | None) -> None:
    if visits is None:
        pytest.skip("counted on a device beside the CPU")
    use("triton")
    llm = LLM(model, kv_cache_gib=0.002, max_num_seqs=16, numerics="fast", cuda_graphs=False)
    for ids, filters in zip(PROMPTS, ({}, {"top_p": 0.9}, {"min_tokens": 2, "top_k": 5}), strict=True):
        llm.add_request({"prompt_token_ids": ids}, SamplingParams(n=2, max_tokens=4, seed=3, **filters))
    before, sent = visits.waits, visits.uploads
    while llm.step() or llm.scheduler.has_work:
        pass
    assert visits.waits - before == llm.counters.steps
    assert visits.uploads - sent <= 8 * llm.counters.steps


def test_a_recording_is_forgotten_when_a_weight_moves(model: Model, use: Callable[[str], None]) -> None:
    use("triton")
    launches = Launches(None)
    llm = LLM(model, kv_cache_gib=0.002, max_num_seqs=16, numerics="fast", cuda_graphs=False)
    graphs = llm.graphs = llm.runner.graphs = DecodeGraphs(model.decoder, llm.kv_cache, launches)
    params = SamplingParams(max_tokens=4, temperature=0.0)

    def generate() -> tuple[int, ...]:
        return llm.generate({"prompt_token_ids": PROMPTS[1]}, params)[0].outputs[0].token_ids

    before = generate()
    generate()
    assert graphs._recordings
    with torch.no_grad():
        model.decoder.norm.weight.mul_(1.0)  # in place: recordings stay
    llm.publish(1)
    assert graphs._recordings and not launches.forgotten
    norm = model.decoder.norm
    norm.weight = torch.nn.Parameter(norm.weight.detach().clone())
    llm.publish(2)
    assert not graphs._recordings and launches.forgotten == 1
    assert generate() == before
