"""Others who are told what a run does: TensorBoard's files, MLflow, Weights & Biases, trackio.

A run's folder has everything without them. So one that fails is said once and told no
more, and the run goes on. `tracking.json` in the run's folder keeps under which name each
knows the run, and the last epoch that it was told: a run that goes on is the same run there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from featstore.errors import RunError, UsageError
from featstore.publish import read_json, write_json
from trainer.run.events import EventLog

if TYPE_CHECKING:
    from trainer.config import Config, TrackConfig
    from trainer.run.folder import Run

FILE = "tracking.json"
Record = Mapping[str, Any]
ENDS = {"finished": "FINISHED", "stopped": "KILLED"}
# MLflow would try for minutes, at each epoch, to reach a server that is gone.
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


class Tracker(Protocol):
    """One who is told; whatever it raises, the run goes on."""

    def begin(self, known: str | None) -> str:
        """Open the run there.

        Args:
            known: What this returned when the run was begun, if it goes on.

        Returns:
            Under which name it knows the run.
        """
        ...

    def epoch(self, number: int, figures: Mapping[str, float]) -> None:
        """Take the figures of an epoch, counted from 1."""
        ...

    def end(self, status: str, best: Mapping[str, float], files: Sequence[Path]) -> None:
        """Close the run there.

        Args:
            status: "finished" or "stopped".
            best: The figures of the best epoch.
            files: Small ones of the run's folder.
        """
        ...


class MlflowTracker:
    """MLflow, at MLFLOW_TRACKING_URI, by its client: several runs may be open at once."""

    def __init__(self, project: str, name: str, group: str, params: Record, folder: Path) -> None:
        for key, value in PATIENCE.items():
            os.environ.setdefault(key, value)
        from mlflow.tracking import MlflowClient

        self.project, self.name, self.group = project, name, group
        self.params, self.folder = params, folder
        self._client = MlflowClient()
        self._run_id = ""

    def begin(self, known: str | None) -> str:
        from mlflow.entities import Param

        client = self._client
        if known is not None:
            client.update_run(known, status="RUNNING")
            self._run_id = known
            return known
        found = client.get_experiment_by_name(self.project)
        experiment = found.experiment_id if found else client.create_experiment(self.project)
        tags = {"folder": str(self.folder), **({"search": self.group} if self.group else {})}
        self._run_id = client.create_run(experiment, run_name=self.name, tags=tags).info.run_id
        params = [Param(key, str(value)) for key, value in self.params.items()]
        client.log_batch(self._run_id, params=params)
        return self._run_id

    def epoch(self, number: int, figures: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(key, value, now, number) for key, value in figures.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def end(self, status: str, best: Mapping[str, float], files: Sequence[Path]) -> None:
        for key, value in best.items():
            self._client.log_metric(self._run_id, key, value)
        for file in files:
            self._client.log_artifact(self._run_id, str(file))
        self._client.set_terminated(self._run_id, ENDS[status])


class WandbTracker:
    """Weights & Biases; WANDB_MODE=offline keeps it in the run's folder."""

    def __init__(self, project: str, name: str, group: str, params: Record, folder: Path) -> None:
        import wandb

        settings = wandb.Settings(silent=True, console="off")
        self._open = lambda known: wandb.init(
            project=project,
            name=name,
            group=group or None,
            id=known,
            resume="allow" if known else None,
            dir=str(folder),
            config=dict(params),
            reinit="create_new",
            settings=settings,
        )

    def begin(self, known: str | None) -> str:
        self._run = self._open(known)
        return str(self._run.id)

    def epoch(self, number: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=number)

    def end(self, status: str, best: Mapping[str, float], files: Sequence[Path]) -> None:
        self._run.summary.update(dict(best))
        for file in files:
            self._run.save(str(file), base_path=str(file.parent), policy="now")
        self._run.finish(exit_code=0 if status == "finished" else 1)


class TrackioTracker:
    """trackio, in TRACKIO_DIR, or a server or Space that its own variables name."""

    def __init__(self, project: str, name: str, group: str, params: Record, folder: Path) -> None:
        import trackio

        self._open = lambda: trackio.init(
            project=project,
            name=name,
            group=group or None,
            config={**params, "folder": str(folder)},
            resume="allow",
            embed=False,
        )

    def begin(self, known: str | None) -> str:
        self._run = self._open()
        return str(self._run.name)

    def epoch(self, number: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=number)

    def end(self, status: str, best: Mapping[str, float], files: Sequence[Path]) -> None:
        if best:
            self._run.log(dict(best))
        self._run.finish()


MAKERS: dict[str, Callable[..., Tracker]] = {
    "mlflow": MlflowTracker,
    "wandb": WandbTracker,
    "trackio": TrackioTracker,
}


def check_trackers(track: TrackConfig) -> None:
    """See that the packages of those who are to be told are there.

    Raises:
        UsageError: One is not.
    """
    for name in track.to:
        if name in MAKERS and importlib.util.find_spec(name) is None:
            raise UsageError(
                f"[track] to: {name} is not installed; `pip install 'featstore[{name}]'`, or leave"
                " it out with --track tensorboard"
            )


def params_of(config: Config, manifest: Record) -> dict[str, Any]:
    """Return a run's settings, and what it reads, as others show and compare them."""
    data = manifest["data"]
    return {
        **dataclasses.asdict(config.train),
        "vit": Path(config.encoders.vit).name,
        "text": Path(config.encoders.text).name,
        "dtype": config.store.dtype,
        "tokens": config.store.tokens,
        "init_from": manifest["init_from"],
        "rows_digest": data["rows_digest"],
        "splits_digest": data["splits_digest"],
        "trainable_parameters": manifest["parameters"]["trainable"],
    }


class Tracking:
    """All who are told of one run.

    Args:
        config: The run's settings, and who is told.
        run: The run.
        manifest: What is known of it when it begins.
        hparams: What a search chose for it.
        note: Says what went wrong with one of them.
    """

    def __init__(
        self,
        config: Config,
        run: Run,
        manifest: Record,
        hparams: Record | None,
        note: Callable[[str], None],
    ) -> None:
        track = config.track
        check_trackers(track)
        self.track, self.run, self.hparams = track, run, hparams
        self._params = params_of(config, manifest)
        self._note = note
        self._path = run.folder / FILE
        self._known: dict[str, Any] = {}
        self._open: dict[str, Tracker] = {}
        self._events = EventLog(run.tensorboard_path) if "tensorboard" in track.to else None

    def begin(self, history: Sequence[Record]) -> None:
        """Open the run everywhere; tell of epochs that one has not heard of."""
        if self._events is not None and self.hparams is not None:
            self._events.hparams(self.hparams, self.run.name)
        names = [name for name in self.track.to if name in MAKERS]
        if names and self._path.exists():
            try:
                self._known = dict(read_json(self._path))
            except RunError as error:
                self._note(f"{error.message}; the run is another one there")
        group = self.run.folder.parent.name if self.hparams is not None else ""
        for name in names:
            self._told(name, self._begin, name, group, history)

    def _begin(self, name: str, group: str, history: Sequence[Record]) -> None:
        arguments = self.track.project, self.run.name, group, self._params, self.run.folder
        tracker = MAKERS[name](*arguments)
        known = self._known.get(name, {})
        known = {"id": tracker.begin(known.get("id")), "epoch": known.get("epoch", 0)}
        self._known[name] = known
        self._open[name] = tracker
        write_json(self._path, self._known)
        for record in history:
            if record["epoch"] > known["epoch"]:
                self._tell(name, record)

    def _tell(self, name: str, record: Record) -> None:
        self._open[name].epoch(int(record["epoch"]), _figures(record))
        self._known[name]["epoch"] = int(record["epoch"])

    def epoch(self, record: Record) -> None:
        """Tell of an epoch.

        Raises:
            WriteError: TensorBoard's file cannot be written.
        """
        if self._events is not None:
            self._events.epoch(record)
        for name in list(self._open):
            self._told(name, self._tell, name, record)
        if self._open:
            write_json(self._path, self._known)

    def end(self, status: str, history: Sequence[Record], best_epoch: int) -> None:
        """Close the run everywhere.

        Args:
            status: "finished" or "stopped".
            history: Its epochs.
            best_epoch: Position of the best in them.
        """
        if self._events is not None:
            self._events.close()
        best = _figures(history[best_epoch]) if history else {}
        best = {f"best_{key}": value for key, value in best.items()}
        run = self.run
        small = (run.config_path, run.manifest_path, run.metrics_path, run.history_path)
        # The picture of a trial is drawn meanwhile.
        drawn = () if self.hparams is not None else (run.curves_path,)
        files = [path for path in (*small, *drawn) if path.exists()]
        for name in list(self._open):
            self._told(name, self._open[name].end, status, best, files)
        self._open = {}

    def _told(self, name: str, tell: Callable[..., None], *arguments: Any) -> None:
        """Tell one; where that fails, say so once and leave it alone."""
        try:
            # Some print where they can be looked at; the output is the command's own.
            with contextlib.redirect_stdout(sys.stderr):
                tell(*arguments)
        # Whatever a server or its client may raise: the run is worth more.
        except Exception as error:
            self._open.pop(name, None)
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            self._note(f"{self.run.name}: {name} is told no more ({reason[:200]}); the run goes on")


def _figures(record: Record) -> dict[str, float]:
    """Return the numbers of an epoch's record."""
    return {
        key: float(value) for key, value in record.items() if key != "epoch" and value is not None
    }
