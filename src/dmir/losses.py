"""What training minimises: a similarity of the fixed and the warped image, and the smoothness of the field.

A registration network is trained on ``-lncc(fixed, warped) + lambda * diffusion(displacement)`` (VoxelMorph,
Balakrishnan et al. 2019, equations 3, 5, 6), or with another similarity in place of the first term.

Sums over many voxels drown in bfloat16 and in TF32, so everything is computed in float32 at least, whatever autocast
says. Inputs in float64 stay in float64, which is what the tests compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from dmir.errors import InputError, suggestion
from dmir.filters import box_sums, in_slabs, numbers

MINIMUM_VARIANCE = 1e-5
"""What the product of the local variances is at least, for images in [0, 1]: the 1e-5 of VoxelMorph's code."""
CHUNK = 2**20
"""Voxels whose windows exist at a time in the mutual information: 32 numbers each."""


def lncc(fixed: torch.Tensor, warped: torch.Tensor, window: int = 9) -> torch.Tensor:
    r"""Return the mean squared local normalised cross-correlation: 1 for images that agree, 0 for unrelated ones.

    With sums over the cube of ``window``\ :sup:`3` voxels round each voxel p,

    .. math:: \mathrm{LNCC} = \frac{1}{|\Omega|} \sum_p
        \frac{\operatorname{cov}_p(f, w)^2}{\operatorname{var}_p(f) \operatorname{var}_p(w) + \epsilon}

    (Avants et al. 2008; Balakrishnan et al. 2019, equation 5). It is a similarity: training minimises its negative.
    It does not change if either image is scaled or shifted, where the contrast is well above :math:`\epsilon`.

    Parameters
    ----------
    fixed, warped
        (B, C, D, H, W), in [0, 1]; voxels outside count as zeros, and each sum is divided by ``window`` cubed.
    window
        Edge of the cube in voxels, odd.

    Returns
    -------
    torch.Tensor
        A scalar. Its gradient is right on constant background too: sums are separable moving averages, and not
        differences of cumulative sums, which cancel there.
    """
    if window < 1 or window % 2 == 0:
        raise InputError("window", found=str(window), expected="a positive odd number of voxels")
    _require_same_shape(fixed, warped)
    with torch.autocast(device_type=fixed.device.type, enabled=False):
        fixed, warped = _wide(fixed), _wide(warped)
        if fixed.device.type == "cpu":
            images = zip(fixed.flatten(0, 1).split(1), warped.flatten(0, 1).split(1), strict=True)
            return torch.stack([_LocalCorrelation.apply(*pair, window) for pair in images]).mean()
        return _pooled_lncc(fixed, warped, window)


def _pooled_lncc(fixed: torch.Tensor, warped: torch.Tensor, window: int) -> torch.Tensor:
    """Return :func:`lncc` with autograd's gradient and few kernels a sum: what is fastest on a GPU."""
    voxels = float(window**3)
    mean_fixed, mean_warped = _box_mean(fixed, window), _box_mean(warped, window)
    covariance = _box_mean(fixed * warped, window) - mean_fixed * mean_warped
    # rounding may make a variance of nearly constant voxels negative
    variance_fixed = (_box_mean(fixed * fixed, window) - mean_fixed * mean_fixed).clamp(min=0.0)
    variance_warped = (_box_mean(warped * warped, window) - mean_warped * mean_warped).clamp(min=0.0)
    product = variance_fixed * variance_warped * voxels**2
    return ((covariance * voxels).square() / (product + MINIMUM_VARIANCE)).mean()


class _LocalCorrelation(torch.autograd.Function):
    r""":func:`lncc` of two images (1, D, H, W) with its gradient in closed form, slab by slab: what a CPU is fast at.

    With the means, variances and covariance of the window round p, :math:`a = c / (v(f) v(w) + \epsilon)` and
    :math:`b = a^2 v(f)`, the derivative by the grey value of w at q is proportional to

    .. math:: \sum_{p \ni q} a_p (f_q - \bar f_p) - b_p (w_q - \bar w_p)
    """

    @staticmethod
    def forward(ctx: Any, fixed: torch.Tensor, warped: torch.Tensor, window: int) -> torch.Tensor:
        pair, radius, voxels = torch.cat([fixed, warped]), window // 2, window**3
        in_zeros = F.pad(pair, (radius,) * 6)
        wanted = [image for image in (0, 1) if ctx.needs_input_grad[image]]
        terms = F.pad(pair.new_empty(1 + 2 * len(wanted), *pair.shape[1:]), (radius,) * 6) if wanted else pair

        def of_windows(start: int, end: int) -> torch.Tensor:
            seen = in_zeros[:, start : end + 2 * radius]
            sums = box_sums(torch.cat([seen, seen * seen, seen[:1] * seen[1:]]), window).mul_(1 / voxels)
            mean, variance, covariance = sums[:2], sums[2:4], sums[4]
            # rounding may make a variance of nearly constant voxels negative
            variance.addcmul_(mean, mean, value=-1).clamp_(min=0)
            covariance.addcmul_(mean[0], mean[1], value=-1)
            shared = covariance / (variance[0] * variance[1]).add_(MINIMUM_VARIANCE / voxels**2)
            if wanted:
                inside = slice(radius, -radius or None)
                of_slab = terms[:, start + radius : end + radius, inside, inside]
                of_slab[0] = shared
                for image, (own, offset) in zip(wanted, of_slab[1:].split(2), strict=True):
                    # where a variance is held at zero it has no derivative
                    torch.mul(shared.square(), variance[1 - image] * (variance[image] > 0), out=own)
                    torch.mul(shared, mean[1 - image], out=offset).addcmul_(own, mean[image], value=-1)
            return covariance.mul_(shared).sum(dim=2).sum(dim=1)

        def of_voxels(start: int, end: int) -> None:
            both, *others = box_sums(terms[:, start : end + 2 * radius], window)
            for image, gradient, own, offset in zip(wanted, gradients, others[::2], others[1::2], strict=True):
                part = torch.mul(both, pair[1 - image, start:end], out=gradient[0, start:end])
                part.addcmul_(own, pair[image, start:end], value=-1).sub_(offset).mul_(2 / (voxels * fixed.numel()))

        total = torch.cat(in_slabs(of_windows, pair)).sum()
        gradients = [torch.empty_like(fixed) for _ in wanted]
        if wanted:
            in_slabs(of_voxels, pair)
        ctx.save_for_backward(*gradients)
        return total / fixed.numel()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        return *(next(saved) * gradient if wanted else None for wanted in ctx.needs_input_grad[:2]), None


def mse(fixed: torch.Tensor, warped: torch.Tensor) -> torch.Tensor:
    """Return the mean squared difference of two images (B, C, D, H, W): a dissimilarity, 0 for equal images."""
    _require_same_shape(fixed, warped)
    with torch.autocast(device_type=fixed.device.type, enabled=False):
        return (_wide(fixed) - _wide(warped)).square().mean()


def mutual_information(
    fixed: torch.Tensor, warped: torch.Tensor, bins: int = 32, weights: torch.Tensor | None = None
) -> torch.Tensor:
    r"""Return the mutual information in nats of the intensities of two images, by Parzen windows.

    .. math:: \mathrm{MI} = \sum_{a, b} p(a, b) \log \frac{p(a, b)}{p(a) p(b)}

    with the joint histogram :math:`p(a, b)` of Gaussian windows, whose standard deviation is half the distance of two
    bins, over the whole image (Viola and Wells 1997; Guo 2019 for its use in training). It is a similarity: training
    minimises its negative.

    Parameters
    ----------
    fixed, warped
        (B, C, D, H, W), in [0, 1].
    bins
        Centres at 0, 1 / (bins - 1), ..., 1.
    weights
        (B, C, D, H, W), how much each voxel counts; None: all alike.

    Returns
    -------
    torch.Tensor
        A scalar, the mean over the batch.
    """
    if bins < 2:
        raise InputError("bins", found=str(bins), expected="at least 2")
    _require_same_shape(fixed, warped)
    with torch.autocast(device_type=fixed.device.type, enabled=False):
        volumes = [_wide(volume).flatten(1) for volume in (fixed, warped, weights) if volume is not None]
        parts = zip(*(volume.split(CHUNK, 1) for volume in volumes), strict=True)
        counts = [checkpoint(_joint_histogram, bins, *part, use_reentrant=False) for part in parts]
        joint = torch.stack(counts).sum(dim=0)
        joint = joint / (fixed[0].numel() if weights is None else volumes[2].sum(dim=1).clamp(min=1.0)[:, None, None])
        independent = joint.sum(dim=2, keepdim=True) * joint.sum(dim=1, keepdim=True)
        # a pair of intensities that never meets adds nothing: the limit of p log p
        tiny = torch.finfo(joint.dtype).tiny
        return (joint * (joint.clamp(min=tiny) / independent.clamp(min=tiny)).log()).sum(dim=(1, 2)).mean()


def diffusion(displacement: torch.Tensor, spacing: Sequence[float] = (1.0, 1.0, 1.0)) -> torch.Tensor:
    r"""Return the diffusion energy of a field, the mean squared forward difference.

    .. math:: \frac{1}{3} \sum_{j=1}^{3} \operatorname{mean}_{k, x}
        \left( \frac{u_k(x + e_j) - u_k(x)}{h_j} \cdot h_k \right)^2

    (Balakrishnan et al. 2019, equation 6). With the default spacing the differences are plain ones of voxels.

    Parameters
    ----------
    displacement
        (B, 3, D, H, W) in voxels.
    spacing
        Of the voxels along each axis, h, mm: differences of millimetres per millimetre.
    """
    with torch.autocast(device_type=displacement.device.type, enabled=False):
        u = _wide(displacement)
        if any(edge != 1.0 for edge in spacing):
            u = u * numbers(spacing, u).view(1, 3, 1, 1, 1)
        return _SquaredDifferences.apply(u, tuple(1 / (3 * float(edge) ** 2) for edge in spacing))


class _SquaredDifferences(torch.autograd.Function):
    """The weighted sum over axes of a field's mean squared forward difference, with its gradient, slab by slab."""

    @staticmethod
    def forward(ctx: Any, field: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
        u = field.flatten(0, 1)
        gradient = torch.zeros_like(u, memory_format=torch.contiguous_format) if ctx.needs_input_grad[0] else None
        shares = [w * n / (u.numel() * max(n - 1, 1)) for w, n in zip(weights, u.shape[1:], strict=True)]

        def of_planes(start: int, end: int) -> torch.Tensor:
            before = min(start, 1)
            # along the first axis the planes of a slab are those that a difference starts from
            around = u[:, start - before : end + 1].diff(dim=1)
            own = u[:, start:end]
            steps = [around[:, before:], own.diff(dim=2), own.diff(dim=3)]
            if gradient is not None:
                part = gradient[:, start:end]
                part[:, 1 - before :].add_(around[:, : end - start - 1 + before], alpha=2 * shares[0])
                for axis, (step, share) in enumerate(zip(steps, shares, strict=True), start=1):
                    part.narrow(axis, 0, step.shape[axis]).sub_(step, alpha=2 * share)
                    if axis > 1:
                        part.narrow(axis, 1, step.shape[axis]).add_(step, alpha=2 * share)
            return torch.stack([step.square_().sum() * share for step, share in zip(steps, shares, strict=True)])

        value = torch.stack(in_slabs(of_planes, u)).sum()
        ctx.save_for_backward(*([] if gradient is None else [gradient.view(field.shape)]))
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.saved_tensors[0] * gradient, None


SIMILARITIES: dict[str, Callable[..., torch.Tensor]] = {
    "lncc": lncc,
    "mse": mse,
    "mutual_information": mutual_information,
}
"""What compares the images, by name: (fixed, warped) -> scalar."""


def dissimilarity(name: str, fixed: torch.Tensor, warped: torch.Tensor, **options: int) -> torch.Tensor:
    """Return what is minimised for a similarity of ``SIMILARITIES``: its negative, or the mean squared difference.

    Raises
    ------
    InputError
        There is no such similarity.
    """
    if name not in SIMILARITIES:
        raise InputError(
            "similarity", found=repr(name), expected="a known similarity", remedy=suggestion(name, SIMILARITIES)
        )
    value = SIMILARITIES[name](fixed, warped, **options)
    return value if name == "mse" else -value


def _wide(image: torch.Tensor) -> torch.Tensor:
    return image.to(torch.promote_types(image.dtype, torch.float32))


def _require_same_shape(fixed: torch.Tensor, warped: torch.Tensor) -> None:
    if fixed.shape != warped.shape or fixed.ndim != 5:
        raise InputError(
            "fixed, warped",
            found=f"shapes {tuple(fixed.shape)} and {tuple(warped.shape)}",
            expected="two equal shapes (B, C, D, H, W)",
        )


def _box_mean(image: torch.Tensor, window: int) -> torch.Tensor:
    """Mean over a cube round each voxel, zeros outside, as three averages along one axis each."""
    for axis in range(3):
        size = [1, 1, 1]
        size[axis] = window
        padding = [0, 0, 0]
        padding[axis] = window // 2
        image = F.avg_pool3d(image, size, stride=1, padding=padding)
    return image


def _joint_histogram(
    bins: int, fixed: torch.Tensor, warped: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Count pairs of intensities (B, voxels) twice -> (B, bins, bins).

    Each voxel counts one, or its weight, spread by the windows.
    """
    centres = torch.linspace(0.0, 1.0, bins, device=fixed.device, dtype=fixed.dtype)
    width = 0.5 / (bins - 1)

    def spread(image: torch.Tensor) -> torch.Tensor:
        return torch.softmax(-0.5 * ((image[:, :, None] - centres) / width).square(), dim=2)

    counted = spread(fixed) if weights is None else spread(fixed) * weights[:, :, None]
    return counted.transpose(1, 2) @ spread(warped)
