"""L-BFGS with one evaluation a step."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from gradleak.lbfgs import LBFGS


def quadratic(p: torch.Tensor, condition: float) -> torch.Tensor:
    """Half of p^T diag(1 .. condition) p."""
    return (torch.linspace(1, condition, p.numel(), dtype=p.dtype) * p.square()).sum() / 2


def minimise(p: nn.Parameter, loss, steps: int, **settings) -> list[float]:
    optimiser, losses = LBFGS([p], **settings), []

    def closure() -> torch.Tensor:
        p.grad = None
        value = loss(p)
        value.backward()
        losses.append(float(value))
        return value

    for _ in range(steps):
        optimiser.step(closure)
    return losses


def test_minimises_an_ill_conditioned_quadratic_in_few_evaluations() -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(50, dtype=torch.float64))
    losses = minimise(p, lambda q: quadratic(q, 1e3), 150, lr=1.0)
    assert len(losses) == 150, "one evaluation a step"
    assert min(losses) < 1e-8 * losses[0]


def test_no_accepted_point_is_worse_than_the_one_before_and_a_worse_one_shortens_the_step() -> None:
    p = nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))  # Rosenbrock's valley
    losses = minimise(p, lambda q: 100 * (q[1] - q[0] ** 2) ** 2 + (1 - q[0]) ** 2, 200, lr=1.0)
    assert any(b > a for a, b in itertools.pairwise(losses)), "the valley makes some steps too long"
    assert min(losses) < 1e-12


def test_a_step_is_at_most_lr_in_root_mean_square() -> None:
    p = nn.Parameter(torch.full((9,), 100.0))
    before = p.detach().clone()
    optimiser = LBFGS([p], lr=0.5)
    for _ in range(20):

        def closure() -> torch.Tensor:
            p.grad = None
            value = p.square().sum()
            value.backward()
            return value

        optimiser.step(closure)
        assert float((p.detach() - before).square().mean().sqrt()) <= 0.5 * (1 + 1e-6)
        before = p.detach().clone()


def test_goes_on_from_a_state_as_if_nothing_had_happened() -> None:
    torch.manual_seed(0)
    start = torch.randn(20, dtype=torch.float64)

    def run(p: nn.Parameter, optimiser: LBFGS, steps: int) -> None:
        for _ in range(steps):

            def closure() -> torch.Tensor:
                p.grad = None
                value = quadratic(p, 100) + p.pow(4).sum()
                value.backward()
                return value

            optimiser.step(closure)

    whole = nn.Parameter(start.clone())
    run(whole, LBFGS([whole], lr=0.1), 30)
    first = nn.Parameter(start.clone())
    optimiser = LBFGS([first], lr=0.1)
    run(first, optimiser, 13)
    second = nn.Parameter(first.detach().clone())
    resumed = LBFGS([second], lr=0.1)
    resumed.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    run(second, resumed, 17)
    assert torch.equal(whole, second)


def test_a_direction_that_never_helps_ends_in_ever_smaller_steps() -> None:
    p = nn.Parameter(torch.ones(4))
    values = iter(range(100))

    def closure() -> torch.Tensor:  # a loss that only grows, whatever the step
        p.grad = torch.ones(4)
        return torch.tensor(float(next(values)))

    optimiser = LBFGS([p], lr=1.0)
    for _ in range(60):
        optimiser.step(closure)
    assert float((p.detach() - 1).abs().max()) < 1e-3


@pytest.mark.parametrize("history", [1, 3])
def test_keeps_so_many_pairs(history: int) -> None:
    p = nn.Parameter(torch.randn(10))
    optimiser = LBFGS([p], lr=0.1, history=history)

    def closure() -> torch.Tensor:
        p.grad = None
        value = quadratic(p, 10)
        value.backward()
        return value

    for _ in range(10):
        optimiser.step(closure)
    assert len(optimiser.state[p]["s"]) == history
