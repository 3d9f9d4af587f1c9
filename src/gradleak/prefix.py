"""The part of F before the first weight that moves: computed once for two passes that differ in the weights behind it.

The secant evaluates F at W and at W + h r. Where r is zero up to some layer (the client sends only later layers, or the attack
matches only those), both passes agree up to there, and so do their backward passes, which are linear: one difference of
cotangents at the border goes back instead of two cotangents.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_active: ContextVar[Prefix | None] = ContextVar("prefix", default=None)


class Piece(NamedTuple):
    """A module's call: its output is cut off from its inputs, so that a backward pass stops there."""

    module: nn.Module
    inputs: tuple[Tensor, ...]
    output: Tensor
    cut: Tensor


class Prefix:
    """Records the calls of modules before any moving weight in a first pass, and repeats their outputs in later ones.

    A module belongs to the prefix if none of its parameters moves and all that it is given comes from the images through the
    prefix. Whatever else F does is computed anew, so that a prefix that is not found costs time and no digit.

    Args:
        images: The leaf from which the first pass starts.
    """

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.pieces: list[Piece] = []
        self._known = {id(images)}
        self._used = True

    @property
    def border(self) -> list[Tensor]:
        """The images and all cut outputs; a gradient with respect to them is None where the rest of F does not see them."""
        return [self.images, *(piece.cut for piece in self.pieces)]

    def __call__(self, compute: Callable[[], Tensor]) -> Tensor:
        """A pass of F: recorded, if it is the first one, else with the recorded outputs."""
        if not self._used:
            return compute()
        token = _active.set(self)
        try:
            value = compute()
        except RuntimeError as fault:
            # F changes an output of the prefix in place, which autograd refuses for one that is cut off
            if "in-place" not in str(fault):
                raise
            self.pieces.clear()
        else:
            return value
        finally:
            # nothing found: later passes need not look for it
            self._used = bool(self.pieces)
            _active.reset(token)
        return compute()

    def backward(self, cotangents: list[Tensor | None]) -> Tensor:
        """From cotangents of the :attr:`border` to that of the images. Can be called several times."""
        waiting = {id(t): c for t, c in zip(self.border, cotangents, strict=True) if c is not None}
        for piece in reversed(self.pieces):
            cotangent = waiting.pop(id(piece.cut), None)
            if cotangent is None:
                continue
            inputs = [x for x in piece.inputs if x.requires_grad]
            for x, back in zip(inputs, torch.autograd.grad(piece.output, inputs, cotangent, retain_graph=True), strict=True):
                waiting[id(x)] = back if id(x) not in waiting else waiting[id(x)] + back
        return waiting.get(id(self.images), torch.zeros_like(self.images))

    def _call(self, module: nn.Module, forward: Any, recording: bool, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if named or not all(isinstance(x, Tensor) and id(x) in self._known for x in inputs):
            return forward(*inputs, **named)
        if not recording:
            for piece in self.pieces:
                if piece.module is module and all(a is b for a, b in zip(piece.inputs, inputs, strict=True)):
                    return piece.cut
        output = forward(*inputs)
        if recording and isinstance(output, Tensor) and output.requires_grad:
            cut = output.detach().requires_grad_()
            self.pieces.append(Piece(module, inputs, output, cut))
            self._known.add(id(cut))
            return cut
        return output


@contextmanager
def sharing(model: nn.Module, moving: Collection[str]) -> Iterator[None]:
    """Let the prefix of the pass that is going on, if any, see the calls of the model's modules.

    Args:
        model: F.
        moving: Names of the parameters that differ between the passes.
    """
    prefix = _active.get()
    if prefix is None:
        yield
        return
    recording = not prefix.pieces
    with ExitStack() as stack:
        for module in _still(model, moving):
            stack.enter_context(_through(prefix, module, recording))
        yield


def _still(model: nn.Module, moving: Collection[str]) -> list[nn.Module]:
    """The largest modules without a moving parameter, below the model itself."""
    containers = {""} | {name[:k] for name in moving for k, sign in enumerate(name) if sign == "."}
    found = [
        child
        for name, module in model.named_modules(remove_duplicate=False)
        if name in containers
        for part, child in module.named_children()
        if f"{name}.{part}".lstrip(".") not in containers
    ]
    return list(dict.fromkeys(found))


@contextmanager
def _through(prefix: Prefix, module: nn.Module, recording: bool) -> Iterator[None]:
    own = vars(module).get("forward")
    forward = module.forward
    module.forward = lambda *inputs, **named: prefix._call(module, forward, recording, inputs, named)
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
