"""The defender's clean images, from whatever the user has them in, as a repair takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.core.hooks import DataHooks
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler, Subset

from lightning_unlearn.data.collating import refuse_uncollatable
from lightning_unlearn.data.drawn import images_of
from lightning_unlearn.data.holdout_datamodule import HoldoutDataModule
from lightning_unlearn.data.labels import is_unlabelled, item_parts, overlap
from lightning_unlearn.data.pairs import Pairs
from lightning_unlearn.data.unlabelled import PredictedLabels, first_image
from lightning_unlearn.intact import intact
from lightning_unlearn.memory import is_of_machine
from lightning_unlearn.processes import ALONE, Processes
from lightning_unlearn.triggers import Normalization, Trigger, find_normalization

__all__ = ["CleanImages", "as_taken", "dtype_of", "refuse_training_data"]


class CleanImages:
    """Draws the scoring and validation parts, finds the test part, and loads them onto the module's device.

    Batches pass the clean DataModule's own transfer hooks where it has some, else the module's, as Lightning would
    do in evaluation, even while the Trainer is training: not those of the *training* DataModule, which the Trainer's
    own functions would call.

    Args:
        data: a :class:`HoldoutDataModule`, which knows its own draw; or a Dataset, a DataLoader, or any other
            LightningDataModule, whose ``train_dataloader`` is drawn from and whose ``test_dataloader``, if it has
            one, is the test part.
        module: the model that the images are for.
        trainer: the Trainer that a clean DataModule belongs to while it is used; the module's own by default.
        logits: how to get logits from images, for images without labels: the model's own answers stand in for them.
        samples_per_class: clean images drawn per class; None for all. Not used for a :class:`HoldoutDataModule`.
        validation_share: as for :class:`HoldoutDataModule`; not used for one.
        seed: seed of the draw; not used for a :class:`HoldoutDataModule`.
        skip_missing: as for :class:`HoldoutDataModule`; not used for one.

    Raises:
        TypeError: if ``data`` is none of these.
        ValueError: if the draw is impossible, or test images are among those drawn.
    """

    def __init__(
        self,
        data: LightningDataModule | Dataset[Any] | DataLoader[Any],
        module: LightningModule,
        *,
        trainer: Trainer | None = None,
        logits: Callable[[Tensor], Tensor] | None = None,
        samples_per_class: int | None = 10,
        validation_share: float = 0.1,
        seed: int = 0,
        skip_missing: bool = False,
    ) -> None:
        self.module = module
        # The Trainer that a module was attached to; Fabric's stand-in for one has no stages.
        attached = getattr(module, "_trainer", None)
        self._trainer = trainer or (attached if isinstance(attached, Trainer) else None)
        self._hooks: DataHooks = data if isinstance(data, LightningDataModule) else module
        self._collate: Any = None
        self._unlabelled: Dataset[Any] | None = None
        if isinstance(data, HoldoutDataModule):
            self.holdout = data
            self._test_loader = None if data.test is None else data.test_dataloader()
            return
        pool, self._test_loader = self._open(data)
        drawn_from = partial(
            HoldoutDataModule,
            samples_per_class=samples_per_class,
            share=1.0 if samples_per_class is None else None,
            validation_share=validation_share,
            seed=seed,
            test_dataset=None if self._test_loader is None else images_of(self._test_loader),
            skip_missing=skip_missing,
        )
        if logits is None or not is_unlabelled(pool):
            self.holdout = drawn_from(pool)
            return
        self._unlabelled = pool
        self._collate = None  # what made batches of images alone
        self._draw: Callable[[], HoldoutDataModule] = lambda: drawn_from(
            PredictedLabels(pool, lambda images: self._predicted(images, logits))
        )

    @property
    def labels(self) -> Literal["given", "predicted"]:
        """Where labels come from."""
        return "given" if self._unlabelled is None else "predicted"

    @cached_property
    def holdout(self) -> HoldoutDataModule:
        """The draw; of images alone it is by what the model answers when it is first asked for."""
        return self._draw()

    @property
    def sample(self) -> Tensor | None:
        """Where there are no labels, one image that needs no draw, as a batch on the module's device; else None."""
        return None if self._unlabelled is None else first_image(self._unlabelled).to(self.module.device)

    def _open(
        self, data: LightningDataModule | Dataset[Any] | DataLoader[Any]
    ) -> tuple[Dataset[Any], DataLoader[Any] | None]:
        """What to draw from, and the test part if there is one; remembers the collate function on the way."""
        test_loader: DataLoader[Any] | None = None
        if isinstance(data, LightningDataModule):
            with self._under_trainer():
                self._prepare(data)
                data.setup("fit")
                pool = data.train_dataloader()
                if is_overridden("test_dataloader", data, LightningDataModule):
                    data.setup("test")
                    test_loader = data.test_dataloader()
                    if not isinstance(test_loader, DataLoader):
                        raise TypeError(
                            f"clean_data: test_dataloader of {type(data).__name__} must give one DataLoader, but got "
                            f"{type(test_loader).__module__}.{type(test_loader).__name__}."
                        )
            data = pool
        if isinstance(data, DataLoader):
            self._collate = data.collate_fn
            return images_of(data, "clean_data"), test_loader
        if isinstance(data, Dataset):
            return data, test_loader
        raise TypeError(
            "clean_data: expected a LightningDataModule of lightning.pytorch, a Dataset, a DataLoader, or a DataModule "
            f"whose train_dataloader gives one DataLoader, but got {type(data).__module__}.{type(data).__name__}."
        )

    def _prepare(self, data: LightningDataModule) -> None:
        """Let it download where Lightning would: on one process a node, or on one in all."""
        trainer = self._trainer
        if trainer is None:
            data.prepare_data()
            return
        if trainer.local_rank == 0 if data.prepare_data_per_node else trainer.is_global_zero:
            data.prepare_data()
        trainer.strategy.barrier("clean_data.prepare_data")

    @contextmanager
    def _under_trainer(self, stage: RunningStage | None = None) -> Iterator[None]:
        """Let the clean DataModule find the Trainer, and all hooks one that is at ``stage``, if that is given."""
        trainer, data = self._trainer, self._hooks
        if trainer is None:
            yield
            return
        before = trainer.state.stage
        owner = data.trainer if isinstance(data, LightningDataModule) else None
        try:
            if isinstance(data, LightningDataModule):
                data.trainer = trainer
            trainer.state.stage = stage or before
            yield
        finally:
            trainer.state.stage = before
            if isinstance(data, LightningDataModule):
                data.trainer = owner

    def _predicted(self, images: Tensor, logits: Callable[[Tensor], Tensor]) -> Tensor:
        with intact(self.module), torch.no_grad():
            return logits(images.to(self.module.device, dtype_of(self.module)))

    @property
    def has_test(self) -> bool:
        """Whether there are test images, which a repair never sees."""
        return self._test_loader is not None

    @property
    def normalization(self) -> Normalization | None:
        """The images' normalisation, if the dataset tells it."""
        return find_normalization(self.holdout.scoring if self._unlabelled is None else self._unlabelled)

    def fit_trigger(self, trigger: Trigger) -> Trigger:
        """The trigger, told these images' normalisation if it was told none and the dataset has one."""
        if trigger.normalization is None and self.normalization is not None:
            return trigger.normalized(self.normalization)
        return trigger

    def refuse_training_images(self, dataset: object) -> None:
        """Refuse to repair a model with the images that it was poisoned with.

        Raises:
            ValueError: if any image drawn is in ``dataset``, the training set.
        """
        for part in (self.holdout.scoring, self.holdout.validation):
            shared = overlap(part, dataset)
            if shared:
                raise ValueError(
                    f"clean_data: {shared} of its images are in the training set itself, which may be poisoned; hold "
                    "out clean images that the model was not trained on."
                )

    def scoring(self) -> tuple[Tensor, Tensor]:
        """Images and labels of the scoring part, on the module's device."""
        return self._all(self.holdout.scoring)

    def validation(self) -> tuple[Tensor, Tensor]:
        """Images and labels of the validation part, on the module's device."""
        return self._all(self.holdout.validation)

    def first_test(self) -> tuple[Tensor, Tensor] | None:
        """The first batch of the test part on the module's device, None if there is no such part.

        Raises:
            ValueError: if there is one without any image.
        """
        if self._test_loader is None:
            return None
        for batch in self._loaded(self._test_loader, RunningStage.TESTING):
            return batch
        raise ValueError("clean_data: its test part holds no image; give it some, or leave it out.")

    def test(self, trigger: Trigger | None, num_classes: int, processes: Processes = ALONE) -> Iterator[Pairs]:
        """Batches of the test part with their triggered copies; nothing is kept in memory.

        Args:
            trigger: what makes the copies; None if nobody knows: then images stand for themselves, so that accuracy can
                be measured, and rates of an attack are NaN.
            num_classes: how many logits the model gives.
            processes: those among which the images are shared out, each once.
        """
        for batch in self._loaded(_shared(self._test_loader, processes), RunningStage.TESTING):
            pairs = Pairs.stamp(*batch, trigger, num_classes=num_classes)
            yield pairs.to(self.module.device, dtype_of(self.module))

    def _all(self, part: Dataset[Any]) -> tuple[Tensor, Tensor]:
        holdout = self.holdout
        loader: DataLoader[Any] = DataLoader(
            part, batch_size=holdout.batch_size, num_workers=holdout.num_workers, collate_fn=self._collate
        )
        images, labels = zip(*self._loaded(loader, RunningStage.VALIDATING), strict=True)
        return torch.cat(images), torch.cat(labels)

    def _loaded(self, loader: Iterable[Any], stage: RunningStage) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels of every batch, transferred as Lightning would do in an evaluation."""
        with refuse_uncollatable("clean_data"):
            for batch in loader:
                # A hook that augments what it is given while the Trainer trains must not do so here.
                with self._under_trainer(stage):
                    batch = self._transferred(batch)
                yield item_parts(batch)

    def _transferred(self, batch: Any) -> Any:
        try:
            batch = self._hook("on_before_batch_transfer")(batch, 0)
            batch = self._hook("transfer_batch_to_device")(batch, self.module.device, 0)
            return self._hook("on_after_batch_transfer")(batch, 0)
        except RuntimeError as error:
            if is_of_machine(error):
                raise
            raise ValueError(
                f"clean_data: a transfer hook of {type(self.module).__name__} or of the DataModule cannot take its "
                f"images as they are; check their channels, size and type. ({error})"
            ) from error

    def _hook(self, name: str) -> Any:
        owner = self._hooks if is_overridden(name, self._hooks, DataHooks) else self.module
        return getattr(owner, name)


def dtype_of(module: LightningModule) -> torch.dtype:
    """The floating-point type in which a repair gives images to a model: that of its first parameter."""
    first = next(module.parameters(), None)
    return module.dtype if first is None else first.dtype  # type: ignore[return-value]  # never the str it may be


def as_taken(images: Tensor, module: LightningModule) -> Tensor:
    """Images as a repair gives them to a model: others than floating-point ones stay as they are."""
    return images.to(module.device, dtype_of(module) if images.is_floating_point() else None)


def _shared(loader: DataLoader[Any] | None, processes: Processes) -> Iterable[Any]:
    """What this process takes of a loader's batches.

    Lightning would take a ``DistributedSampler``, which repeats images until all processes have as many.
    """
    if loader is None:
        return ()
    if processes.count == 1:
        return loader
    in_order = isinstance(loader.batch_sampler, BatchSampler) and isinstance(loader.sampler, SequentialSampler)
    if isinstance(loader.dataset, IterableDataset) or not in_order or loader.drop_last:
        # Only the loader itself knows which images it gives, and on another process it might give others.
        return loader if processes.rank == 0 else ()
    indices = range(len(loader.dataset))[processes.share(len(loader.dataset))]  # type: ignore[arg-type]  # it is sized
    return DataLoader(
        Subset(loader.dataset, indices),
        batch_size=loader.batch_size,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )


def refuse_training_data(data: object, training: object) -> None:
    """Refuse clean data that is the training data itself, or may be by a quirk of LightningCLI.

    Args:
        data: the clean data.
        training: the Trainer's DataModule, if it has one.

    Raises:
        ValueError: if they are one.
        MisconfigurationException: if LightningCLI may have given it the other one's hyper-parameters.
    """
    if not isinstance(data, LightningDataModule):
        return
    if data is training:
        raise ValueError(
            "clean_data: it is the training DataModule itself, which may be poisoned; give held-out clean images."
        )
    if "_instantiator" in data.hparams:
        raise MisconfigurationException(
            f"clean_data: LightningCLI gave {type(data).__name__} hyper-parameters that may be the training "
            "DataModule's instead of its own; create the CLI with load_from_checkpoint_support=False, as "
            "`lightning-unlearn fit` does."
        )
