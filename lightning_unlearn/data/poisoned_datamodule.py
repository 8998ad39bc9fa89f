"""A DataModule whose training images an attacker has poisoned."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import BatchSampler, DataLoader

from lightning_unlearn.data.poisoned import PoisonedDataset, Policy, check_poisoning
from lightning_unlearn.triggers import Trigger, find_normalization

__all__ = ["PoisonedDataModule"]

# What the wrapped DataModule does for itself.
_PASSED_ON = (
    "prepare_data",
    "val_dataloader",
    "test_dataloader",
    "predict_dataloader",
    "on_before_batch_transfer",
    "transfer_batch_to_device",
    "on_after_batch_transfer",
    "state_dict",
    "load_state_dict",
    "on_exception",
    "teardown",
)


class PoisonedDataModule(LightningDataModule):
    """Wraps any DataModule and poisons its training images, to make a victim; validation and test stay clean.

    Items of the wrapped training dataset are stamped as they come, before they are batched, so an augmenting
    transform of that dataset runs before the trigger is put on. Batch size, shuffling, workers and collate function
    stay those of the wrapped loader; its dataset then gives ``(image, label)`` tuples (see `PoisonedDataset`). If that
    dataset normalises with torchvision's ``Normalize`` and ``trigger`` was told no mean and std, the trigger is
    adapted to it.

    Args:
        datamodule: the DataModule to poison; its ``train_dataloader`` must give one ``DataLoader``.
        trigger: what to put on the images, and the class that the attacker wants.
        ratio: which part of the training images is poisoned, in [0, 1].
        cross_ratio: which part becomes a cross image, in [0, 1 - ratio].
        policy: which images are stamped and what becomes of their label.
        seed: chooses the images and what cross images look like.

    Attributes:
        poisoned: the poisoned training dataset, once ``train_dataloader`` was called.

    Raises:
        TypeError: if ``datamodule`` is no ``lightning.pytorch.LightningDataModule`` or ``trigger`` no `Trigger`, or
            (on ``train_dataloader``) the wrapped loader is not one ``DataLoader``.
        ValueError: as `PoisonedDataset` raises it, or if LightningCLI mixed up hyper-parameters.

    Example:
        >>> from lightning_unlearn.data import DigitsDataModule
        >>> from lightning_unlearn.triggers import PatchTrigger
        >>> data = PoisonedDataModule(DigitsDataModule(batch_size=50), PatchTrigger(size=3, target=0), ratio=0.1)
        >>> images, labels = next(iter(data.train_dataloader()))
        >>> images.shape, len(data.poisoned), len(data.poisoned.poison_indices)
        (torch.Size([50, 1, 32, 32]), 1000, 100)
    """

    def __init__(
        self,
        datamodule: LightningDataModule,
        trigger: Trigger,
        *,
        ratio: float = 0.1,
        cross_ratio: float = 0.0,
        policy: Policy = "target",
        seed: int = 0,
    ) -> None:
        if not isinstance(datamodule, LightningDataModule):
            raise TypeError(
                "datamodule must be a LightningDataModule of lightning.pytorch (not of pytorch_lightning), "
                f"but is {type(datamodule).__module__}.{type(datamodule).__name__}"
            )
        check_poisoning(trigger, ratio=ratio, cross_ratio=cross_ratio, policy=policy)
        if "_instantiator" in datamodule.hparams and {"datamodule", "trigger"} <= set(datamodule.hparams):
            raise ValueError(
                f"datamodule: LightningCLI gave {type(datamodule).__name__} the hyper-parameters of the "
                "PoisonedDataModule around it: create LightningCLI with load_from_checkpoint_support=False"
            )
        self.datamodule = datamodule
        super().__init__()
        self.trigger = trigger
        self.ratio = ratio
        self.cross_ratio = cross_ratio
        self.policy: Policy = policy
        self.seed = seed
        self.poisoned: PoisonedDataset | None = None
        self.prepare_data_per_node = datamodule.prepare_data_per_node
        # Bound methods, not methods of this class that call them: Lightning compares code to see whether a hook is
        # overridden, and a transfer hook seen here would be preferred to the model's own.
        for hook in _PASSED_ON:
            setattr(self, hook, getattr(datamodule, hook))

    @property
    def trainer(self) -> Trainer | None:
        """The Trainer in use, which the wrapped DataModule sees too."""
        return self.datamodule.trainer

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        self.datamodule.trainer = trainer

    def setup(self, stage: str) -> None:
        """Sets the wrapped DataModule up."""
        self.datamodule.setup(stage)

    def train_dataloader(self) -> DataLoader[Any]:
        """The wrapped training loader over poisoned images."""
        loader = self.datamodule.train_dataloader()
        if not isinstance(loader, DataLoader):
            raise TypeError(
                f"datamodule: train_dataloader() must give one DataLoader, but {type(self.datamodule).__name__}'s "
                f"gives a {type(loader).__name__}"
            )
        # Labels are read once, not at every reload.
        if self.poisoned is None or self.poisoned.dataset is not loader.dataset:
            self.poisoned = self._poison(loader.dataset)
        return _with_dataset(loader, self.poisoned)

    def _poison(self, dataset: Any) -> PoisonedDataset:
        trigger = self.trigger
        normalization = find_normalization(dataset) if trigger.normalization is None else None
        if normalization is not None:
            trigger = trigger.normalized(normalization)
        return PoisonedDataset(
            dataset,
            trigger,
            ratio=self.ratio,
            cross_ratio=self.cross_ratio,
            policy=self.policy,
            seed=self.seed,
        )


def _with_dataset(loader: DataLoader[Any], dataset: PoisonedDataset) -> DataLoader[Any]:
    """Builds the same loader over another dataset of the same length; a sampler only deals in indices."""
    batching: dict[str, Any]
    if loader.batch_sampler is None:
        batching = {"batch_size": None, "sampler": loader.sampler}
    elif type(loader.batch_sampler) is BatchSampler:
        batching = {"batch_size": loader.batch_size, "sampler": loader.sampler, "drop_last": loader.drop_last}
    else:
        batching = {"batch_sampler": loader.batch_sampler}
    return DataLoader(
        dataset,
        **batching,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )
