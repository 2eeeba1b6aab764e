"""Averages of weights, which validation measures while training goes on with the weights themselves."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import WeightAveraging
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_avg_fn

from medvision.errors import MedvisionError


class Average(WeightAveraging):
    """What averages of weights share: validation measures the average, training goes on with the weights themselves.

    In a checkpoint `state_dict` is the average, so that whatever loads a run has it, and `current_model_state` are the
    weights, from which a run is resumed. Buffers are averaged like weights: the statistics of batch norms are then
    means of what the averaged networks had, and need no pass over the data of their own.

    Args:
        **options: `avg_fn` or `multi_avg_fn` of torch's AveragedModel.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(use_buffers=True, **options)

    def check(self, trainer: pl.Trainer) -> None:
        """Refuses what cannot be averaged, before anything is begun.

        Raises:
            MedvisionError: If the weights themselves are kept in 16 bit.
        """
        precision = str(trainer.precision)
        if precision in ("16-true", "bf16-true"):
            raise MedvisionError(
                f"trainer.precision={precision} keeps weights in 16 bit, too coarse to be averaged; set "
                f"trainer.precision={precision.removesuffix('-true')}-mixed or callbacks=default"
            )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Makes the average, at first a copy."""
        self.check(trainer)
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Follows the model to its device, which it moves to after `setup`."""
        # the count of updates stays where asking for it does not wait for a GPU
        self._average_model.module.to(pl_module.device)  # type: ignore[union-attr]  # made by setup

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leaves the weights to `Checkpoint`, which comes after and keeps both."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leaves the average in the model."""
        super().on_train_end(trainer, pl_module)


class EMA(Average):
    """The exponential moving average of the weights, updated after each optimizer step (Polyak & Juditsky 1992).

    `decay * average + (1 - decay) * weights`: about the last `1 / (1 - decay)` steps count.

    Args:
        decay: Above 0 and below 1.
        warmup: Step n, from 0, has at most the decay `(1 + n) / (10 + n)`, so that the random weights of the beginning
            are forgotten in a short training too.

    Raises:
        MedvisionError: If `decay` is none.
    """

    def __init__(self, decay: float = 0.999, warmup: bool = True) -> None:
        if not 0 < decay < 1:
            raise MedvisionError(f"callbacks.average.decay is {decay}; expected a number above 0 and below 1")

        def update(averages: Any, weights: Any, count: Any) -> None:
            n = int(self._average_model.n_averaged)  # type: ignore[union-attr]  # it calls this
            now = min(decay, (1 + n) / (10 + n)) if warmup else decay
            get_ema_multi_avg_fn(now)(averages, weights, count)  # type: ignore[no-untyped-call]

        super().__init__(multi_avg_fn=update)


class SWA(Average):
    """Stochastic weight averaging (arXiv:1803.05407): the mean of the weights at the ends of the last epochs.

    The learning rate is that of the schedule; one that falls to nothing, as with scheduler=cosine, leaves little to
    average. Before its epochs begin, the average is the weights themselves. Lightning's StochasticWeightAveraging
    makes the average when training ends: validation and the best epoch would not be those of the average.

    Args:
        share: Which part of the epochs counts, above 0 and at most 1; one epoch at the least.

    Raises:
        MedvisionError: If `share` is none.
    """

    def __init__(self, share: float = 0.25) -> None:
        if not 0 < share <= 1:
            raise MedvisionError(f"callbacks.average.share is {share}; expected a number above 0, at most 1")
        self.share = share
        super().__init__(avg_fn=get_swa_avg_fn())  # type: ignore[no-untyped-call]

    def check(self, trainer: pl.Trainer) -> None:
        """Refuses a training without a last epoch, too.

        Raises:
            MedvisionError: If the number of epochs is not known.
        """
        super().check(trainer)
        if not trainer.max_epochs or trainer.max_epochs < 1 or trainer.max_steps != -1:
            raise MedvisionError(
                f"callbacks=swa averages the last epochs, but trainer.max_epochs is {trainer.max_epochs} and "
                f"trainer.max_steps {trainer.max_steps}; set trainer.max_epochs alone, or callbacks=ema"
            )

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Not by itself."""
        return False

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Averages at the end of an epoch, but before its validation."""
        average = self._average_model
        if average is None or not trainer.is_last_batch:
            return
        epochs = trainer.max_epochs or 1
        if trainer.current_epoch <= epochs - max(1, round(self.share * epochs)):
            average.n_averaged.zero_()  # a copy
        average.update_parameters(pl_module)
