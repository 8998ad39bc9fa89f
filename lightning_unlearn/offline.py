"""A finished checkpoint and a Trainer that runs some work on it, without any training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import lightning.pytorch as L  # noqa: N812 - the usual name
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities.rank_zero import (  # type: ignore[attr-defined]  # public, but re-exported implicitly
    rank_zero_warn,
)
from torch.utils.data import DataLoader

from lightning_unlearn.callback import BackdoorUnlearning
from lightning_unlearn.checkpoint import Checkpoint, load_checkpoint
from lightning_unlearn.folder import Folder

__all__ = ["CheckpointCLI", "from_python", "load_into", "on_checkpoint"]

_T = TypeVar("_T")


class CheckpointCLI(LightningCLI):
    """LightningCLI that builds model, callback and Trainer, and runs nothing by itself.

    Attributes:
        command: its name on the command line.
        description: what it does.
        writes: where it writes if it is told no folder.
    """

    command = "repair"
    description = "Remove a backdoor from a finished checkpoint. The original is only read."
    writes = "by default unlearning.output_dir, or else the checkpoint's own folder, where nothing is overwritten"

    def __init__(self, args: Sequence[str]) -> None:
        with from_python():
            super().__init__(
                args=list(args),
                run=False,
                parser_kwargs={
                    "prog": f"lightning-unlearn {self.command}",
                    "usage": "%(prog)s --config FILE --ckpt_path FILE [--output_dir FOLDER] [OPTION ...]",
                    "description": self.description,
                },
                # Else a DataModule nested in the callback silently gets the training DataModule's hyper-parameters.
                load_from_checkpoint_support=False,
                save_config_callback=None,
                trainer_defaults={
                    "enable_checkpointing": False,
                    "enable_model_summary": False,
                    "inference_mode": False,
                },
            )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what every command on a finished checkpoint takes."""
        parser.add_argument("--ckpt_path", type=str, required=True, help="Finished checkpoint; it is only read.")
        parser.add_argument(
            "--output_dir",
            type=str,
            default=None,
            help=f"New or empty folder for what is written; {self.writes}.",
        )
        parser.add_lightning_class_args(BackdoorUnlearning, "unlearning", subclass_mode=True)  # or one of their own

    def before_instantiate_classes(self) -> None:
        """Refuse an output folder that cannot be used before anything is made, and send logs there, too.

        Where the command is told none, it is the callback's.

        Raises:
            FileExistsError: if it holds anything.
            OSError: if nothing can be written to it.
        """
        output_dir = self.config["output_dir"] or self.config["unlearning"]["init_args"]["output_dir"]
        if not output_dir:
            return
        self.config["output_dir"] = output_dir
        if getattr(rank_zero_only, "rank", 0) == 0:  # a second process starts when the first has written there
            folder = Folder(output_dir)
            folder.refuse_used()
            folder.refuse_unwritable()
        self.config["trainer"]["default_root_dir"] = output_dir


class _Job(L.LightningModule, Generic[_T]):
    """Lets a Trainer put a finished model on its devices and run some work there, without any training loop.

    Args:
        model: the model.
        work: what to do with it, once in each process.
    """

    def __init__(self, model: L.LightningModule, work: Callable[[L.Trainer, L.LightningModule], _T]) -> None:
        super().__init__()
        self.model = model
        self._work = work
        self.result: _T | None = None

    def predict_dataloader(self) -> DataLoader[int]:
        """One item a process."""
        items = list(range(self.trainer.world_size))
        return DataLoader(items)  # type: ignore[arg-type]  # a list will do as a dataset

    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        """Do the work, the first time."""
        if self.result is None:
            self.result = self._work(self.trainer, self.model)
        return batch  # Lightning warns about a prediction of nothing


def load_into(cli: CheckpointCLI) -> Checkpoint:
    """Load the checkpoint that a command was given into the model that it configured; the checkpoint.

    The model is built and loaded as Lightning would: in ``configure_model`` and ``setup`` where it has these, with
    ``on_load_checkpoint`` and its own ``strict_loading``.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it cannot be loaded safely, or is of another model.
    """
    path, model = cli.config["ckpt_path"], cli.model
    checkpoint = load_checkpoint(path)
    model.trainer = cli.trainer
    model.configure_model()
    checkpoint = checkpoint.named_as(model.state_dict())
    if not checkpoint.weights.keys() <= model.state_dict().keys():
        model.setup("predict")  # not "fit", since there is no training data to look at
        checkpoint = checkpoint.named_as(model.state_dict())
    loaded: dict[str, Any] = {"state_dict": checkpoint.weights}  # a copy, which the model may change
    if checkpoint.entry == "state_dict":
        loaded = {**checkpoint.content, **loaded}
    model.on_load_checkpoint(loaded)
    try:
        keys = model.load_state_dict(loaded["state_dict"], strict=model.strict_loading)
        if not model.strict_loading and len(keys.unexpected_keys) == len(loaded["state_dict"]):
            raise RuntimeError("Nothing of it is in the model.")
    except RuntimeError as error:
        problem = str(error).splitlines()[-1].strip()  # one of many, most often
        raise ValueError(
            f"ckpt_path: {path!r} does not fit {type(model).__name__} as the configuration makes it; give `model` the "
            "arguments that it was trained with, and let it make all its layers in __init__, in configure_model or in "
            f"setup whatever the stage. ({problem})"
        ) from error
    if not model.strict_loading and any(keys):
        rank_zero_warn(
            f"ckpt_path: {path!r} was loaded with strict_loading=False: it lacks {len(keys.missing_keys)} of the "
            f"model's tensors, and the model {len(keys.unexpected_keys)} of its own."
        )
    return checkpoint


def on_checkpoint(cli: CheckpointCLI, work: Callable[[L.Trainer, L.LightningModule], _T]) -> _T:
    """Do a command's work on its model, on the Trainer's devices; what came of it.

    Raises:
        ValueError: if the strategy's processes would end with the work, and what came of it with them, or if nothing
            was done: nobody may take silence for a result.
    """
    launcher = cli.trainer.strategy.launcher
    if isinstance(launcher, _MultiProcessingLauncher):
        raise ValueError(
            f"trainer: {type(cli.trainer.strategy).__name__} with start_method={launcher._start_method!r} works in "
            "processes that give nothing back; use strategy='ddp', or one device."
        )
    job = _Job(cli.model, work)
    cli.trainer.limit_predict_batches = 1  # all is done in the first one, whatever the Trainer was told
    cli.trainer.predict(job, return_predictions=False)
    if job.result is None:
        raise ValueError(f"trainer: {type(cli.trainer).__name__}.predict ran no batch, so that nothing was done.")
    return job.result


@contextmanager
def from_python() -> Iterator[None]:
    """LightningCLI warns when it is given arguments while the process has some, too; here they are the same."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        yield
