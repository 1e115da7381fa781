"""What sampling means, in float64: distributions, what filters keep, and which token a uniform draws."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from accuracy import normal
from torch import Tensor

from kernels import SampledTokens
from kernels.reference.sampling import filter_mask

ROUNDING = 1e-6  # of the whole mass: how far a fp32 running sum may be off


@dataclass(frozen=True)
class Case:
    """Arguments of sample_tokens, but for the uniform."""

    z: Tensor
    temperature: Tensor
    top_k: Tensor | None = None
    top_p: Tensor | None = None
    min_p: Tensor | None = None
    banned: Tensor | None = None

    def arguments(self, uniform: Tensor) -> dict[str, Tensor | None]:
        return {**vars(self), "uniform": uniform}

    def rows(self, chosen: slice | list[int]) -> Case:
        return Case(**{name: None if given is None else given[chosen] for name, given in vars(self).items()})

    def logp(self) -> Tensor:
        """Of the full vocabulary, [R, V]; a greedy row's at temperature 1."""
        heat = torch.where(self.temperature > 0, self.temperature, 1.0).double()
        return torch.log_softmax(self.z.double() / heat[:, None], -1)

    def allowed(self) -> Tensor:
        """log-probs among the tokens that aren't banned."""
        if self.banned is None:
            return self.logp()
        return replace(self, z=self.z.masked_fill(self.banned, -torch.inf), banned=None).logp()

    def kept(self, slack: float = 0.0) -> Tensor:
        """What the filters keep, bool [R, V]; with slack more, or less where it is negative.

        Min-p's border is a logit, rounded: that is as much slack again as half a step of it makes.
        """
        heat = torch.where(self.temperature > 0, self.temperature, 1.0).double()
        size = torch.where(self.z.isfinite(), self.z, 0).abs().amax(-1).double()
        step = (1 + size * 2.0**-24 / heat / ROUNDING).clamp(max=1e300)
        return filter_mask(
            self.allowed(),
            self.top_k,
            None if self.top_p is None else torch.where(self.top_p < 1, self.top_p.double() + slack, 1.0),
            None if self.min_p is None else self.min_p.double() * torch.exp(-slack * step),
        )


def case_of(vocab: int, setting: tuple[bool, ...], device: torch.device, seed: int = 0) -> Case:
    """Rows of all kinds: cold, greedy and hot, filtered and not, with and without bans; one with many ties."""
    z = normal(8, vocab, seed=seed, device=device) * 2.5
    z[6] = z[6].round()
    heat = torch.tensor([0.0, 0.7, 1.0, 1.6, 1e-3, 1.0, 1.3, 1e-30])
    top_k = torch.tensor([3, 0, 1, 40, 5, 300, 20, 2])
    top_p = torch.tensor([0.5, 0.9, 1.0, 0.6, 0.9, 0.05, 0.8, 1.0])
    min_p = torch.tensor([0.1, 0.0, 0.0, 0.02, 0.5, 0.01, 1e-4, 1.0])
    banned = normal(8, vocab, seed=seed + 1, device=device) > 0.8
    banned[5] = False
    banned[:, vocab // 2] = False  # at least one is left
    banned[1] |= z[1] == z[1].max() if vocab > 1 else False
    banned[:, vocab // 2] &= vocab > 1
    given = [x.to(device) if wanted else None for x, wanted in zip((top_k, top_p, min_p, banned), setting, strict=True)]
    return Case(z, heat.to(device), *given)


def check_kept(found: Tensor, case: Case) -> None:
    """The filters' mask is the true one, but where the border is within rounding of a token."""
    fewest, most, real = case.kept(-ROUNDING), case.kept(ROUNDING), case.allowed().isfinite()
    assert not (fewest & ~found & real).any() and not (found & ~most & real).any()
    assert (found & real).any(-1).all()


def near_step(log_weight: Tensor, uniform: Tensor) -> Tensor:
    """Rows whose uniform is within rounding of a step of the CDF of log_weight (float64 [R, V], not normalised)."""
    cdf = torch.softmax(log_weight, -1).cumsum(-1)
    return ((cdf / cdf[:, -1:] - uniform.double()[:, None]).abs() <= ROUNDING).any(-1)


def check_tokens(tokens: Tensor, log_weight: Tensor, uniform: Tensor) -> None:
    """Tokens are those that the uniforms draw from the distribution, unless rounding moves one past a step of its CDF.

    log_weight float64 [R, V] need not be normalised. A token that isn't the true one must be next to it, but for tokens
    of less than the rounding; none is of probability zero.
    """
    p = torch.softmax(log_weight, -1)
    cdf = p.cumsum(-1)
    cdf = cdf / cdf[:, -1:]
    u = uniform.double()[:, None]
    true = ((cdf > u) & (p > 0)).int().argmax(-1)
    upper = cdf.gather(1, tokens[:, None])
    lower = upper - p.gather(1, tokens[:, None])
    right = tokens == true
    near = ((lower - ROUNDING <= u) & (u <= upper + ROUNDING))[:, 0]
    assert (right | near).all(), (tokens, true)
    assert (log_weight.gather(1, tokens[:, None]) > -torch.inf).all()


def check_columns(out: SampledTokens, case: Case, kept: Tensor) -> None:
    """The three log-probs of the tokens drawn and the entropy, given what the filters kept."""
    full = case.logp()
    logprob = full.gather(1, out.tokens[:, None])[:, 0]
    mass = torch.where(kept, case.allowed(), -torch.inf).logsumexp(-1)
    offered = mass if case.banned is None else mass + torch.where(case.banned, -torch.inf, full).logsumexp(-1)
    offered = torch.where(case.temperature > 0, offered, logprob)
    entropy = torch.special.entr(full.exp()).sum(-1)
    for found, true in ((out.logprobs, logprob), (out.log_kept_mass, offered), (out.entropy, entropy)):
        assert found.dtype == torch.float32
        assert (found.double() - true).abs().max() <= 2e-6 * max(1.0, true.abs().max().item())
    assert torch.equal(out.processed_logprobs, out.logprobs - out.log_kept_mass)
    assert torch.count_nonzero(out.processed_logprobs[case.temperature == 0]) == 0
