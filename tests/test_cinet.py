"""CI-Net: every switch, every size, the widths and over-parameterisation rules, latents and seeds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradleak.cinet import CINet, block_widths, choose_channels, generator_parameters

SWITCHES: list[dict[str, Any]] = [
    {},
    {"interpolation": "linear"},
    {"normalisation": "pixel"},
    {"normalisation": "none"},
    {"activation": "relu"},
    {"activation": "silu"},
    {"activation": "gelu"},
    {"output": "sigmoid"},
    {"output_layer": "blended"},
    {"residual": True},
    {"convolutions": 1},
    {"convolutions": 3},
    {"latent": 16},
    {"channels": 12, "output_layer": "blended", "residual": True, "interpolation": "linear", "output": "sigmoid"},
]


@pytest.fixture(autouse=True)
def _one_thread(_threads: None) -> None:
    """Threads that wait for each other cost more than these small tensors."""
    torch.set_num_threads(1)


def net(seed: int = 0, **settings: Any) -> CINet:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return CINet(**{"batch": 2, "image_shape": (3, 16, 16), "channels": 8, **settings})


def images(seed: int = 0, **settings: Any) -> Tensor:
    with torch.no_grad():
        return net(seed, **settings)()


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda s: " ".join(f"{k}={v}" for k, v in s.items()) or "paper")
@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 4, 4)], ids=str)
def test_every_switch_builds_and_trains(switch: dict[str, Any], shape: tuple[int, int, int]) -> None:
    """B x C x H x W in the output's range, not constant, and a gradient at every parameter."""
    model = net(image_shape=shape, **switch)
    x = model()
    assert x.shape == (2, *shape)
    low, high = (0, 1) if switch.get("output") == "sigmoid" else (-1, 1)
    assert x.min() >= low
    assert x.max() <= high
    assert x.std() > 0.01
    x.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("height, width", [(32, 32), (64, 64), (128, 128), (256, 256), (24, 40), (33, 7), (5, 64), (3, 3)])  # noqa: PT006
@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("normalisation", ["spectral", "none"])
def test_every_size(height: int, width: int, colours: int, normalisation: str) -> None:
    x = images(image_shape=(colours, height, width), normalisation=normalisation)
    assert x.shape == (2, colours, height, width)
    assert x.isfinite().all()


@pytest.mark.parametrize("switch", SWITCHES[1:], ids=lambda s: " ".join(f"{k}={v}" for k, v in s.items()))
def test_every_switch_does_something(switch: dict[str, Any]) -> None:
    """No name is accepted and then ignored: from the same seed the images differ."""
    assert not torch.equal(images(**switch), images())


def test_nearest_repeats_pixels_and_linear_does_not() -> None:
    model = net()
    blocks = torch.rand(1, 8, 4, 4)
    assert torch.equal(model._double(blocks), blocks.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert not torch.equal(net(interpolation="linear")._double(blocks), model._double(blocks))


def test_the_defaults_are_the_papers_choices() -> None:
    """Appendix B: two spectrally normalised 3x3 convolutions a block, LeakyReLU 0.1, one 1x1 output, tanh, no skip."""
    model = net(image_shape=(3, 32, 32))
    assert len(model.blocks) == 4  # at 4, 8, 16 and 32 pixels
    assert isinstance(model.stem[0], nn.ConvTranspose2d)
    assert model.stem[0].kernel_size == (4, 4)
    assert model.z0.shape == (2, 128, 1, 1)
    for block in model.blocks:
        convolutions = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
        assert [c.kernel_size for c in convolutions] == [(3, 3), (3, 3)]
        assert all(nn.utils.parametrize.is_parametrized(c, "weight") for c in convolutions)
    slopes = [m.negative_slope for m in model.modules() if isinstance(m, nn.LeakyReLU)]
    assert slopes == [0.1] * 9
    outputs = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
    assert outputs == [model.to_rgb]
    assert isinstance(model.output, nn.Tanh)


def test_spectral_norm_is_one() -> None:
    """After enough power iterations (one a forward pass) each convolution's largest singular value is 1."""
    model = net(image_shape=(3, 8, 8))
    for _ in range(60):
        model()
    for convolution in (m for block in model.blocks for m in block.modules() if isinstance(m, nn.Conv2d)):
        assert float(torch.linalg.matrix_norm(convolution.weight.flatten(1), ord=2)) == pytest.approx(1, rel=1e-2)


def test_widths_of_the_reference_code() -> None:
    """c up to 32 pixels, c/2 at 64, c/4 at 128 and 256."""
    assert block_widths(128, 6) == [128, 128, 128, 128, 64, 32, 32]
    assert min(block_widths(8, 6)) >= 2


@pytest.mark.parametrize(("batch", "channels"), [(1, 32), (16, 32), (32, 32), (64, 64), (128, 128), (256, 128)])
def test_reference_rule_on_cifar(batch: int, channels: int) -> None:
    """The widths of the authors' code at 32 pixels (SPEC section 6); P(F) plays no part."""
    for update_size in (1, 11_173_962):
        found = choose_channels("reference", batch=batch, image_shape=(3, 32, 32), update_size=update_size)
        assert found == channels


@pytest.mark.parametrize("update_size", [1, 44_622, 11_173_962])
@pytest.mark.parametrize(
    ("shape", "sizes"), [((3, 32, 32), {}), ((3, 64, 64), {}), ((1, 24, 40), {"latent": 16, "convolutions": 1})], ids=str
)
def test_paper_rule_is_the_least_width_above_the_update(
    update_size: int, shape: tuple[int, int, int], sizes: dict[str, int]
) -> None:
    """The least multiple of 8 with P(G) > P(F), also exactly at P(F) = P(G)."""

    def parameters(channels: int) -> int:
        return generator_parameters(channels=channels, image_shape=shape, **sizes)

    def chosen(update_size: int) -> int:
        return choose_channels("paper", batch=4, image_shape=shape, update_size=update_size, **sizes)

    c = chosen(update_size)
    assert c % 8 == 0
    assert parameters(c) > update_size
    assert c == 8 or parameters(c - 8) <= update_size
    assert chosen(parameters(c)) == c + 8
    assert chosen(parameters(c) - 1) == c


def test_auto_rule_grows_with_the_batch() -> None:
    widths = [choose_channels("auto", batch=b, image_shape=(3, 32, 32), update_size=1) for b in (1, 32, 33, 64, 65, 256)]
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]


@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 128, 128), (1, 24, 40)])
@pytest.mark.parametrize("normalisation", ["spectral", "pixel", "none"])
def test_generator_parameters_counts_the_real_network(shape: tuple[int, int, int], normalisation: str) -> None:
    """P(G) whatever the batch: one theta for all images; the random state is not used."""
    state = torch.get_rng_state()
    expected = generator_parameters(channels=8, image_shape=shape)
    assert torch.equal(state, torch.get_rng_state())
    for batch in (1, 3):
        model = net(image_shape=shape, normalisation=normalisation, batch=batch)
        assert sum(p.numel() for p in model.parameters()) == expected


def test_one_latent_for_each_image() -> None:
    """Each image comes from its own fixed latent, all from one theta: exchanging latents exchanges images."""
    model = net(batch=3, normalisation="none").double()
    assert "z0" not in dict(model.named_parameters())
    x = model().detach()
    assert len(torch.unique(x.flatten(1), dim=0)) == 3
    order = torch.tensor([2, 0, 1])
    model.z0 = model.z0[order]
    torch.testing.assert_close(model(), x[order], rtol=1e-8, atol=1e-10)


def test_latents_can_have_a_seed_of_their_own() -> None:
    """It changes the latents and leaves theta, whatever torch's random state is."""
    plain, one, again, other = net(0), net(0, latent_seed=1), net(5, latent_seed=1), net(0, latent_seed=2)
    assert torch.equal(one.z0, again.z0)
    assert not torch.equal(one.z0, plain.z0)
    assert not torch.equal(one.z0, other.z0)
    for p, q, r in zip(plain.parameters(), one.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)


def test_seeds_repeat_and_differ() -> None:
    assert torch.equal(images(seed=1), images(seed=1))
    assert not torch.equal(images(seed=1), images(seed=2))
    model = net()
    with torch.no_grad():
        assert torch.allclose(model(), model(), atol=0.2)  # the latents are fixed; only power iterations move on
    plain = net(normalisation="none")
    assert torch.equal(plain(), plain())
