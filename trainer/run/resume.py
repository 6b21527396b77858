"""Going on with a run by its name: one that was stopped, or a finished one for longer."""

from __future__ import annotations

import dataclasses

from featstore.errors import Advice, Command, UsageError
from trainer.config import DECAYS, Config, TrainConfig
from trainer.run.folder import Run

LENGTHS = ("epochs", "early_stop_patience")
"""Settings of `[train]` that decide when a run ends and nothing else: no step or rate depends on
them. So a run that goes on with larger ones gives what they would have given from the start.
But for the epochs of one whose learning rate falls until the last of them."""


def check_resumable(run: Run, config: Config) -> None:
    """Allow a new run, one that was stopped, or one that is to be trained for longer.

    Args:
        run: A run's folder, which need not be there.
        config: The settings asked for. Of a run that is there, those of `LENGTHS` may be
            larger than its own; the others are the same.

    Raises:
        UsageError: The name is taken by something else, by a run with other settings, or
            by a finished run that these settings do not make longer, or that kept no
            state to go on from; or the learning rate depends on the epochs.
        RunError: Its state cannot be read.
    """
    if not run.exists:
        run.check_free_or_same(config)
        return
    own, train = run.config.train, config.train
    longer = {
        name: getattr(own, name) for name in LENGTHS if getattr(train, name) > getattr(own, name)
    }
    if "epochs" in longer and own.lr_schedule in DECAYS:
        raise UsageError(
            f"{run.folder}: its learning rate falls until epoch {own.epochs} (lr_schedule"
            f" {own.lr_schedule}), so with more epochs it is another run",
            Advice("start one from its weights with ", Command("train", init_from=run.name)),
        )
    same = Config.of(config, dataclasses.replace(train, **longer))
    run.check_free_or_same(same, longer=bool(longer))
    if longer and run.manifest["status"] == "finished":
        _check_longer(run, train)


def _check_longer(run: Run, train: TrainConfig) -> None:
    """Refuse a finished run that has no state, or that would end where it ended."""
    if not run.checkpoint_path.is_file():
        raise UsageError(
            f"{run.folder}: a finished run that kept no state ({run.checkpoint_path.name}), so it"
            " cannot be trained for longer",
            Advice(
                "start another run from its weights with ",
                Command("train", init_from=run.name),
                ", whose optimizer starts anew",
            ),
        )
    # Here, since it imports Keras.
    from trainer.run.checkpoint import read_progress

    progress = read_progress(run.checkpoint_path)
    if progress.ended(train) == "early stop":
        raise UsageError(
            f"{run.folder}: ended early: {train.monitor} had not improved for {progress.waited}"
            f" epochs after epoch {progress.epoch}; more epochs change nothing",
            Advice(
                "go on with ",
                Command(
                    "train",
                    name=run.name,
                    epochs=max(train.epochs, progress.epoch + 1),
                    early_stop_patience=progress.waited + 1,
                    bare=True,
                ),
            ),
        )
