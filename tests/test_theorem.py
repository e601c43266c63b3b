"""The theorem of the method: with on-policy samples, EM's gradient is REINFORCE's.

The policy proposes ω = (z, y2) after (x, y1) with probability p_θ(ω); the validator rewards it
with r(ω) = max(f(y2, yG) - f(y1, yG), 0) ∝ p(yG | x, y1, z, y2). The objective is the marginal
likelihood of the gold,

    L(θ) = log Σ_ω r(ω) p_θ(ω) + constant = log E_p[r] + constant.

Differentiate, and use ∇p = p ∇log p:

    ∇L = Σ_ω r(ω) p_θ(ω) ∇log p_θ(ω) / E_p[r]

Read r p / E_p[r] as the posterior q(ω) = p_θ(z, y2 | x, y1, yG): ∇L = E_q[∇log p_θ], the EM
gradient (E-step: q; M-step: weighted log-likelihood). Read the sum as it stands:
∇L = E_p[r ∇log p_θ] / E_p[r], the policy gradient of self-play with the validator as reward,
up to the positive number 1 / E_p[r], the evidence. So both climb in the same direction.

Here the policy is a real causal language model in float64, small enough to enumerate every ω.
The EM side uses the project's own weights and loss, the REINFORCE side neither.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from models.training.loop import weighted_loss
from tasks.filter import weights
from tasks.similarity.rouge import rouge_l

WORDS = ("be", "kind", "wait", "and", "restart")
CONTEXT = (0, 1, 0, 2)  # x, and y1 = "be wait"
INITIAL, GOLD = "be wait", "wait and restart and wait"
LATENTS = tuple(itertools.product(range(len(WORDS)), repeat=4))
"""Every (z, y2): one token of principle, three of refinement; their probabilities sum to 1."""


@pytest.fixture(scope="module")
def policy() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).double()


@pytest.fixture(scope="module")
def scores() -> list[float]:
    """f(y2, yG) of every (z, y2)."""
    refined = [" ".join(WORDS[t] for t in latent[1:]) for latent in LATENTS]
    return [float(s) for s in rouge_l(refined, [GOLD] * len(refined))]


def log_probabilities(policy: Any) -> torch.Tensor:
    """log p_θ(z, y2 | x, y1) of every (z, y2), from the definition."""
    ids = torch.tensor([CONTEXT + latent for latent in LATENTS])
    logp = policy(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    steps = range(len(CONTEXT), ids.shape[1])
    return torch.stack([logp[torch.arange(len(ids)), t - 1, ids[:, t]] for t in steps]).sum(0)


def gradient(policy: Any, objective: torch.Tensor) -> torch.Tensor:
    found = torch.autograd.grad(objective, list(policy.parameters()))
    return torch.cat([g.flatten() for g in found])


def em_gradient(policy: Any, scores: list[float], temperature: float) -> torch.Tensor:
    """E-step and M-step with the project's code, over all candidates, each as often as it comes.

    A candidate that is drawn with probability p and then weighted has p · weight in expectation.
    """
    initial = float(rouge_l([INITIAL], [GOLD])[0])
    share = torch.tensor(weights(scores, initial, temperature), dtype=torch.float64)
    posterior = share * log_probabilities(policy).detach().exp()
    trained = [False] * len(CONTEXT) + [True] * 4
    batch = {
        "input_ids": torch.tensor([CONTEXT + latent for latent in LATENTS]),
        "trained": torch.tensor([trained] * len(LATENTS)),
        "weight": posterior / posterior.sum(),
    }
    return -gradient(policy, weighted_loss(policy, batch))


def rewards(scores: list[float]) -> torch.Tensor:
    initial = float(rouge_l([INITIAL], [GOLD])[0])
    return (torch.tensor(scores, dtype=torch.float64) - initial).clamp(min=0.0)


def reinforce_gradient(policy: Any, scores: list[float]) -> torch.Tensor:
    """E_p[r ∇log p], the expectation over every episode."""
    logp, reward = log_probabilities(policy), rewards(scores)
    return gradient(policy, (logp.detach().exp() * reward * logp).sum())


def test_the_toy_is_a_distribution_with_better_and_worse_refinements(
    policy: Any, scores: list[float]
) -> None:
    assert log_probabilities(policy).exp().sum().item() == pytest.approx(1.0, abs=1e-12)
    better = (rewards(scores) > 0).double().mean().item()
    assert 0.05 < better < 0.95


def test_the_em_gradient_is_the_reinforce_gradient(policy: Any, scores: list[float]) -> None:
    em = em_gradient(policy, scores, temperature=1.0)
    evidence = (log_probabilities(policy).exp() * rewards(scores)).sum().item()
    reinforce = reinforce_gradient(policy, scores) / evidence
    assert em.norm() > 0.1
    torch.testing.assert_close(em, reinforce, atol=1e-6, rtol=0)


def test_both_climb_the_marginal_likelihood(policy: Any, scores: list[float]) -> None:
    marginal = (log_probabilities(policy).exp() * rewards(scores)).sum().log()
    climb = gradient(policy, marginal)
    torch.testing.assert_close(em_gradient(policy, scores, 1.0), climb, atol=1e-6, rtol=0)


def test_hard_em_is_another_gradient(policy: Any, scores: list[float]) -> None:
    """Below τ = 1 the weights sharpen: what the theorem says holds at τ = 1 only."""
    soft, hard = (em_gradient(policy, scores, t) for t in (1.0, 0.2))
    assert (soft - hard).abs().max() > 1e-3
