"""Small versions of `campaign.py`; the large ones are its command."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from campaign import POINTS, Figures, cuts, flips, judge, live_values
from PIL import Image
from test_extract import BATCH, IDS, PIXEL_SPEC, run_pixels, shards
from test_golden import golden_folder

from featstore.care.verify import verify_folder
from featstore.config import StoreConfig
from featstore.data.images import index_images
from featstore.store.folder import read_manifest, read_quarantine, write_manifest, write_quarantine

TESTS = Path(__file__).resolve().parent


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """A copy of the golden store's two folders.

    Their lists are written again: those of the first version have no checksums, so that a
    changed key of a quarantine list would go unseen.
    """
    copies = []
    for kind in ("vit", "text"):
        golden = golden_folder(kind)
        copies.append(Path(shutil.copytree(golden, tmp_path / kind / golden.name)))
        write_quarantine(copies[-1], read_quarantine(copies[-1], with_lost=True))
        write_manifest(copies[-1], golden.name, read_manifest(copies[-1]))
    return copies


def check(figures: Figures, tried: int) -> None:
    assert figures.wrong == []
    assert figures.tried >= tried


def test_no_flipped_byte_is_returned_or_missed(folders: list[Path]) -> None:
    check(flips(folders, 240), 240)


def test_no_file_that_was_cut_short_or_taken_away_is_missed(folders: list[Path]) -> None:
    check(cuts(folders, 60), 60)


def test_the_campaign_would_see_a_store_that_is_not_checked(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the checksums of rows, a flipped feature must count as wrong."""
    good = live_values(folders[0])
    path = folders[0] / "shard-00001.h5"
    before = path.read_bytes()
    at = before.index(np.float16(57344).tobytes())
    after = before[:at] + b"\x01" + before[at + 1 :]
    path.write_bytes(after)
    assert judge(folders[0], path, before, after, good)[0].startswith("found, ")
    monkeypatch.setattr("featstore.store.shard.Shard.row_is_intact", lambda shard, row: True)
    assert judge(folders[0], path, before, after, good)[0] == "SILENT"


PROGRAM = """
import sys
import campaign
import test_extract
campaign.dies_at(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))()
test_extract.worker(*sys.argv[4:])
"""


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_any_point_of_a_publication_gives_the_same_bytes(
    tmp_path: Path, point: str
) -> None:
    rng = np.random.default_rng(0)
    photos = tmp_path / "photos"
    photos.mkdir()
    for image_id in IDS:
        pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(photos / f"{image_id}.png")
    index = index_images(photos)
    stores = [
        StoreConfig(root=str(tmp_path / name), shard_rows=5, encode_batch_size=BATCH)
        for name in ("whole", "killed")
    ]
    run_pixels(stores[0], IDS, index)
    whole, folder = (PIXEL_SPEC.folder(Path(store.root)) for store in stores)
    attack = [point, "4", str(int(signal.SIGKILL))]
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, *attack, stores[1].root, str(photos)],
        cwd=TESTS.parent,
        env={"PYTHONPATH": f"{TESTS}:{TESTS.parent}", "PATH": ""},
        capture_output=True,
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert {problem.what for problem in verify_folder(folder).problems} <= {"unlisted shard"}
    assert live_values(folder).items() < live_values(whole).items()
    run_pixels(stores[1], IDS, index)
    assert shards(folder) == shards(whole)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        path.name for path in whole.iterdir()
    )


@pytest.mark.slow
def test_a_small_campaign_of_real_commands_finds_nothing_wrong() -> None:
    # Searches have tests of their own, which kill them too; a campaign's take half a minute each.
    counts = "flips=100 cuts=20 kills=2 trainings=1 searches=0 images=20 starts=2 repairs=1 disks=3"
    options = [f"--{option}" for option in counts.split()]
    ended = subprocess.run(
        [sys.executable, str(TESTS / "campaign.py"), *options],
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert " tried, 0 wrong in all" in ended.stdout
