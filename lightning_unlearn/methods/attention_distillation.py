"""Neural Attention Distillation: fine-tune towards the attention of a fine-tuned teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name

from lightning_unlearn.methods.base import RepairMethod, RepairTask, Round, check_range
from lightning_unlearn.methods.fine_tuning import FineTuning
from lightning_unlearn.methods.snapshot import Snapshot
from lightning_unlearn.methods.subject import Subject
from lightning_unlearn.methods.training import train_epochs

__all__ = ["NeuralAttentionDistillation"]


class NeuralAttentionDistillation(RepairMethod):
    """NAD after Li et al. (2021), arXiv 2101.05930: distil a fine-tuned teacher's attention into the victim.

    The teacher is the victim after :class:`FineTuning` for ``teacher_epochs``. The student is the victim, trained on
    clean images by

        CE + Σ_l β_l · MSE(A_l(student), A_l(teacher)),    A(F) = Σ_c F_c² / ‖Σ_c F_c²‖₂

    where F, (N, C, H, W), is a layer's output, A, (N, H·W), is its attention map, and the mean of the MSE runs over
    all entries of the batch's maps. The paper takes the ends of the three stages of a residual network. What a stage
    is, an arbitrary network does not tell, so here the maps are the outputs of the *last convolution that ran at each
    resolution*, for the last resolutions of the network, at most as many as there are ``betas``, which count from the
    end. A resolution of one position (as in squeeze-and-excite) is none: its attention is always 1.

    Images are not augmented, so the teacher's maps of the scoring images are all that the student needs of it. They
    are stored, the victim's weights are put back, and the same model becomes the student: no second model is held.

    Args:
        betas: β of the last resolutions, from the larger to the smaller maps. Fewer resolutions take the last ones.
        teacher_epochs: epochs of fine-tuning that make the teacher.
        learning_rate: of SGD with momentum 0.9, for both.
        weight_decay: of SGD.
        batch_size: clean images in one step.
        max_epochs: how many epochs to train the student; each training has a cosine schedule of its own.
        accuracy_drop: α, the largest drop of validation accuracy, a fraction in (0, 1]; the last epoch within it is
            kept, of the teacher too.

    Raises:
        ValueError: if a hyper-parameter is out of range.

    Example:
        >>> from lightning_unlearn.methods.attention_distillation import NeuralAttentionDistillation
        >>> NeuralAttentionDistillation(betas=(1000.0,)).name
        'NeuralAttentionDistillation'
    """

    def __init__(
        self,
        *,
        betas: Sequence[float] = (500.0, 1000.0, 1000.0),
        teacher_epochs: int = 10,
        learning_rate: float = 1e-2,
        weight_decay: float = 5e-4,
        batch_size: int = 256,
        max_epochs: int = 100,
        accuracy_drop: float = 0.1,
    ) -> None:
        if not betas:
            raise ValueError("betas: expected at least one weight, but got none.")
        for beta in betas:
            check_range("betas", beta, 0, float("inf"))
        check_range("teacher_epochs", teacher_epochs, 1, float("inf"))
        check_range("max_epochs", max_epochs, 0, float("inf"))
        self.betas = tuple(betas)
        self.teacher_epochs = teacher_epochs
        # It checks the rest.
        self.teacher = FineTuning(
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            batch_size=batch_size,
            max_epochs=teacher_epochs,
            accuracy_drop=accuracy_drop,
        )
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.max_epochs = max_epochs
        self.accuracy_drop = accuracy_drop

    def refuse_misfit(self, subject: Subject) -> None:
        """Asks for a convolution whose output has more than one position."""
        _find_places(subject, len(self.betas))

    def repair(self, task: RepairTask) -> Iterator[Round]:
        """Train the teacher, store its maps, and train the victim towards them; both in rounds of fine-tuning."""
        places = _find_places(task.subject, len(self.betas))
        betas = self.betas[-len(places) :]
        victim = Snapshot([*task.model.parameters(), *task.model.buffers()])
        yield from self.teacher.repair(task)
        with torch.no_grad():
            wanted = _teach(task, places)
        victim.put_back()

        parameters = [p for p in task.model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=self.learning_rate, momentum=0.9, weight_decay=self.weight_decay)

        def step(chosen: Tensor) -> None:
            optimizer.zero_grad()
            with _watched(places) as maps:
                logits = task.logits(task.scoring.clean[chosen])
            loss = F.cross_entropy(logits, task.scoring.labels[chosen])
            for beta, given, taught in zip(betas, maps(), wanted, strict=True):
                if given is not None:
                    loss = loss + beta * F.mse_loss(given, taught[chosen])
            loss.backward()  # type: ignore[no-untyped-call]  # torch's is untyped
            optimizer.step()

        yield from train_epochs(
            task,
            optimizer,
            step,
            batch_size=self.batch_size,
            max_epochs=self.max_epochs,
            norms="trained",
            accuracy_drop=self.accuracy_drop,
        )


class _Place(NamedTuple):
    """Where attention is looked at: a convolution, and the resolution of its output, since it may run at several."""

    convolution: nn.Module
    resolution: tuple[int, ...]


@torch.no_grad()
def _find_places(subject: Subject, most: int) -> tuple[_Place, ...]:
    """The last convolution that runs at each of the last ``most`` resolutions, in the order in which they run."""
    last: dict[tuple[int, ...], nn.Module] = {}

    def note(convolution: nn.Module, _: Any, output: Tensor) -> None:
        resolution = tuple(output.shape[2:])
        last.pop(resolution, None)  # to the end of the dictionary, as the last to have run
        if resolution.count(1) < len(resolution):
            last[resolution] = convolution

    handles = [layer.convolution.register_forward_hook(note) for layer in subject.layers]
    try:
        subject.logits()
    finally:
        for handle in handles:
            handle.remove()
    if not last:
        raise ValueError(
            f"model: NeuralAttentionDistillation needs a convolution whose output has more than one position, but "
            f"none of {subject.convolutions()} gives one; FineTuning and MaskPrune work without."
        )
    return tuple(_Place(convolution, resolution) for resolution, convolution in list(last.items())[-most:])


@contextmanager
def _watched(places: Sequence[_Place]) -> Iterator[Callable[[], list[Tensor | None]]]:
    """Keep the outputs of a forward pass within the ``with`` block; what is yielded gives their maps, (N, H·W) each.

    Where a layer did not run, as stochastic depth has it in train mode, there is None. The maps are to be made after
    the pass: an activation that works in place writes into the outputs.
    """
    outputs: dict[_Place, Tensor] = {}

    def note(convolution: nn.Module, _: Any, output: Tensor) -> None:
        place = _Place(convolution, tuple(output.shape[2:]))
        if place in places:
            outputs[place] = output

    handles = [module.register_forward_hook(note) for module in {place.convolution for place in places}]
    try:
        yield lambda: [_attention(outputs[place]) if place in outputs else None for place in places]
    finally:
        for handle in handles:
            handle.remove()


def _attention(output: Tensor) -> Tensor:
    """A, (N, positions), of a layer's output, (N, C, *positions)."""
    return F.normalize(output.float().square().sum(1).flatten(1))


@torch.no_grad()
def _teach(task: RepairTask, places: Sequence[_Place]) -> list[Tensor]:
    """The maps of all scoring images, (N, positions) each, of the model as it is now."""
    batches: list[list[Tensor]] = []
    for pairs in task.scoring.batches(task.batch_size):
        with _watched(places) as maps:
            task.logits(pairs.clean)
        batches.append([given for given in maps() if given is not None])  # in eval mode all layers run
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]
