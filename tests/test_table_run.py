"""From a Parquet file with photos in it to features, a run and predictions, as from photo files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from tiny_runs import prepared, tiny_config

import trainer
from featstore.config import DataConfig
from featstore.data.dataset import load_dataset
from featstore.store.folder import shard_paths
from trainer.commands.main import cli
from trainer.config import Config, render_config


def packed(config: Config, path: Path, group_rows: int = 7) -> Path:
    """Write a configuration's rows, with the photos in them and class ids for labels."""
    lines = [json.loads(line) for line in Path(str(config.data.rows)).read_text().splitlines()]
    names = ["entailment", "neutral", "contradiction"]
    photos = Path(config.data.images)
    table = pa.table(
        {
            "image": [
                {"bytes": (photos / f"{line['Image_ID']}.png").read_bytes(), "path": "x.png"}
                for line in lines
            ],
            "image_id": [line["Image_ID"] for line in lines],
            "text": [line["Hypothesis"] for line in lines],
            "label": [names.index(line["Label"]) for line in lines],
        }
    )
    info = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(table, path, row_group_size=group_rows)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_vit: Path, tiny_text: Path) -> Config:
    return tiny_config(tmp_path_factory.mktemp("files"), tiny_vit, tiny_text, epochs=1)


@pytest.fixture(scope="module")
def table(files: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("table")
    rows = packed(files, folder / "rows.parquet")
    return dataclasses.replace(
        files,
        data=DataConfig(rows=str(rows), split_file=files.data.split_file),
        store=dataclasses.replace(files.store, root=str(folder / "cache")),
    )


def folder_of(config: Config) -> Path:
    return Path(config.store.root).parent


def run_of(config: Config, name: str) -> Any:
    return trainer.train(prepared(config), name=name, runs=folder_of(config) / "runs")


def test_features_runs_and_predictions_are_those_of_the_files(files: Config, table: Config) -> None:
    (folder_of(table) / "featstore.toml").write_text(render_config(table))
    settings = ["--config", str(folder_of(table) / "featstore.toml")]

    def command(*arguments: str) -> Any:
        done = CliRunner().invoke(cli, [*arguments, *settings, "--json"], prog_name="featstore")
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    assert command("extract-vit", "--dry-run")["todo"] == 56
    runs = [run_of(config, "plain") for config in (files, table)]
    stored = []
    for config in (files, table):
        folder = prepared(config).vision_spec.folder(Path(config.store.root))
        stored.append([path.read_bytes() for path in shard_paths(folder)])
    assert stored[0] == stored[1] != []
    assert command("extract-vit", "--dry-run")["todo"] == 0
    assert command("store", "verify", "--source")["sound"]
    first, second = (run.manifest["data"] for run in runs)
    assert first["rows_digest"] == second["rows_digest"]
    assert first["splits_digest"] == second["splits_digest"]
    assert runs[0].history["val_loss"].equals(runs[1].history["val_loss"])
    assert runs[1].parity(rows=4)["failure"] is None
    # Rows with photos in them need no folder, and another run's rows may name them.
    expected = runs[0].predict(files.data.rows)
    for run, rows in ((runs[0], table.data.rows), (runs[1], files.data.rows)):
        assert run.predict(rows)["probability_entailment"].equals(
            expected["probability_entailment"]
        )


def test_weights_act_and_are_recorded(files: Config) -> None:
    rows = str(files.data.rows)
    lines = Path(rows).read_text().splitlines(keepends=True)
    halves = [folder_of(files) / f"half{i}.jsonl" for i in range(2)]
    for i, half in enumerate(halves):
        half.write_text("".join(lines[i::2]))

    def weighed(name: str, *weights: float) -> Any:
        given = tuple(map(str, halves))
        data = dataclasses.replace(files.data, rows=given, row_weights=weights)
        return run_of(dataclasses.replace(files, data=data), name)

    plain, ones, other = weighed("none"), weighed("ones", 1, 1), weighed("other", 1, 5)
    losses = [run.history["val_loss"].tolist() for run in (plain, ones, other)]
    assert losses[0] == losses[1] != losses[2]
    digests = [run.manifest["data"]["rows_digest"] for run in (plain, ones, other)]
    assert digests[0] == digests[1] != digests[2]
    assert other.config.data.row_weights == (1.0, 5.0)
    assert other.manifest["rows_of_weight"] == {"1": 64, "5": 64}
    assert "rows_of_weight" not in plain.manifest
    # Evaluation opens the rows anew and finds them the same.
    assert other.evaluate("test")["rows"] == 48
    assert load_dataset(other.config.data, Path(files.store.root)).examples.digest() == digests[2]
