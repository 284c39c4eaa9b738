"""How alike two images are, and which change of the warped one's grey values makes them more so.

Each similarity is computed once with its derivative, in closed form and without a graph: what descends asks for
nothing else. The similarity of the training losses (:mod:`dmir.losses`) is the same quantity, for networks to learn by.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dmir import losses
from dmir.errors import InputError, suggestion
from dmir.filters import box_sums, in_slabs, planes

SEEN = 0.999  # of a window, for it to count
WEAK = 1e-12  # square of a force that compression takes for none


class Similarity:
    """What compares a warped image with the fixed one, (1, D, H, W) each, some planes at a time.

    Parameters
    ----------
    fixed
        In [0, 1].
    """

    def __init__(self, fixed: torch.Tensor) -> None:
        self.fixed = fixed

    def prepare(self, warped: torch.Tensor, seen: torch.Tensor | None = None) -> None:
        """Take what is to be known of the whole warped image; ``seen`` says how far each of its voxels was scanned."""
        self.warped, self.seen = warped, seen

    def slab(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the similarity's sums over each of some planes, (d,), and its derivative by the warped image there.

        Sums of planes, as those of slabs would be other bits with other slabs.
        """
        raise NotImplementedError

    def force(
        self, warped: torch.Tensor, start: int, end: int, compression: float = 1.0, weak: float = WEAK
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the similarity's sums over each of some planes, (d,), and in which direction each voxel's displacement
        is to change there, (3, d, H, W): the derivative times the warped image's gradient.

        ``compression`` is the power of its length that is kept: below 1, strong edges do not drown weak ones. Forces of
        which the square is below ``weak`` keep their proportions.
        """
        values, derivative = self.slab(start, end)
        force = gradient(warped, start, end).mul_(derivative)
        if compression != 1:
            force *= force.square().sum(0, keepdim=True).add_(weak).pow_((compression - 1) / 2)
        return values, force


class LocalCorrelation(Similarity):
    r"""The squared local normalised cross-correlation (Avants et al. 2008), as :func:`dmir.losses.lncc`.

    With means over the cube of ``window``\ :sup:`3` voxels round each voxel p, zeros outside,

    .. math:: L = \sum_p \frac{c_p^2}{v_p(f) v_p(w)}, \qquad
        \frac{\partial L}{\partial w_q} \propto \sum_{p \ni q} \frac{c_p}{v_p(f) v_p(w)}
        \left[ (f_q - \bar f_p) - \frac{c_p}{v_p(w)} (w_q - \bar w_p) \right]

    where windows in which either image is flatter than ``noise`` (their standard deviations' product is below its
    square) say nothing. The derivative leaves the factor 2 / window\ :sup:`3` out. Sums of the fixed image are kept.
    Of two equal images it is exactly zero.
    """

    def __init__(
        self, fixed: torch.Tensor, window: int, noise: float = 0.005, seen: torch.Tensor | None = None
    ) -> None:
        super().__init__(fixed)
        self.window, self.noise, self.voxels, self.radius = window, noise, window**3, window // 2
        # with zeros round them, so that windows at the border are views like all others
        self.fixed_in_zeros, self.warped_in_zeros = _in_zeros(fixed, self.radius), _in_zeros(fixed, self.radius)
        self.terms = _in_zeros(fixed.expand(3, *fixed.shape[1:]), self.radius)
        self.mean, self.variance = torch.empty_like(fixed), torch.empty_like(fixed)

        def of_fixed(start: int, end: int) -> None:
            part = self._windowed(self.fixed_in_zeros, start, end)
            sums = box_sums(torch.cat([part, part * part]), window).mul_(1 / self.voxels)
            self.mean[:, start:end] = sums[:1]
            self.variance[:, start:end] = sums[1:].addcmul_(sums[:1], sums[:1], value=-1).clamp_(min=0)

        in_slabs(of_fixed, fixed)
        self.usable = None if seen is None else self._whole_windows(seen)

    def prepare(self, warped: torch.Tensor, seen: torch.Tensor | None = None) -> None:
        super().prepare(warped, seen)
        _middle(self.warped_in_zeros, self.radius).copy_(warped)
        moved = None if seen is None else self._whole_windows(seen)
        both = [usable for usable in (self.usable, moved) if usable is not None]
        counts = None if not both else both[0] if len(both) == 1 else both[0] & both[1]
        # the mean is of the windows that count: with a sum, what moves out of sight would be a loss
        share = 1.0 if counts is None else counts.numel() / counts.sum().clamp(min=1)
        terms, values = _middle(self.terms, self.radius), {}

        def of_windows(start: int, end: int) -> None:
            counted = None if counts is None else counts[:, start:end]
            values[start, end] = self._windows(start, end, counted, terms[:, start:end]) * share

        in_slabs(of_windows, warped)
        self.values = values

    def slab(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        sums = box_sums(self._windowed(self.terms, start, end), self.window)
        # products and differences by themselves: a fused one rounds otherwise, and zero would not be zero
        derivative = sums[:1].mul_(self.fixed[:, start:end]).sub_(sums[1:2].mul_(self.warped[:, start:end]))
        return self.values[start, end], derivative.sub_(sums[2:])

    def _windowed(self, in_zeros: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """Return what the windows round some planes hold."""
        return in_zeros[:, start : end + 2 * self.radius]

    def _windows(self, start: int, end: int, counted: torch.Tensor | None, terms: torch.Tensor) -> torch.Tensor:
        """Put c / (v(f) v(w)) of the windows round some planes, that times c / v(w), and what of the derivative is
        the same for all voxels of a window, into ``terms``; return their squared correlations' sum in each plane."""
        fixed, warped = (self._windowed(x, start, end) for x in (self.fixed_in_zeros, self.warped_in_zeros))
        sums = box_sums(torch.cat([warped, warped * warped, warped * fixed]), self.window).mul_(1 / self.voxels)
        own_mean, variance, covariance = sums[:1], sums[1:2], sums[2:]
        mean = self.mean[:, start:end]
        variance.addcmul_(own_mean, own_mean, value=-1).clamp_(min=0)
        covariance.addcmul_(own_mean, mean, value=-1)
        product = variance * self.variance[:, start:end]
        says = product > self.noise**4
        if counted is not None:
            says &= counted
        both, own, offset = terms[:1], terms[1:2], terms[2:]
        both.copy_(torch.where(says, covariance / product, 0.0))
        own.copy_(torch.where(says, covariance / variance, 0.0)).mul_(both)
        offset.copy_(both).mul_(mean).sub_(own_mean.mul_(own))
        return _plane_sums(covariance.mul_(both))

    def _whole_windows(self, seen: torch.Tensor) -> torch.Tensor:
        """Return where a window lies wholly in what was seen; what lies outside the volume is no part of it."""
        missing, result = _in_zeros(1 - seen, self.radius), torch.empty_like(seen, dtype=torch.bool)

        def of_windows(start: int, end: int) -> None:
            result[:, start:end] = box_sums(self._windowed(missing, start, end), self.window) < 1 - SEEN

        in_slabs(of_windows, seen)
        return result


class MeanSquares(Similarity):
    """The negative squared difference; its derivative leaves the factor 2 out."""

    def __init__(self, fixed: torch.Tensor, seen: torch.Tensor | None = None) -> None:
        super().__init__(fixed)
        self.usable = seen

    def slab(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        difference = self.fixed[:, start:end] - self.warped[:, start:end]
        for seen in (self.usable, self.seen):
            if seen is not None:
                difference *= seen[:, start:end] > SEEN
        return -_plane_sums(difference * difference), difference


class MutualInformation(Similarity):
    """The mutual information of the grey values (:func:`dmir.losses.mutual_information`), counted for each voxel.

    Its histogram is of the whole image, so that the derivative is of the whole image too, by autograd through the
    grey values alone. Voxels that one scan never saw are left out of it.
    """

    def __init__(self, fixed: torch.Tensor, seen: torch.Tensor | None = None) -> None:
        super().__init__(fixed)
        self.usable = seen

    def prepare(self, warped: torch.Tensor, seen: torch.Tensor | None = None) -> None:
        super().prepare(warped, seen)
        inside: torch.Tensor | None = None  # weights, for a selection would have to be waited for on a GPU
        for map_ in (self.usable, seen):
            if map_ is not None:
                counted = (map_ > SEEN).to(warped.dtype)
                inside = counted if inside is None else inside.mul_(counted)
        with torch.inference_mode(False), torch.enable_grad():
            values, fixed = warped.clone().requires_grad_(), self.fixed.clone()
            weights = None if inside is None else inside.clone()[None]
            self.value = losses.mutual_information(fixed[None], values[None], weights=weights) * warped.numel()
            (self.derivative,) = torch.autograd.grad(self.value, values)

    def slab(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        share = self.value.detach() / self.fixed.shape[1]
        return share.expand(end - start), self.derivative[:, start:end]


def similarity_of(
    name: str, fixed: torch.Tensor, window: int, noise: float, seen: torch.Tensor | None = None
) -> Similarity:
    """Return the similarity of a name of :data:`dmir.losses.SIMILARITIES` to a fixed image (1, D, H, W).

    Raises
    ------
    InputError
        There is no such similarity.
    """
    if name == "lncc":
        return LocalCorrelation(fixed, window, noise, seen)
    if name == "mse":
        return MeanSquares(fixed, seen)
    if name == "mutual_information":
        return MutualInformation(fixed, seen)
    hint = suggestion(name, losses.SIMILARITIES)
    raise InputError("similarity", found=repr(name), expected="a known similarity", remedy=hint)


def _plane_sums(volume: torch.Tensor) -> torch.Tensor:
    """Return the sum of each plane of a volume (1, d, H, W), (d,)."""
    return volume.sum(dim=3).sum(dim=2)[0]


def _in_zeros(volume: torch.Tensor, margin: int) -> torch.Tensor:
    """Return a volume (C, D, H, W) with zeros all round it."""
    return F.pad(volume, (margin,) * 6)


def _middle(volume: torch.Tensor, margin: int) -> torch.Tensor:
    """Return a view of what lies in those zeros."""
    inside = slice(margin, -margin)
    return volume[:, inside, inside, inside]


def gradient(image: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """Return the central differences (3, d, H, W) of some planes of an image (1, D, H, W); none across its border."""
    with_neighbours = planes(image, start, end, 1)[0]
    result = image.new_zeros(3, end - start, *image.shape[2:])
    torch.sub(with_neighbours[2:], with_neighbours[:-2], out=result[0])
    own = with_neighbours[1:-1]
    torch.sub(own[:, 2:], own[:, :-2], out=result[1][:, 1:-1])
    torch.sub(own[:, :, 2:], own[:, :, :-2], out=result[2][:, :, 1:-1])
    return result.mul_(0.5)
