"""DCGAN: a generator of images that can be trained on public ones, as surrogate data for an attack.

A. Radford, L. Metz and S. Chintala, "Unsupervised Representation Learning with Deep Convolutional Generative Adversarial
Networks", ICLR 2016.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from gradleak.cinet import SigmoidOutput
from gradleak.errors import DataError, DivergedError, ModelError
from gradleak.files import parse_json
from gradleak.tensors import check_state, read_tensors, write_tensors

FORMAT = "gradleak-generator"
VERSION = 1
#: Largest number of pixels, channels or latents that a file may name.
MAX_SIZE = 100_000

log = logging.getLogger(__name__)


class Generator(nn.Module):
    r""":math:`G: z \mapsto x`, a latent to an image in [0, 1]  (Radford et al. 2016, Fig. 1).

    A transposed convolution turns z into 4x4 maps; each further one, 4x4 of stride 2, doubles the size and halves the
    channels, down to ``width`` before the last one. Batch norm and ReLU follow all but the last, which ends in
    :math:`(1 + \tanh a) / 2`. Sizes other than 4 * 2^k are made larger than needed and cropped at the centre. Weights start
    from N(0, 0.02^2), from torch's global random state.

    Args:
        image_shape: (C, H, W), H and W at least 8.
        latent: Length of z ~ N(0, 1).
        width: Channels before the last layer.

    Shapes:
        N x latent -> N x C x H x W.
    """

    def __init__(self, *, image_shape: tuple[int, int, int], latent: int = 100, width: int = 64) -> None:
        super().__init__()
        colours, height, pixels = image_shape
        self.image_shape, self.latent, self.width = image_shape, latent, width
        doublings = max(1, math.ceil(math.log2(max(height, pixels) / 4)))
        stem = (math.ceil(height / 2**doublings), math.ceil(pixels / 2**doublings))
        channels = [width * 2**k for k in reversed(range(doublings))]
        layers: list[nn.Module] = [nn.ConvTranspose2d(latent, channels[0], stem, bias=False)]
        for inputs, outputs in itertools.pairwise(channels):
            layers += [nn.BatchNorm2d(inputs), nn.ReLU(), nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=False)]
        layers += [nn.BatchNorm2d(width), nn.ReLU(), nn.ConvTranspose2d(width, colours, 4, 2, 1), SigmoidOutput()]
        self.body = nn.Sequential(*layers)
        _initialise(self)

    def forward(self, z: Tensor) -> Tensor:
        images: Tensor = self.body(z[:, :, None, None])
        _, height, width = self.image_shape
        top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
        return images[:, :, top : top + height, left : left + width]

    def save(self, path: Path) -> None:
        """Write weights and sizes to a safetensors file."""
        sizes = {"image_shape": list(self.image_shape), "latent": self.latent, "width": self.width}
        header = {"format": FORMAT, "version": str(VERSION), "generator": json.dumps(sizes)}
        write_tensors(path, self.state_dict(), header)

    @staticmethod
    def load(path: Path) -> Generator:
        """Read what :meth:`save` wrote, in eval mode; nothing in the file is executed.

        Raises:
            ModelError: No such file, not a generator file, or damaged; names the file and the fault.
        """
        tensors, metadata = read_tensors(path, error=ModelError)
        if metadata.get("format") != FORMAT or metadata.get("version") != str(VERSION):
            found = f"format {metadata.get('format')!r}, version {metadata.get('version')!r}"
            raise ModelError(f"{path}: {found}; expected {FORMAT!r}, {str(VERSION)!r}, as `gradleak train-generator` writes it")
        try:
            sizes = parse_json(metadata["generator"], where=f"{path}: the generator's sizes", error=ModelError)
            colours, height, pixels, latent, width = (
                _size(n) for n in (*sizes["image_shape"], sizes["latent"], sizes["width"])
            )
            # on the meta device: a header cannot ask for memory, only the tensors in the file take any
            with torch.device("meta"):
                generator = Generator(image_shape=(colours, height, pixels), latent=latent, width=width)
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as fault:
            raise ModelError(f"{path}: the generator's sizes in the header are not valid: {fault}") from None
        state = generator.state_dict()
        check_state(tensors, {name: tensor.shape for name, tensor in state.items()}, where=str(path), error=ModelError)
        generator.load_state_dict({name: tensors[name].to(like.dtype) for name, like in state.items()}, assign=True)
        return generator.eval()


def discriminator(*, image_shape: tuple[int, int, int], width: int = 64) -> nn.Sequential:
    """The critic of :class:`Generator`: 4x4 convolutions of stride 2 down to about 4x4 pixels, then one logit per image.

    Batch norm after all but the first, LeakyReLU of slope 0.2 (Radford et al. 2016, section 3). Images in [0, 1].

    Args:
        image_shape: (C, H, W), H and W at least 8.
        width: Channels after the first convolution; each further one doubles them.
    """
    colours, height, pixels = image_shape
    halvings = max(1, int(math.log2(min(height, pixels) / 4)))
    layers: list[nn.Module] = [nn.Conv2d(colours, width, 4, 2, 1), nn.LeakyReLU(0.2)]
    for k in range(1, halvings):
        inputs, outputs = width * 2 ** (k - 1), width * 2**k
        layers += [nn.Conv2d(inputs, outputs, 4, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2)]
    features = width * 2 ** (halvings - 1) * (height >> halvings) * (pixels >> halvings)
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 1))
    _initialise(network)
    return network


def train(
    images: Tensor,
    *,
    rounds: int = 5000,
    seed: int = 0,
    latent: int = 100,
    width: int = 64,
    batch: int = 64,
    learning_rate: float = 2e-4,
    device: torch.device | str = "cpu",
) -> Generator:
    r"""Train a generator on public images by the non-saturating game, Adam with betas (0.5, 0.999)  (Radford et al. 2016).

    .. math:: \min_D -\log D(x) - \log(1 - D(G(z))), \qquad \min_G -\log D(G(z)), \qquad z \sim N(0, 1).

    One step of each a round. Images must not be the client's: a generator is surrogate data.

    Args:
        images: N x C x H x W, in [0, 1], N at least 2, H and W at least 8.
        rounds: Number of steps.
        seed: Makes a training repeatable on one machine with one number of threads.
        latent: Length of z.
        width: Channels of the widest maps of both networks.
        batch: Images a step; at most N are taken.
        learning_rate: Of both networks.
        device: Where to train.

    Returns:
        The generator, in eval mode, on the CPU.

    Raises:
        DataError: Images are too few, too small, or not in [0, 1].
        DivergedError: A loss is not finite.
    """
    if images.ndim != 4 or len(images) < 2 or min(images.shape[2:]) < 8 or not images.is_floating_point():
        raise DataError(
            f"training a generator needs at least 2 float images (N, C, H, W) of 8 pixels or more, "
            f"found {images.dtype} {tuple(images.shape)}"
        )
    if not (images.min() >= 0 and images.max() <= 1):  # NaN fails it too
        raise DataError(f"training images must be in [0, 1], found [{float(images.min())}, {float(images.max())}]")
    device = torch.device(device)
    shape = (images.shape[1], images.shape[2], images.shape[3])
    images, batch = images.to(device), min(batch, len(images))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        generator = Generator(image_shape=shape, latent=latent, width=width).to(device)
        critic = discriminator(image_shape=shape, width=width).to(device)
        optimisers = [torch.optim.Adam(net.parameters(), lr=learning_rate, betas=(0.5, 0.999)) for net in (critic, generator)]
        for t in range(1, rounds + 1):
            real = images[torch.randint(len(images), (batch,), device=device)]
            fake = generator(torch.randn(batch, latent, device=device))
            told_real, told_fake = critic(real), critic(fake.detach())
            critic_loss = _game(told_real, 1.0) + _game(told_fake, 0.0)
            _step(optimisers[0], critic_loss)
            generator_loss = _game(critic(fake), 1.0)
            _step(optimisers[1], generator_loss)
            losses = float(critic_loss.detach()), float(generator_loss.detach())
            if not math.isfinite(sum(losses)):
                raise DivergedError(f"training the generator diverged in round {t}; lower its learning rate ({learning_rate})")
            if t % max(1, rounds // 10) == 0:
                log.info("round %d/%d: critic %.3f, generator %.3f", t, rounds, *losses)
    return generator.cpu().eval()


def _size(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MAX_SIZE:
        raise ValueError(f"found {value!r}, expected a number from 1 to {MAX_SIZE}")
    return value


def _game(logits: Tensor, target: float) -> Tensor:
    return binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def _step(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


def _initialise(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.normal_(module.weight, 0, 0.02)
