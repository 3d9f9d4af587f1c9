"""Momentum with singular values of one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gradleak.attacks import attack
from gradleak.muon import Muon, orthogonal

SHAPES = [(6, 6), (8, 30), (30, 8), (1, 7), (16, 1)]


def gives(parameter: nn.Parameter, gradient: Tensor) -> Callable[[], float]:
    """A closure that evaluates to this gradient."""

    def closure() -> float:
        parameter.grad = gradient.clone()
        return 1.0

    return closure


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_singular_values_become_about_one_and_singular_vectors_stay(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    found = orthogonal(matrix)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6
    assert values.max() < 1.25
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    core = u.T @ found @ vh.T
    torch.testing.assert_close(core, core.diagonal().diag(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_the_size_of_a_gradient_does_not_matter(scale: float) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(5, 9, dtype=torch.float64)
    torch.testing.assert_close(orthogonal(scale * matrix), orthogonal(matrix))
    assert not orthogonal(0 * matrix).any()


def test_nothing_moves_without_a_gradient() -> None:
    weight = nn.Parameter(torch.ones(3, 4))
    Muon([weight], lr=1.0).step(gives(weight, torch.zeros(3, 4)))
    assert torch.equal(weight, torch.ones(3, 4))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)], ids=str)
def test_on_matrices_it_is_that_of_torch_with_normalised_gradients(shape: tuple[int, int]) -> None:
    """Which iterates in bfloat16."""
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(shape))
    theirs = nn.Parameter(ours.detach().clone())
    start = ours.detach().clone()
    one = Muon([ours], lr=0.05, momentum=0.9)
    other = torch.optim.Muon([theirs], lr=0.05, momentum=0.9, nesterov=False, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    for scale in (1.0, 1e-3, 1e2, 1e-8, 1.0):
        gradient = scale * torch.randn(shape)
        theirs.grad = gradient / gradient.norm()
        assert one.step(gives(ours, gradient)) == 1.0
        other.step()
    assert (ours - theirs).norm() < 0.02 * (ours - start).norm()


def test_a_kernel_is_a_matrix_with_a_row_for_each_output() -> None:
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(6, 4, 3, 3, dtype=torch.float64))
    matrix = nn.Parameter(kernel.detach().flatten(1))
    gradient = torch.randn_like(kernel)
    Muon([kernel], lr=0.1).step(gives(kernel, gradient))
    Muon([matrix], lr=0.1).step(gives(matrix, gradient.flatten(1)))
    torch.testing.assert_close(kernel.flatten(1), matrix)


def test_vectors_are_stepped_as_by_adam_on_signs() -> None:
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(50, dtype=torch.float64))
    theirs = nn.Parameter(ours.detach().clone())
    one, other = Muon([ours], lr=0.01, momentum=0.9), torch.optim.Adam([theirs], lr=0.01)
    for _ in range(7):
        gradient = torch.randn(50, dtype=torch.float64)
        theirs.grad = gradient.sign()
        one.step(gives(ours, gradient))
        other.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


def test_it_is_fed_gradients_and_not_their_signs() -> None:
    generator = nn.Sequential(nn.Conv2d(3, 3, 3))
    phases = attack("cinet", pixel_share=0.0).phases(generator)
    assert [type(phase.optimiser) for phase in phases] == [Muon]
    assert not phases[0].signed
    assert attack("cinet", optimiser="adam", pixel_share=0.0).phases(generator)[0].signed
