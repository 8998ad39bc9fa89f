"""Implicit backdoor adversarial unlearning: train against the worst universal perturbation, and against its answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from math import ceil, isfinite

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the usual name

from lightning_unlearn.data.pairs import Pairs
from lightning_unlearn.filters.gradients import gradients
from lightning_unlearn.methods.base import RepairMethod, RepairTask, Round, check_range
from lightning_unlearn.methods.second_derivative import TwiceDifferentiable, refuse_once
from lightning_unlearn.methods.snapshot import Snapshot
from lightning_unlearn.methods.training import batches

__all__ = ["ImplicitBackdoorUnlearning", "PixelRange", "hypergradient", "slope_of"]


class ImplicitBackdoorUnlearning(RepairMethod):
    """I-BAU of Zeng et al. (2022), arXiv 2110.03735, on clean images alone.

    A backdoor is a perturbation δ that ruins whatever it is added to. With L the mean cross-entropy of all images
    that carry it, against their true labels, the repair is

        min over θ of max over ‖δ‖₂ ≤ C of L(θ, δ),   L(θ, δ) = (1/n) Σ CE(f(x + δ; θ), y).

    Each round finds δ anew, by normalised gradient ascent from 0, one batch a step, every step 2C/``ascent_steps``
    long and followed by a projection onto the ball. Then come one epoch of Adam steps along the *hypergradient*
    dL(θ, δ(θ))/dθ, which also knows how δ answers a change of θ; see :func:`hypergradient` for how it is found.

    Norms stay in eval mode. The last round is kept whose validation accuracy is within ``accuracy_drop`` of the
    untouched model's; if none is, the model is left alone. Pruned filters are held at zero.

    δ is measured in units of each channel's range among the scoring images, which for images that reach from black to
    white are pixels in [0, 1], normalised or not. x + δ is not clipped, so that L stays smooth in δ.

    Args:
        rounds: alternations of ascent and an epoch of descent.
        radius: C, the largest Euclidean norm of δ over a whole image, in pixel units. The published 10 is for 3x32x32
            images, where it is a root mean square of 0.18 a value; on smaller or grey images it is more.
        ascent_steps: steps of the ascent.
        terms: K, the terms of the fixed-point iteration; 0 leaves the implicit part out: plain adversarial training.
            With K = 5 a step is about 8 times as long as one of fine-tuning, with 0 about 1.4 times.
        fixed_point_rate: η, the step size of the map that the iteration unrolls.
        learning_rate: of Adam.
        batch_size: clean images in one step. With few images a round is one step or two, which change little at this
            learning rate: lower it then, or raise ``learning_rate``.
        perturbed_share: the share of each descent batch that carries δ, in (0, 1]; the others stay clean. The paper's
            objective perturbs all of them; fewer cost less accuracy.
        accuracy_drop: α, the largest drop of validation accuracy, a fraction in (0, 1].

    Raises:
        ValueError: if a hyper-parameter is out of range.

    Example:
        >>> from lightning_unlearn.methods.implicit_unlearning import ImplicitBackdoorUnlearning
        >>> ImplicitBackdoorUnlearning(rounds=2, radius=5.0).name
        'ImplicitBackdoorUnlearning'
    """

    def __init__(
        self,
        *,
        rounds: int = 5,
        radius: float = 10.0,
        ascent_steps: int = 10,
        terms: int = 5,
        fixed_point_rate: float = 0.1,
        learning_rate: float = 1e-4,
        batch_size: int = 256,
        perturbed_share: float = 1.0,
        accuracy_drop: float = 0.1,
    ) -> None:
        check_range("rounds", rounds, 1, float("inf"))
        check_range("radius", radius, 0, float("inf"), open_low=True)
        check_range("ascent_steps", ascent_steps, 1, float("inf"))
        check_range("terms", terms, 0, float("inf"))
        check_range("fixed_point_rate", fixed_point_rate, 0, float("inf"), open_low=True)
        check_range("learning_rate", learning_rate, 0, float("inf"), open_low=True)
        check_range("batch_size", batch_size, 1, float("inf"))
        check_range("perturbed_share", perturbed_share, 0, 1, open_low=True)
        check_range("accuracy_drop", accuracy_drop, 0, 1, open_low=True)
        self.rounds = rounds
        self.radius = radius
        self.ascent_steps = ascent_steps
        self.terms = terms
        self.fixed_point_rate = fixed_point_rate
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.perturbed_share = perturbed_share
        self.accuracy_drop = accuracy_drop

    def repair(self, task: RepairTask) -> Iterator[Round]:
        """Alternate ascent and descent, and leave the model as the kept round left it.

        Raises:
            ValueError: if the images are not floating-point, the loss does not depend on them, or something in the
                model can be differentiated but once.
        """
        parameters: list[Tensor] = [p for p in task.model.parameters() if p.requires_grad]
        # In half precision Adam's usual 1e-8 is 0, by which it would divide.
        eps = max([1e-8, *(torch.finfo(p.dtype).tiny for p in parameters)])
        optimizer = torch.optim.Adam(parameters, lr=self.learning_rate, eps=eps)
        unit = PixelRange.of(task.scoring.clean).unit
        floor = task.before.acc - self.accuracy_drop - 1e-6  # accuracies come as float32
        kept = Snapshot(parameters)
        generator = task.generator()
        with task.mask.held(optimizer):
            for _ in range(self.rounds):
                with task.watch.measure("finetune"):
                    delta = self._ascend(task, unit, generator)
                    for chosen in batches(task, self.batch_size, generator):
                        self._descend(task, task.scoring[chosen], unit, delta, optimizer, parameters)
                now = task.validate()
                if isfinite(now.loss) and now.acc >= floor:
                    kept.renew()
                yield task.round("finetune", now)
        kept.put_back()
        for parameter in parameters:
            parameter.grad = None

    def _ascend(self, task: RepairTask, unit: Tensor, generator: torch.Generator) -> Tensor:
        """A δ in the ball that raises the loss of every image, (C, H, W)."""
        delta = torch.zeros_like(task.scoring.clean[0])
        length = 2 * self.radius / self.ascent_steps
        stream = chain.from_iterable(batches(task, self.batch_size, generator) for _ in count())
        for chosen in islice(stream, self.ascent_steps):
            delta.requires_grad_()
            slope = slope_of(_loss(task, task.scoring[chosen], unit, delta), delta)
            delta = delta.detach() + length * slope / _norm(slope)
            delta *= (self.radius / _norm(delta)).clamp(max=1)
        return delta

    def _descend(
        self,
        task: RepairTask,
        pairs: Pairs,
        unit: Tensor,
        delta: Tensor,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[Tensor],
    ) -> None:
        # Batches come in random order, so their first images are a random share.
        carriers = torch.arange(len(pairs), device=unit.device) < ceil(self.perturbed_share * len(pairs))
        carried = carriers.view(-1, 1, 1, 1).to(unit) * unit
        gradients = hypergradient(
            lambda moved: _loss(task, pairs, carried, moved),
            delta,
            parameters,
            terms=self.terms,
            rate=self.fixed_point_rate,
        )
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()


@dataclass(frozen=True, eq=False)
class PixelRange:
    """From where to where the pixels of some images go, channel by channel.

    Args:
        low: (C, 1, 1) lowest value of each channel.
        high: (C, 1, 1) highest value.

    Example:
        >>> import torch
        >>> from lightning_unlearn.methods.implicit_unlearning import PixelRange
        >>> normalised = (torch.tensor([0.0, 0.25, 1.0]).view(3, 1, 1, 1) - 0.5) / 0.25
        >>> PixelRange.of(normalised).unit
        tensor([[[4.]]])
    """

    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, images: Tensor) -> PixelRange:
        """The range of (N, C, H, W) images.

        Raises:
            ValueError: if the images are not floating-point: they cannot be changed along a gradient.
        """
        if not images.is_floating_point():
            raise ValueError(
                f"images: expected floating-point images, which a gradient can change a little, but got "
                f"{images.dtype}; convert them before the model does, or use FineTuning, which changes none."
            )
        return cls(images.amin((0, 2, 3)).view(-1, 1, 1), images.amax((0, 2, 3)).view(-1, 1, 1))

    @property
    def unit(self) -> Tensor:
        """(C, 1, 1) what one unit of pixels in [0, 1] is in the values of each channel."""
        return self.high - self.low


def hypergradient(
    loss: Callable[[Tensor], Tensor], delta: Tensor, parameters: Sequence[Tensor], *, terms: int, rate: float
) -> list[Tensor]:
    """d/dθ of L(θ, δ(θ)), where δ(θ) maximises L(θ, ·), from any δ near it.

    A maximiser is a fixed point of gradient ascent, δ = Φ(δ, θ) := δ + η ∂L/∂δ. With H = ∂²L/∂δ² and
    J = ∂²L/∂δ∂θ, differentiating both sides by θ gives

        dδ/dθ = (I + ηH) dδ/dθ + ηJ,   hence   dδ/dθ = (−ηH)⁻¹ ηJ   and
        dL/dθ = ∂L/∂θ + (dδ/dθ)ᵀ ∂L/∂δ = ∂L/∂θ + ηJᵀv,   where v solves   v = ∂L/∂δ + (I + ηH) v.

    The exact v is −(ηH)⁻¹ ∂L/∂δ, so that η cancels and dL/dθ = ∂L/∂θ − Jᵀ H⁻¹ ∂L/∂δ: the implicit part is what one
    Newton step on δ would change, and it vanishes where δ is a maximiser already. No inverse is formed: from v₀ = 0,

        vₖ₊₁ = ∂L/∂δ + vₖ + ηHvₖ,   that is   v_K = Σ (I + ηH)ᵏ ∂L/∂δ   over k < K,

    a Neumann series which converges if L is concave in δ and η < 2/‖H‖. Each term is one product of H and a vector,
    and the end one of Jᵀ and a vector: backward passes through the graph of ∂L/∂δ. Where L is not concave, as in
    general for a network, the series does not converge, and K and η say how far the correction goes.

    Args:
        loss: δ to the scalar L(θ, δ), computed with ``parameters``.
        delta: where δ is now.
        parameters: θ.
        terms: K; 0 for ∂L/∂θ alone.
        rate: η.

    Returns:
        One detached gradient for each of ``parameters``; 0 where the loss does not depend on it.

    Raises:
        ValueError: if the loss does not depend on δ, or something in it can be differentiated but once.

    Example:
        >>> import torch
        >>> from lightning_unlearn.methods.implicit_unlearning import hypergradient
        >>> theta = torch.tensor(3.0, requires_grad=True)
        >>> loss = lambda delta: delta * theta - delta**2  # highest, θ²/4, at δ = θ/2
        >>> hypergradient(loss, torch.tensor(0.0), [theta], terms=100, rate=0.25)  # θ/2, from the wrong δ
        [tensor(1.5000)]
        >>> hypergradient(loss, torch.tensor(0.0), [theta], terms=0, rate=0.25)
        [tensor(0.)]
    """
    delta = delta.detach().requires_grad_()
    value = loss(delta)
    slope = slope_of(value, delta, graph=terms > 0)
    gradients = _products(value, parameters, keep=terms > 0)
    if terms == 0 or not slope.requires_grad:  # a loss that is linear in δ alone has no second derivative
        return gradients
    first = slope.detach()
    series = first
    for _ in range(terms - 1):
        series = first + series + rate * _products(slope, [delta], series)[0]
    mixed = _products(slope, parameters, series, keep=False)
    return [direct + rate * implicit for direct, implicit in zip(gradients, mixed, strict=True)]


def _products(
    output: Tensor, inputs: Sequence[Tensor], vector: Tensor | None = None, *, keep: bool = True
) -> list[Tensor]:
    """vᵀ ∂output/∂input for each input."""
    with refuse_once():
        found = gradients(output, inputs, vector, keep=keep)
    return [torch.zeros_like(i) if gradient is None else gradient for i, gradient in zip(inputs, found, strict=True)]


def slope_of(loss: Tensor, delta: Tensor, vector: Tensor | None = None, *, graph: bool = False) -> Tensor:
    """∂L/∂δ of a loss, whose own graph is kept for more.

    Args:
        loss: a scalar, or with ``vector`` any tensor.
        delta: images, or what is added to them.
        vector: of the loss's shape, to multiply the gradient by.
        graph: make the result differentiable in its turn.

    Raises:
        ValueError: if the loss does not depend on δ.
    """
    (slope,) = gradients(loss, [delta], vector, keep=True, graph=graph)
    if slope is None:
        raise ValueError(
            "model: its loss has no gradient by the images, so no perturbation can be found; check that its forward "
            "neither detaches nor rounds them. FineTuning needs no such gradient."
        )
    return slope


def _loss(task: RepairTask, pairs: Pairs, unit: Tensor, delta: Tensor) -> Tensor:
    with TwiceDifferentiable():
        return F.cross_entropy(task.logits(pairs.clean + unit * delta), pairs.labels)


def _norm(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor)
    return norm.clamp(min=torch.finfo(tensor.dtype).tiny)
