r"""One attack over several processes: each has some images of the batch, and all of them the same parameters.

With mean losses over shards of the batch, :math:`A(x, y) = \sum_r \frac{B_r}{B} A(x_r, y_r)`: an update is one sum over the
processes, and so is the gradient of an image model's parameters. What couples the images is batch norm: :func:`batch_norm`
takes its statistics over all processes. Every process then takes the same step, and the result is that of one process.

Processes are started by ``torchrun``, and :func:`processes` joins them. Without it all functions here are those of one process.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from gradleak import errors
from gradleak.errors import GradleakError, SpecError
from gradleak.observation import Update
from gradleak.protocols import ClientOperator, FedSGD, JointTranspose
from gradleak.shared_memory import SharedMemory
from gradleak.vjp import Engine, Transpose, exact

T = TypeVar("T")

#: A sum over the processes takes tensors with so many numbers as they are, and smaller ones together: a copy costs more than
#: another collective operation.
ALONE = 2**16

#: How long a process waits for what the first one does alone: evaluation can take long.
PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class Processes:
    """The processes of this run.

    Attributes:
        rank: Of this one, from 0.
        world: How many there are.
        neighbours: How many of them are on this machine.
        store: Names and values that all of them see.
        memory: What they share, if they do: all on this machine, on CPUs.
    """

    rank: int
    world: int
    neighbours: int
    store: dist.Store
    memory: SharedMemory | None = None
    _steps: Iterator[int] = field(default_factory=itertools.count)

    def says_first(self, text: str) -> bool:
        """Whether no other process has said the same: a fault that all of them find is told once."""
        try:
            return self.store.add(f"said/{hashlib.sha256(text.encode()).hexdigest()}", 1) == 1
        except dist.DistError:  # the process that keeps the store has ended
            return True

    def lost(self, fault: RuntimeError) -> bool:
        """Whether an error says that another process ended."""
        return isinstance(fault, dist.DistError) or any(name in str(fault) for name in ("gloo", "NCCL", "Connection closed"))


_joined: Processes | None = None


@contextmanager
def processes() -> Iterator[Processes]:
    """Join the processes that ``torchrun`` started, by its environment variables, and leave them at the end.

    Tensors of CUDA devices go through NCCL, all others through gloo; each process of a machine has a GPU of its own.

    Raises:
        SpecError: The environment does not say which of the processes this is.
    """
    global _joined
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise SpecError(f"WORLD_SIZE asks for several processes, and {missing[0]} is not set: start them with torchrun")
    store, rank, world = next(dist.rendezvous("env://"))
    store.set_timeout(PATIENCE)
    cuda = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", rank))
    if cuda:
        torch.cuda.set_device(local % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=rank, world_size=world)
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    own = dist.PrefixStore("gradleak", store)
    memory = _shared_memory(rank, world, own) if neighbours == world and not cuda else None
    _joined = Processes(rank, world, neighbours, own, memory)
    try:
        yield _joined
    finally:
        _joined = None
        if memory is not None:
            memory.close()
        dist.destroy_process_group()


def _shared_memory(rank: int, world: int, store: dist.Store) -> SharedMemory | None:
    """What the processes share, or None in all of them where one cannot."""
    found = None
    with suppress(OSError):
        found = SharedMemory(rank=rank, world=world, tell=store.set, ask=lambda name: store.get(name).decode())
    shared = torch.tensor(found is not None, dtype=torch.int32)
    dist.all_reduce(shared, dist.ReduceOp.MIN)
    return found if shared else None


def leads() -> bool:
    """Whether this process is the first: the one that prints, writes and evaluates."""
    return _joined is None or _joined.rank == 0


def count() -> int:
    """How many processes work together."""
    return 1 if _joined is None else _joined.world


def first(task: Callable[[], T]) -> T:
    """What the first process's ``task()`` gives, in every process; the others do not call it.

    Args:
        task: Gives what JSON can hold.

    Raises:
        GradleakError: The one that ``task`` raised, in every process.
    """
    if _joined is None:
        return task()
    key = f"step/{next(_joined._steps)}"
    if _joined.rank > 0:
        said = json.loads(_joined.store.get(key))
        if "error" in said:
            raise getattr(errors, said["error"])(said["message"])
        found: T = said["found"]
        return found
    try:
        found = task()
    except GradleakError as fault:
        _joined.store.set(key, json.dumps({"error": type(fault).__name__, "message": str(fault)}))
        raise
    _joined.store.set(key, json.dumps({"found": found}))
    return found


def of_first(update: Update) -> Update:
    """The first process's tensors in every process, to the last bit: what is decided by them is then the same everywhere."""
    if _joined is None:
        return update
    whole = torch.cat([t.flatten() for t in update.values()])
    dist.broadcast(whole, src=0)
    return {name: t.to(update[name]) for name, t in zip(update, _like(whole, list(update.values())), strict=True)}


class Shard:
    """The images of a batch that this process computes with: all of them. :class:`Part` has some.

    Attributes:
        rank, world, neighbours: As of :class:`Processes`.
        rows: Which images of the batch.
        share: :math:`B_r / B`.
    """

    rank, world, neighbours = 0, 1, 1
    rows = slice(None)
    share = 1.0

    def client(self, client: ClientOperator) -> ClientOperator:
        """The operator that takes these images, or the whole batch, and gives the update of the whole batch."""
        return client

    def own(self, image_model: nn.Module) -> nn.Module:
        """The image model, which from now on makes these images only."""
        return image_model

    def synchronised(self) -> AbstractContextManager[object]:
        """Inside, batch statistics are those of the whole batch."""
        return nullcontext()

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Sums over the processes, in place."""

    def own_of(self, tensors: Update) -> list[str]:
        """The names of those that this process works on; each has about as many numbers."""
        return list(tensors)

    def collect(self, own: Update, like: Update) -> Update:
        """All that the processes made, in each: of the names, shapes and order of ``like``.

        Args:
            own: What this one made (:meth:`own_of`).
            like: The tensors that were divided among them.
        """
        return own

    def dot(self, a: Tensor, b: Tensor) -> float:
        r""":math:`\langle a, b \rangle` of something that every process has for its images."""
        return float((a * b).sum())

    def norm(self, tensor: Tensor) -> float:
        """Euclidean norm of something that every process has for its images."""
        return float(tensor.norm())

    def gather(self, images: Tensor) -> Tensor:
        """The whole batch, in every process, from each one's images."""
        return images

    def least(self, number: float) -> float:
        """The least of the processes' numbers."""
        return number

    def same(self, number: float) -> float:
        """The first process's number."""
        return number

    def agree(self, *, stop: str, due: bool) -> tuple[str, bool]:
        """The signal that any process was sent (its name, or an empty text), and what the first one holds to be due."""
        return stop, due

    def any(self, there: bool) -> bool:
        """Whether it is so in any process."""
        return there


#: The shard of one process.
WHOLE = Shard()


class Part(Shard):
    """Some images of a batch: B / world of them, in the first B mod world processes one more.

    Args:
        group: The processes.
        batch: B.

    Raises:
        SpecError: There are fewer images than processes.
    """

    def __init__(self, group: Processes, batch: int) -> None:
        if batch < group.world:
            raise SpecError(
                f"data.batch: {batch} image{'s' * (batch > 1)} for {group.world} processes, and each needs one at least; start "
                f"no more than {batch}: torchrun --nproc-per-node {batch}"
            )
        self.rank, self.world, self.neighbours = group.rank, group.world, group.neighbours
        self.batch = batch
        self.counts = [batch // group.world + (r < batch % group.world) for r in range(group.world)]
        start = sum(self.counts[: self.rank])
        self.rows = slice(start, start + self.counts[self.rank])
        self.share = self.counts[self.rank] / batch

    @functools.cache  # noqa: B019 (a few tensors, one for each device)
    def shares(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Of all processes, world x 1."""
        return torch.tensor(self.counts, device=device, dtype=dtype)[:, None] / self.batch

    def client(self, client: ClientOperator) -> ClientOperator:
        if type(client) is not FedSGD:
            raise SpecError(
                "several processes attack FedSGD clients without defence or transport, and this client is another; use one "
                "process"
            )
        return ShardedFedSGD(client, self)

    def own(self, image_model: nn.Module) -> nn.Module:
        for module in image_model.modules():
            if hasattr(module, "rows"):
                module.rows = self.rows  # type: ignore[assignment]
        return image_model

    def synchronised(self) -> AbstractContextManager[object]:
        return _Synchronised(self)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        small = []
        for t in tensors:
            if t.numel() < ALONE:
                small.append(t)
                continue
            whole = t.contiguous()
            _all_reduce(whole)
            if whole is not t:
                t.copy_(whole)
        if small:
            whole = torch.cat([t.flatten() for t in small])
            _all_reduce(whole)
            torch._foreach_copy_(small, _like(whole, small))

    def own_of(self, tensors: Update) -> list[str]:
        return self._divided(tensors)[self.rank]

    def _divided(self, tensors: Update) -> list[list[str]]:
        """The names of each process's: the largest first, to the one that has the least so far."""
        loads = [0] * self.world
        found: list[list[str]] = [[] for _ in loads]
        for name in sorted(tensors, key=lambda name: -tensors[name].numel()):
            least = loads.index(min(loads))
            loads[least] += tensors[name].numel()
            found[least].append(name)
        return found

    def collect(self, own: Update, like: Update) -> Update:
        names, some = self._divided(like), next(iter(like.values()))
        parts = [some.new_empty(sum(like[name].numel() for name in of_one)) for of_one in names]
        if own:
            torch.cat([own[name].flatten() for name in names[self.rank]], out=parts[self.rank])
        _exchange(parts, self.rank)
        found: Update = {}
        for of_one, part in zip(names, parts, strict=True):
            found |= zip(of_one, _like(part, [like[name] for name in of_one]), strict=True)
        return {name: found[name] for name in like}

    def dot(self, a: Tensor, b: Tensor) -> float:
        return float(_sum((a * b).sum()))

    def norm(self, tensor: Tensor) -> float:
        return math.sqrt(self.dot(tensor, tensor))

    def gather(self, images: Tensor) -> Tensor:
        if images.numel() == 0:
            return images
        whole = images.new_zeros(self.batch, *images.shape[1:])
        whole[self.rows] = images
        _all_reduce(whole)
        return whole

    def least(self, number: float) -> float:
        return self._number(number, dist.ReduceOp.MIN)

    def same(self, number: float) -> float:
        told = torch.tensor(number, dtype=torch.float64)
        dist.broadcast(told, src=0)
        return float(told)

    def agree(self, *, stop: str, due: bool) -> tuple[str, bool]:
        flags = torch.tensor([signal.Signals[stop] if stop else 0, due and self.rank == 0])
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        number, save = flags.tolist()
        return signal.Signals(number).name if number else "", bool(save)

    def any(self, there: bool) -> bool:
        return self._number(float(there), dist.ReduceOp.MAX) > 0

    @staticmethod
    def _number(number: float, operation: Any) -> float:
        told = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(told, operation)
        return float(told)


def shard(batch: int, device: torch.device) -> Shard:
    """This process's share of a batch: :data:`WHOLE`, or a :class:`Part` inside :func:`processes`.

    Raises:
        SpecError: There are fewer images than processes, fewer GPUs than processes on a machine, or the device is neither.
    """
    if _joined is None:
        return WHOLE
    if device.type not in ("cpu", "cuda"):
        raise SpecError(f"device: several processes work on cpu and cuda, not on {device.type}")
    if device.type == "cuda" and _joined.neighbours > torch.cuda.device_count():
        raise SpecError(
            f"device: {_joined.neighbours} processes on a machine with {torch.cuda.device_count()} GPUs, and each needs one of "
            "its own; start fewer with --nproc-per-node, or set device=cpu"
        )
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        raise SpecError(f"device: {device} is one GPU, and each process takes one of its own; set device=cuda")
    return Part(_joined, batch)


class ShardedFedSGD(FedSGD):
    r"""A client of FedSGD whose images are in several processes: :math:`A(x, y) = \sum_r \frac{B_r}{B} A(x_r, y_r)`.

    Takes this process's images, or the whole batch, of which it takes its own; labels are always those of the whole batch.
    Updates are those of the whole batch, cotangents those of this process's images.

    Args:
        client: The client in one process; weights and model are shared with it.
        part: This process's images.
    """

    def __init__(self, client: FedSGD, part: Part) -> None:
        vars(self).update(vars(client))
        self.part = part

    def last(self, share: float) -> FedSGD:
        found = super().last(share)
        return self if found is self else ShardedFedSGD(found, self.part)

    @property
    def can_split(self) -> bool:
        return False  # processes with other numbers of pieces would wait for each other

    def in_pieces(self, size: int | None) -> None:
        ClientOperator.in_pieces(self, size)

    def held_images(self, batch: int) -> int:
        return max(self.part.counts)

    def loss(self, weights: Any, images: Tensor, labels: Tensor) -> Tensor:
        """This process's term of L: the sum of all is L of the whole batch."""
        with self.part.synchronised():
            return self.part.share * super().loss(weights, images, labels)

    def __call__(self, images: Tensor, labels: Tensor) -> Update:
        return self._sum(self.gradient(self.weights, *self._own(images, labels)))

    def vjp(self, images: Tensor, labels: Tensor, *, engine: Engine = exact) -> tuple[Update, Transpose]:
        update, transpose = self._vjp(*self._own(images, labels), engine)
        return self._sum(update), transpose

    def joint_vjp(self, images: Tensor, labels: Tensor, *, engine: Engine = exact) -> tuple[Update, JointTranspose]:
        update, transpose = self._joint_vjp(*self._own(images, labels), engine)

        def padded(cotangent: Update) -> tuple[Tensor, Tensor]:
            to_images, own = transpose(cotangent)
            to_labels = torch.zeros_like(labels)
            to_labels[self.part.rows] = own
            return to_images, to_labels

        return self._sum(update), padded

    def _own(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.part.rows
        return images[rows] if len(images) == self.part.batch else images, labels[rows]

    def _sum(self, update: Update) -> Update:
        update = {name: t.detach() for name, t in update.items()}
        self.part.sum_(list(update.values()))
        return update


class _Synchronised(TorchFunctionMode):
    """Every batch norm in train mode is :func:`batch_norm`, whatever module calls it."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.part = part

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func is F.batch_norm:
            return self._functional(*args, **given)
        if func is torch.batch_norm:
            return self._native(*args, **given)
        return func(*args, **given)

    def _functional(
        self,
        x: Tensor,
        mean: Tensor | None,
        variance: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return F.batch_norm(x, mean, variance, weight, bias, False, momentum, eps)
        return batch_norm(x, weight, bias, eps=eps, part=self.part)  # running statistics are never looked at: not updated

    def _native(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        variance: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        cudnn: bool,
    ) -> Tensor:
        return self._functional(x, mean, variance, weight, bias, training, momentum, eps)


def batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float, part: Part) -> Tensor:
    r"""Batch norm in train mode with the statistics of the images of all processes; twice differentiable.

    .. math:: y = w\, \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + b, \qquad
        \mu = \sum_r \tfrac{B_r}{B} \mu_r, \quad \sigma^2 = \sum_r \tfrac{B_r}{B} \big(\sigma_r^2 + (\mu_r - \mu)^2\big)

    (Chan, Golub and LeVeque 1983). Forward and backward take one collective operation each, double backward three more.
    Derivatives are those of the sum of what the processes compute from y; those of w and b are this process's terms.

    Args:
        x: B_r x C x ..., this process's images; of equal size in all processes.
        weight, bias: C, or None.
        eps: epsilon.
        part: This process's part of the batch.
    """
    y: Tensor = _BatchNorm.apply(x, weight, bias, eps, part)
    return y


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, part: Part) -> Tensor:
        mean = x.mean(_but_channels(x))
        variance = (x - _channels(mean, x)).square_().mean(_but_channels(x))  # torch.var_mean takes thirty times as long
        own = torch.stack([mean, variance])
        means, variances = _all_gather(own, part.world).unbind(1)
        shares = part.shares(own.device, own.dtype)
        mean = (shares * means).sum(0)
        variance = (shares * (variances + (means - mean).square())).sum(0)
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps, ctx.number = eps, x.numel() / x.shape[1] / part.share
        # in eval mode: torch's kernel, with statistics that are given
        y: Tensor = torch.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, eps)[0]
        return y

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance = ctx.saved_tensors
        dy = cotangents[0].contiguous()
        if torch.is_grad_enabled():  # create_graph: a second derivative is to follow
            found = _differentiable_backward(x, weight, dy, eps=ctx.eps, number=ctx.number)
        else:
            mask = [True, True, True]
            dx, dw, db = torch.ops.aten.native_batch_norm_backward(
                dy, x, weight, mean, variance, None, None, False, ctx.eps, mask
            )
            if weight is None:  # torch's kernel then gives neither
                dw, db = _sums(dy, x, mean, variance, eps=ctx.eps)
            # dx so far holds the statistics fixed; what they change is affine in x
            sum_dyx, sum_dy = _sum(torch.stack([dw, db])) / ctx.number
            scale = torch.rsqrt(variance + ctx.eps)
            slope = scale.square() * sum_dyx
            offset = scale * sum_dy - slope * mean
            if weight is not None:
                slope, offset = slope * weight, offset * weight
            dx = dx.addcmul_(x, _channels(slope, x), value=-1).sub_(_channels(offset, x))
            found = dx, dw, db
        return (*(g if needed else None for g, needed in zip(found, ctx.needs_input_grad, strict=False)), None, None)


def _differentiable_backward(
    x: Tensor, weight: Tensor | None, dy: Tensor, *, eps: float, number: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The derivatives of batch norm, as operations that have derivatives themselves, with respect to x, w and dy."""

    def mean(t: Tensor) -> Tensor:
        return _channels(_sum(t.sum(_but_channels(x))) / number, x)

    centred = x - mean(x)
    scale = torch.rsqrt(mean(centred.square()) + eps)
    normal = centred * scale
    dw, db = (dy * normal).sum(_but_channels(x)), dy.sum(_but_channels(x))
    means = _sum(torch.stack([dw, db])) / number
    dx = scale * (dy - normal * _channels(means[0], x) - _channels(means[1], x))
    return dx if weight is None else dx * _channels(weight, x), dw, db


def _sums(dy: Tensor, x: Tensor, mean: Tensor, variance: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    db = dy.sum(_but_channels(x))
    return ((dy * x).sum(_but_channels(x)) - mean * db) * torch.rsqrt(variance + eps), db


class _Sum(torch.autograd.Function):
    """The sum over the processes. It is its own transpose, and so has derivatives of every order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        _all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        return _sum(cotangents[0])


def _memory_for(tensor: Tensor) -> SharedMemory | None:
    """What the processes share, if a tensor can go through it."""
    return None if _joined is None or tensor.device.type != "cpu" else _joined.memory


def _all_reduce(tensor: Tensor) -> None:
    """The sum over the processes, in place; through their shared memory where they have it."""
    memory = _memory_for(tensor)
    if memory is not None:
        memory.sum_(tensor)
    else:
        dist.all_reduce(tensor)


def _all_gather(own: Tensor, world: int) -> Tensor:
    """All processes' small tensors, world x their shape."""
    memory = _memory_for(own)
    if memory is not None:
        return memory.gather(own)
    found = [torch.empty_like(own) for _ in range(world)]
    dist.all_gather(found, own)
    return torch.stack(found)


def _exchange(parts: list[Tensor], rank: int) -> None:
    """Each process has its own part; afterwards all of them, in place. Their lengths may differ."""
    memory = _memory_for(parts[rank])
    if memory is not None:
        memory.exchange_(parts)
    else:
        for source, part in enumerate(parts):
            if len(part):
                dist.broadcast(part, src=source)


def _sum(x: Tensor) -> Tensor:
    total: Tensor = _Sum.apply(x)
    return total


def _but_channels(x: Tensor) -> list[int]:
    return [d for d in range(x.ndim) if d != 1]


def _channels(t: Tensor, x: Tensor) -> Tensor:
    """C numbers, to be combined with B x C x ..."""
    return t.reshape(1, -1, *[1] * (x.ndim - 2))


def _like(whole: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """A vector in pieces of these tensors' shapes."""
    return [part.view_as(t) for part, t in zip(whole.split([t.numel() for t in tensors]), tensors, strict=True)]
