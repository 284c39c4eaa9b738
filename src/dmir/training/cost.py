"""What a training step and an inference cost, counted without computing anything.

A network is run on tensors that have a shape, a type and a place, but no contents (:mod:`dmir.training.hollow`). Every
operation that torch is asked for, those of the gradient included, then tells three things:

- **arithmetic**: floating-point operations of matrix products, convolutions and attention, a multiplication and an
  addition being two (twice the MACs that some papers print as "FLOPs"), as they are really done: products that a
  network skips by algebra are not there, products with masked keys are. Norms, softmax, activations, pooling and
  resampling are not counted: they move memory rather than compute;
- **traffic**: bytes of the inputs that it reads and of the outputs that it writes. Each operation is taken by itself
  and reads each input once: a lower bound for operations that are not fused into one another;
- **memory**: bytes of all storages that are alive at a time, weights, gradients, Adam's moments, images, and what is
  kept for the gradient included. Not there: what a kernel takes for itself while it runs, torch's own allocator's
  reserve, and the process itself.

A network takes other ways on a CPU than on a GPU. Operations are counted for the kind of device that is asked for; a
GPU's ways need a torch that sees one. On a CPU attention is computed in float32 even in bfloat16, so that what is
counted for a CPU in bfloat16 is more, in traffic and in memory, than a GPU takes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from dmir.networks import build
from dmir.networks.shapes import shapes_alone
from dmir.training.comparison import compared
from dmir.training.hollow import hollow_tensors
from dmir.training.settings import TrainingSettings

aten = torch.ops.aten

GRADIENT_NORM = 1  # numbers moved a weight: the norm of the gradient, which every step takes
ADAM = (
    7  # numbers moved a weight by torch's fused Adam: weight, gradient and moments read; all but the gradient written
)
WITHOUT_TRAFFIC = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten.set_}
NOT_READ = {aten.zero_, aten.fill_, aten.copy_, aten.bernoulli_, aten.normal_, aten.uniform_}  # what they write to


@dataclass(frozen=True)
class Cost:
    """What a computation costs.

    Attributes
    ----------
    gflop
        10^9 floating-point operations of matrix products, convolutions and attention.
    moved_gb
        10^9 bytes read and written: a lower bound for operations that are not fused.
    peak_mb
        Largest memory alive at a time, 10^6 bytes: weights and images included, the process not.
    kernels
        Operations that move memory: on a GPU each is at least one launch.
    parameters
        Weights of the network.
    """

    gflop: float
    moved_gb: float
    peak_mb: float
    kernels: int
    parameters: int


@dataclass(frozen=True)
class StepCost(Cost):
    """What a training step costs: network, warp, objective, gradient, its norm, Adam.

    Attributes
    ----------
    lasting_mb
        The part of ``peak_mb`` that stays from step to step: weights, their gradients, Adam's two moments.
    """

    lasting_mb: float


def count_step(
    algorithm: str,
    hyperparameters: Mapping[str, Any],
    shape: tuple[int, int, int],
    training: Mapping[str, Any],
    batch_size: int | None = None,
    *,
    device_type: str = "cpu",
) -> StepCost:
    """Count a training step, as :class:`~dmir.training.module.RegistrationModule` does it.

    Parameters
    ----------
    algorithm, hyperparameters, shape
        As for :func:`dmir.networks.build`.
    training
        Keys of :class:`~dmir.training.settings.TrainingSettings`; those left out keep its defaults.
    batch_size
        Instead of the training's own.
    device_type
        ``"cpu"`` or ``"cuda"``: whose ways the network takes. ``"cuda"`` needs a torch that sees a GPU.

    Raises
    ------
    InputError
        A hyperparameter or a setting that cannot be used.
    """
    settings = settings_of(training)
    batch = settings.batch_size if batch_size is None else batch_size

    def step(network: nn.Module, moving: torch.Tensor, fixed: torch.Tensor) -> None:
        weights = _weights_of(network)
        moments = moving.new_empty(2 * weights)
        gradients = moving.new_empty(weights)  # of the step before: they go after the loss, before the new ones come
        displacement = _displacement(network, moving, fixed, settings.precision)
        loss = settings.objective()(*compared(moving, fixed, displacement, settings), displacement)[0]
        del displacement, gradients
        loss.backward()
        del moments

    counter, parameters = _count(algorithm, hyperparameters, shape, batch, device_type, step, training=True)
    moved = counter.moved + 4 * parameters * (GRADIENT_NORM + ADAM)
    lasting = 4 * 4 * parameters
    return StepCost(
        counter.flop / 1e9, moved / 1e9, max(counter.peak, lasting) / 1e6, counter.kernels, parameters, lasting / 1e6
    )


def settings_of(training: Mapping[str, Any]) -> TrainingSettings:
    """Return the settings that a cost follows from; keys that are not among them change none."""
    known = {field.name for field in fields(TrainingSettings)}
    return TrainingSettings(**{key: value for key, value in training.items() if key in known})


def count_objective(shape: tuple[int, int, int], training: Mapping[str, Any], *, device_type: str = "cpu") -> Cost:
    """Count what a step is without a network: warp, objective, and their gradient with respect to the field."""
    settings = settings_of(training)
    with hollow_tensors(), CostCounter() as counter:
        moving, fixed = (torch.empty(1, 1, *shape, device=device_type) for _ in range(2))
        displacement = torch.empty(1, 3, *shape, device=device_type, requires_grad=True)
        settings.objective()(*compared(moving, fixed, displacement, settings), displacement)[0].backward()
    return Cost(counter.flop / 1e9, counter.moved / 1e9, counter.peak / 1e6, counter.kernels, 0)


def count_inference(
    algorithm: str,
    hyperparameters: Mapping[str, Any],
    shape: tuple[int, int, int],
    precision: str = "float32",
    *,
    device_type: str = "cpu",
) -> Cost:
    """Count the registration of one pair: the network alone, without gradients; parameters as for :func:`count_step`.

    Raises
    ------
    InputError
        A hyperparameter that cannot be used.
    """

    def register(network: nn.Module, moving: torch.Tensor, fixed: torch.Tensor) -> None:
        with torch.no_grad():
            _displacement(network, moving, fixed, precision)

    counter, parameters = _count(algorithm, hyperparameters, shape, 1, device_type, register, training=False)
    return Cost(counter.flop / 1e9, counter.moved / 1e9, counter.peak / 1e6, counter.kernels, parameters)


def _count(
    algorithm: str,
    hyperparameters: Mapping[str, Any],
    shape: tuple[int, int, int],
    batch: int,
    device_type: str,
    call: Callable[[nn.Module, torch.Tensor, torch.Tensor], None],
    *,
    training: bool,
) -> tuple[CostCounter, int]:
    """Build a network without contents, run it on a pair without contents; return what was counted, and its weights."""
    with shapes_alone():
        network = build(algorithm, shape, **hyperparameters).train(training)
    with hollow_tensors(), CostCounter() as counter:
        network.to_empty(device=device_type)
        moving, fixed = (torch.empty(batch, 1, *shape, device=device_type) for _ in range(2))
        counter.restart()
        call(network, moving, fixed)
    return counter, _weights_of(network)


def _weights_of(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _displacement(network: nn.Module, moving: torch.Tensor, fixed: torch.Tensor, precision: str) -> torch.Tensor:
    """Do as ``displacement_of`` does on a device that has bfloat16, which this one may not have."""
    with torch.autocast(moving.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        displacement: torch.Tensor = network(moving, fixed)
    return displacement.float()


class CostCounter(TorchDispatchMode):
    """Adds up what torch's operations cost while it is on; with tensors with contents it counts as they compute.

    Attributes
    ----------
    flop, moved, kernels
        Floating-point operations, bytes, and operations that move memory, since the last restart.
    alive, peak
        Bytes of all storages that operations have made since it is on: now, and at most since the last restart.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flop = self.moved = self.kernels = self.alive = self.peak = 0
        self._known: set[int] = set()

    def restart(self) -> None:
        """Forget the work so far; what is alive stays so."""
        self.flop = self.moved = self.kernels = 0
        self.peak = self.alive

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        packet = func._overloadpacket
        flop = FLOP.get(packet)
        if flop is not None:
            self.flop += flop(*args, **kwargs, out_val=result)
        if not func.is_view:
            self._note(func, packet, args, kwargs, result)
        return result

    def _note(self, func: Any, packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        for tensor in written:
            self._keep(tensor)
        if packet in WITHOUT_TRAFFIC or packet is aten._unsafe_view or packet is aten._reshape_alias:
            return
        if packet in NOT_READ:
            read = read[1:]
        self.kernels += 1
        self.moved += sum(map(_bytes, read)) + sum(map(_bytes, written))

    def _keep(self, tensor: torch.Tensor) -> None:
        """Count a storage for as long as it lives, whoever holds it: the network, or what is kept for the gradient."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, key, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def _bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor's different numbers: expanded or overlapping views repeat some."""
    if tensor.numel() == 0:
        return 0
    span = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return min(tensor.numel(), span) * tensor.element_size()


def _attention_flop(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))  # (B, heads, tokens, d)


def _attention_backward_flop(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> int:
    return int(sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape))


# torch's list has attention on GPUs only, and lacks what is added to in place
FLOP: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flop,
    aten.addmm_: flop_registry[aten.addmm],
    aten.baddbmm_: flop_registry[aten.baddbmm],
}
