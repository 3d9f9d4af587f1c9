"""Attacked models for small images: ResNet-18 and ResNet-20 for CIFAR, CI-Net's two convolutions, DLG's LeNet.

Each maps images B x C x H x W to logits B x num_classes. Activations are modules, so that they can be replaced, and
none works in place. Initial weights come from torch's CPU random state.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

ImageShape = tuple[int, int, int]
"""(C, H, W) of one image."""


class PadShortcut(nn.Module):
    r"""Parameter-free shortcut, option A of He et al. (2016), section 3.3.

    :math:`x \mapsto [0, x_{::2, ::2}, 0]` : B x C x H x W to B x (C + extra) x ceil(H/2) x ceil(W/2); zero channels on
    both sides.
    """

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.before, self.after = extra // 2, extra - extra // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    r"""Residual block of two 3x3 convolutions (He et al. 2016, Fig. 5 left).

    :math:`x \mapsto \sigma(N_2 C_2\, \sigma(N_1 C_1 x) + S x)` : B x inputs x H x W to
    B x outputs x ceil(H/stride) x ceil(W/stride).

    Args:
        inputs: Channels in.
        outputs: Channels out.
        stride: Of the first convolution; 1 or 2.
        projection: Where the shape changes, ``S`` is a 1x1 convolution with batch norm (option B), else
            :class:`PadShortcut` (option A).
    """

    def __init__(self, inputs: int, outputs: int, stride: int, *, projection: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.activation1, self.activation2 = nn.ReLU(), nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 and projection:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))
        elif stride != 1:
            self.shortcut = PadShortcut(outputs - inputs)

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation1(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        return self.activation2(h + self.shortcut(x))


def resnet18(*, image_shape: ImageShape, num_classes: int = 10, width: int = 64) -> nn.Module:
    """ResNet-18 as it is used on CIFAR: 11,173,962 parameters at width 64, 3 channels and 10 classes.

    Four stages of two blocks with projection shortcuts (He et al. 2016, Table 1) and a 3x3 stem of stride 1.
    """
    return _resnet(image_shape[0], num_classes, width, blocks=(2, 2, 2, 2), projection=True)


def resnet20(*, image_shape: ImageShape, num_classes: int = 10, width: int = 16) -> nn.Module:
    """ResNet-20 for CIFAR (He et al. 2016, section 4.2): 269,722 parameters at width 16, 3 channels and 10 classes.

    Three stages of three blocks with parameter-free shortcuts. Parameter names are those of the weights published by
    akamaster/pytorch_resnet_cifar10.
    """
    return _resnet(image_shape[0], num_classes, width, blocks=(3, 3, 3), projection=False)


def convnet(*, image_shape: ImageShape, num_classes: int = 10, width: int = 96) -> nn.Module:
    """Two 3x3 convolutions (strides 1 and 2) and one linear layer: the network of CI-Net's Fig. 2.

    The paper gives only the layers and the size, 0.33M parameters. Width 96 has 331,498 at 3 x 32 x 32 and 10 classes,
    and the first convolution keeps the resolution. torch's default initialisation.
    """
    channels, height, width_px = image_shape
    features = width * _ceil_half(height) * _ceil_half(width_px)
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, width, 3, padding=1),
            activation1=nn.ReLU(),
            conv2=nn.Conv2d(width, width, 3, stride=2, padding=1),
            activation2=nn.ReLU(),
            flatten=nn.Flatten(),
            linear=nn.Linear(features, num_classes),
        )
    )


def lenet(*, image_shape: ImageShape, num_classes: int = 10, width: int = 12) -> nn.Module:
    """The LeNet of Deep Leakage from Gradients (Zhu et al. 2019): four 5x5 convolutions of 12 channels, sigmoid.

    Strides 2, 2, 1, 1; every weight and bias is uniform on (-0.5, 0.5), as in the authors' code.
    """
    channels, height, width_px = image_shape
    features = width * _ceil_half(_ceil_half(height)) * _ceil_half(_ceil_half(width_px))
    body: list[nn.Module] = []
    for inputs, stride in ((channels, 2), (width, 2), (width, 1), (width, 1)):
        body += [nn.Conv2d(inputs, width, 5, stride, padding=2), nn.Sigmoid()]
    model = nn.Sequential(OrderedDict(body=nn.Sequential(*body), flatten=nn.Flatten(), fc=nn.Linear(features, num_classes)))
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return model


#: Name in a specification -> builder of ``image_shape``, ``num_classes`` and ``width``.
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "resnet18-cifar": resnet18,
    "resnet20-cifar": resnet20,
    "convnet": convnet,
    "lenet": lenet,
}


def _resnet(channels: int, num_classes: int, width: int, *, blocks: Sequence[int], projection: bool) -> nn.Module:
    """Stem, stages of widths w, 2w, 4w, ... that halve the size from the second on, global average pool, linear layer.

    Bias-free convolutions start from Kaiming's normal (fan out), batch norm from ones and zeros, as in torchvision.
    """
    layers: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(channels, width, 3, padding=1, bias=False),
        "bn1": nn.BatchNorm2d(width),
        "activation": nn.ReLU(),
    }
    inputs = outputs = width
    for stage, count in enumerate(blocks):
        outputs = width * 2**stage
        first = BasicBlock(inputs, outputs, stride=1 if stage == 0 else 2, projection=projection)
        rest = [BasicBlock(outputs, outputs, stride=1, projection=projection) for _ in range(count - 1)]
        layers[f"layer{stage + 1}"] = nn.Sequential(first, *rest)
        inputs = outputs
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "linear": nn.Linear(outputs, num_classes)}
    model = nn.Sequential(OrderedDict(layers))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def _ceil_half(pixels: int) -> int:
    return (pixels + 1) // 2
