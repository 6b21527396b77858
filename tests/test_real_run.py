"""A run on real photos, real sentences and real encoders: the fast path against the plain one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import prepared, with_train

from featstore.config import DataConfig, EncodersConfig, StoreConfig
from featstore.project import Project
from trainer.config import Config
from trainer.features import prepare
from trainer.run.fit import fit
from trainer.run.folder import Run
from trainer.run.training import Reporter, Training

# Each photo takes the real encoder a good part of a second.
ROWS, ROWS_A_PHOTO = 192, 8


def write_rows(path: Path, source: Path) -> None:
    """Write rows, a label as often as the other, of the photos that have the most rows."""
    left = {"entailment": ROWS // 2, "contradiction": ROWS // 2}
    lines: dict[str, list[str]] = {}
    for line in source.read_text(encoding="utf-8").splitlines():
        lines.setdefault(json.loads(line)["Image_ID"], []).append(line)
    kept = []
    for of_photo in sorted(lines.values(), key=len, reverse=True):
        for line in of_photo[:ROWS_A_PHOTO]:
            label = json.loads(line)["Label"].lower()
            if left.get(label, 0) > 0:
                left[label] -= 1
                kept.append(line)
    assert not any(left.values())
    path.write_text("\n".join(kept) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def real(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Some real rows, their photos' features extracted."""
    folder = tmp_path_factory.mktemp("real")
    write_rows(folder / "rows.jsonl", shared_dir / "data" / "a2.jsonl")
    presets = shared_dir / "presets"
    config = Config(
        data=DataConfig(rows=str(folder / "rows.jsonl"), images=str(shared_dir / "data/images")),
        encoders=EncodersConfig(
            vit=str(presets / "vit_small_patch14_196_dinov2"),
            text=str(presets / "distil_bert_minilm_l6_en_uncased"),
        ),
        store=StoreConfig(root=str(folder / "cache")),
    )
    return prepared(config)


@pytest.mark.slow
@pytest.mark.parametrize("k_txt", [0, 3])
def test_plain_and_fast_runs_have_one_loss_curve(real: Project, tmp_path: Path, k_txt: int) -> None:
    assert isinstance(real.config, Config)
    prepare(real, k_txt)
    config = with_train(real.config, k_txt=k_txt, lr=5e-5, epochs=2)
    curves = {}
    for fast in (True, False):
        records: list[dict[str, float]] = []
        run = Run(tmp_path / f"fast-{fast}")
        train = with_train(config, fast_path=fast).train
        fit(Training(run, real, train, reporter=Reporter(epoch=records.append)))
        curves[fast] = np.array([[r["loss"], r["val_loss"]] for r in records])
    # Training happened, so that two curves that agree are not two constants.
    assert curves[True][1, 0] < curves[True][0, 0]
    np.testing.assert_allclose(curves[True], curves[False], rtol=1e-5)
