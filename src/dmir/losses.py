"""What training minimises: a similarity of the fixed and the warped image, and the smoothness of the field.

A registration network is trained on ``-lncc(fixed, warped) + lambda * diffusion(displacement)`` (VoxelMorph,
Balakrishnan et al. 2019, equations 3, 5, 6), or with another similarity in place of the first term.

Sums over many voxels drown in bfloat16 and in TF32, so everything is computed in float32 at least, whatever autocast
says. Inputs in float64 stay in float64, which is what the tests compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from dmir.errors import InputError, suggestion

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
        voxels = float(window**3)
        mean_fixed, mean_warped = _box_mean(fixed, window), _box_mean(warped, window)
        covariance = _box_mean(fixed * warped, window) - mean_fixed * mean_warped
        # rounding may make a variance of nearly constant voxels negative
        variance_fixed = (_box_mean(fixed * fixed, window) - mean_fixed * mean_fixed).clamp(min=0.0)
        variance_warped = (_box_mean(warped * warped, window) - mean_warped * mean_warped).clamp(min=0.0)
        product = variance_fixed * variance_warped * voxels**2
        return ((covariance * voxels).square() / (product + MINIMUM_VARIANCE)).mean()


def mse(fixed: torch.Tensor, warped: torch.Tensor) -> torch.Tensor:
    """Return the mean squared difference of two images (B, C, D, H, W): a dissimilarity, 0 for equal images."""
    _require_same_shape(fixed, warped)
    with torch.autocast(device_type=fixed.device.type, enabled=False):
        return (_wide(fixed) - _wide(warped)).square().mean()


def mutual_information(fixed: torch.Tensor, warped: torch.Tensor, bins: int = 32) -> torch.Tensor:
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

    Returns
    -------
    torch.Tensor
        A scalar, the mean over the batch.
    """
    if bins < 2:
        raise InputError("bins", found=str(bins), expected="at least 2")
    _require_same_shape(fixed, warped)
    with torch.autocast(device_type=fixed.device.type, enabled=False):
        voxels = zip(_wide(fixed).flatten(1).split(CHUNK, 1), _wide(warped).flatten(1).split(CHUNK, 1), strict=True)
        counts = [checkpoint(_joint_histogram, f, w, bins, use_reentrant=False) for f, w in voxels]
        joint = torch.stack(counts).sum(dim=0) / fixed[0].numel()
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
        u = _wide(displacement) * displacement.new_tensor(spacing).view(1, 3, 1, 1, 1)
        terms = [u.diff(dim=axis + 2).square().mean() / float(spacing[axis]) ** 2 for axis in range(3)]
        return torch.stack(terms).mean()


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


def _joint_histogram(fixed: torch.Tensor, warped: torch.Tensor, bins: int) -> torch.Tensor:
    """Count pairs of intensities (B, voxels) twice -> (B, bins, bins); each voxel counts one, spread by the windows."""
    centres = torch.linspace(0.0, 1.0, bins, device=fixed.device, dtype=fixed.dtype)
    width = 0.5 / (bins - 1)

    def spread(image: torch.Tensor) -> torch.Tensor:
        return torch.softmax(-0.5 * ((image[:, :, None] - centres) / width).square(), dim=2)

    return spread(fixed).transpose(1, 2) @ spread(warped)
