"""Extraction on Ray: a real cluster of two nodes gives the bytes of one process."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jobs import image_job, text_job
from PIL import Image
from ray_processes import none_left, ray_processes
from tiny_runs import write_data

from featstore.care.info import feature_folders
from featstore.config import EncodersConfig, StoreConfig
from featstore.data.images import index_images
from featstore.encoders.spec import vision_spec
from featstore.errors import StoreError, UsageError
from featstore.extract import actor as actors
from featstore.extract import ray as distributed
from featstore.extract.actor import ShardActor
from featstore.extract.extract import extract
from featstore.extract.plan import Job
from featstore.extract.ray import extract_on_ray
from featstore.progress import Show
from featstore.publish import TEMPORARY
from featstore.ray_cluster import Actors, connect, resources_of
from featstore.store.folder import read_quarantine, shard_paths

ROOT = Path(__file__).resolve().parent.parent
IDS = [f"p{number:02}" for number in range(40)]
# One of the first planned shard, the whole of the sixth, and the very last photo.
BAD = ["p02", "p20", "p21", "p22", "p23", "p39"]
TWO = Actors(count=2, num_gpus=0, num_cpus=1)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos that take some time to decode."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in IDS:
        Image.fromarray(rng.integers(0, 256, (900, 900, 3), np.uint8)).save(folder / f"{name}.jpg")
    for name in BAD:
        (folder / f"{name}.jpg").write_bytes((folder / f"{name}.jpg").read_bytes()[:300])
    return folder


@pytest.fixture(scope="module")
def encoders(tiny_vit: Path) -> EncodersConfig:
    return EncodersConfig(vit=str(tiny_vit))


def store_in(root: Path) -> StoreConfig:
    return StoreConfig(root=str(root), shard_rows=4, encode_batch_size=2, dtype="float32")


def contents(root: Path) -> dict[str, Any]:
    """What two stores have in common: all but the commands that made them."""
    (folder,) = feature_folders(root)
    found: dict[str, Any] = {path.name: path.read_bytes() for path in shard_paths(folder)}
    manifest = json.loads((folder / "manifest.json").read_text())
    found["manifest"] = (manifest["shards"], manifest["quarantine"])
    quarantine = folder / "quarantine.json"
    found["quarantine"] = json.loads(quarantine.read_text()) if quarantine.exists() else None
    found["files"] = sorted(os.listdir(folder))
    return found


@pytest.fixture(scope="module")
def single(
    photos: Path, encoders: EncodersConfig, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The store of one process."""
    root = tmp_path_factory.mktemp("single")
    extract(image_job(encoders, store_in(root), IDS, index_images(photos)))
    return contents(root)


Hook = Callable[["Watched"], None]


class Watched(distributed._Driver):
    """Hands out work when every actor is there; calls a hook after a number of shards."""

    hooks: dict[int, Hook]
    seen: list[Watched]

    def _make_all(self, queue: Any) -> list[int]:
        self.finished = 0
        Watched.seen.append(self)
        while self.starting:
            ready, _ = self.ray.wait(list(self.starting))
            for ref in ready:
                self._settle(ref, queue)
        return super()._make_all(queue)

    def _take(self, position: int, found: Any) -> None:
        super()._take(position, found)
        self.finished += 1
        if self.finished in Watched.hooks:
            Watched.hooks[self.finished](self)


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> dict[int, Hook]:
    Watched.hooks, Watched.seen = {}, []
    monkeypatch.setattr(distributed, "_Driver", Watched)
    return Watched.hooks


def on_cluster(
    cluster: Any, root: Path, photos: Path, encoders: EncodersConfig, wanted: Actors = TWO
) -> tuple[Any, list[str], int]:
    """Extract; return the summary, the lines for people and the rows of the bar."""
    lines, rows = [], []

    @contextlib.contextmanager
    def bar(total: int, unit: str) -> Iterator[Callable[[int], None]]:
        rows.append(-total)
        yield rows.append

    job = image_job(encoders, store_in(root), IDS, index_images(photos))
    show = Show(bar, note=lines.append)
    _, summary = extract_on_ray(job, cluster.address, wanted, show)
    return summary, lines, sum(rows)


@pytest.mark.slow
def test_two_nodes_give_the_bytes_of_one_process(
    cluster: Any,
    photos: Path,
    encoders: EncodersConfig,
    single: dict[str, Any],
    tmp_path: Path,
    hooks: dict[int, Hook],
) -> None:
    busy: set[Any] = set()
    for number in range(1, 8):
        hooks[number] = lambda driver: busy.update(actor for actor, _ in driver.running.values())
    summary, lines, left = on_cluster(cluster, tmp_path, photos, encoders)
    assert contents(tmp_path) == single
    assert len(busy) == 2
    assert (summary.extracted, sorted(summary.failed), left) == (34, BAD, 0)
    assert "cut short" in summary.failed["p02"]
    assert summary.rows_per_second > 0
    assert lines == ["Ray: 2 actors, each with 0 GPUs and 1 CPUs"]
    # Nothing to do: the cluster is not even asked.
    again, lines, _ = on_cluster(
        dataclasses.make_dataclass("Nowhere", [("address", str)])("127.0.0.1:1"),
        tmp_path,
        photos,
        encoders,
    )
    assert (again.extracted, lines) == (0, [])
    assert none_left("ShardActor")


@pytest.mark.slow
def test_killed_actors_and_workers_lose_nothing(
    cluster: Any,
    photos: Path,
    encoders: EncodersConfig,
    single: dict[str, Any],
    tmp_path: Path,
    hooks: dict[int, Hook],
) -> None:
    def kill_actor(driver: Watched) -> None:
        ((actor, _), *_) = driver.running.values()
        driver.ray.kill(actor, no_restart=False)

    def kill_workers(driver: Watched) -> None:
        for process in ray_processes("ShardActor"):
            process.kill()

    hooks[1], hooks[5] = kill_actor, kill_workers
    summary, _, left = on_cluster(cluster, tmp_path, photos, encoders)
    assert contents(tmp_path) == single
    assert (summary.extracted, sorted(summary.failed), left) == (34, BAD, 0)
    assert sum(Watched.seen[0].tries.values()) >= 2


@pytest.mark.slow
def test_a_lost_node_loses_nothing_and_shards_may_come_back_as_bytes(
    cluster: Any,
    photos: Path,
    encoders: EncodersConfig,
    single: dict[str, Any],
    tmp_path: Path,
    hooks: dict[int, Hook],
) -> None:
    node = cluster.add_node(num_cpus=1)
    lost: list[str] = []

    def remove(driver: Watched) -> None:
        lost.append(node.node_id)
        cluster.remove_node(node, allow_graceful=False)

    hooks[2] = remove
    wanted = dataclasses.replace(TWO, count=3, return_shards=True)
    summary, _, left = on_cluster(cluster, tmp_path, photos, encoders, wanted)
    assert lost
    assert contents(tmp_path) == single
    assert (summary.extracted, sorted(summary.failed), left) == (34, BAD, 0)


@pytest.mark.slow
def test_sentences_on_two_nodes_give_the_bytes_of_one_process(
    cluster: Any, tiny_text: Path, tmp_path: Path, hooks: dict[int, Hook]
) -> None:
    encoders = EncodersConfig(text=str(tiny_text))
    sentences = [f"a {animal} runs {n} times" for n in range(9) for animal in ("dog", "cat")]
    one, two = (
        text_job(encoders, store_in(tmp_path / name), sentences, 2) for name in ("one", "two")
    )
    extract(one)
    lines: list[str] = []
    wanted = dataclasses.replace(TWO, return_shards=True)
    plan, summary = extract_on_ray(two, cluster.address, wanted, Show(note=lines.append))
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert (plan.keys, summary.extracted, summary.failed) == (sentences, 18, {})
    assert Watched.seen[0].finished == 5
    assert lines == ["Ray: 2 actors, each with 0 GPUs and 1 CPUs"]


class Fatal(ShardActor):
    """Ends its process over one photo, as a broken library may."""

    def ready(self) -> Any:
        return actors.Host("here", True)

    def make(self, shard: Any) -> Any:
        if "p09" in shard.keys:
            os._exit(1)
        return actors.Finished(tuple(shard.keys))


@pytest.mark.slow
def test_a_shard_that_always_ends_its_actor_is_named(
    cluster: Any,
    photos: Path,
    encoders: EncodersConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distributed, "ShardActor", Fatal)
    with pytest.raises(StoreError, match=r"shard 2 \('p08' to 'p11'\) ended its actor 4 times"):
        on_cluster(cluster, tmp_path, photos, encoders)
    assert none_left("Fatal")


def task_of(encoders: EncodersConfig, root: Path, photos: tuple[Path, ...] = ()) -> Any:
    job = Job(vision_spec(encoders, store_in(root)), encoders.vit, store_in(root), ())
    return actors.Task(job, "token", "marker", photos, 0, False, {}, ("x",))


def test_an_actor_refuses_what_would_give_other_features(
    encoders: EncodersConfig, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    task = task_of(encoders, tmp_path, (photos / "p00.jpg", photos / "none.jpg"))
    host = ShardActor(task).ready()
    assert host.refusal == (
        f"node {socket.gethostname()}: the photo {photos / 'none.jpg'} is not there; give every"
        " node the folder of the photos under the same path"
    )
    job = task.job
    other = dataclasses.replace(job, store=dataclasses.replace(job.store, dtype="float16"))
    task = dataclasses.replace(task, job=other, photos=())
    assert "install the same versions and weights" in ShardActor(task).ready().refusal
    nowhere = dataclasses.replace(job, preset=str(tmp_path / "nowhere"))
    task = dataclasses.replace(task, job=nowhere)
    assert "nowhere" in ShardActor(task).ready().refusal


def test_an_actor_sees_the_folder_by_the_marker(encoders: EncodersConfig, tmp_path: Path) -> None:
    actor = ShardActor(task_of(encoders, tmp_path))
    folder = actor.task.job.folder
    assert not actor._sees_folder()
    folder.mkdir(parents=True)
    (folder / "marker").write_text("of another run")
    assert not actor._sees_folder()
    with distributed._marked(folder, "token") as name:
        assert name.startswith(TEMPORARY)
        actor.task = dataclasses.replace(actor.task, marker=name)
        assert actor._sees_folder()
    assert not actor._sees_folder()


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("ray://x:10001", "expected host:port, auto or local"),
        ("nonsense", "expected host:port, auto or local"),
        ("127.0.0.1:1", "nothing answers there"),
        ("127.0.0.1:70000", "nothing answers there"),
    ],
)
def test_an_address_where_nothing_is_says_so_at_once(address: str, words: str) -> None:
    with pytest.raises(UsageError, match=words), connect(address):
        pass


def test_ray_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install -e '.\[ray\]'"), connect("local"):
        pass


@pytest.mark.parametrize(
    ("nodes", "wanted", "expected"),
    [
        ([{"CPU": 8.0}, {"CPU": 4.0}], Actors(), (3, 0.0, 4.0)),
        ([{"CPU": 16.0, "GPU": 4.0}, {"CPU": 4.0}], Actors(), (4, 1.0, 2.0)),
        ([{"CPU": 16.0, "GPU": 2.0}], Actors(num_gpus=0.5, num_cpus=1), (4, 0.5, 1)),
        ([{"CPU": 8.0}], Actors(count=2, num_cpus=1), (2, 0.0, 1)),
        ([{"CPU": 64.0}], Actors(num_cpus=1), (9, 0.0, 1)),
        ([{}], Actors(), (1, 0.0, 1.0)),
    ],
)
def test_the_actors_that_fit(
    nodes: list[dict[str, float]], wanted: Actors, expected: tuple[int, float, float]
) -> None:
    class Ray:
        def nodes(self) -> Any:
            dead = {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 99.0}}
            return [dead, *({"Alive": True, "Resources": node} for node in nodes)]

    assert resources_of(Ray(), wanted, 9) == expected


@pytest.mark.slow
def test_the_command_on_ray_stops_and_goes_on(
    tiny_vit: Path, tiny_text: Path, tmp_path: Path
) -> None:
    data = write_data(tmp_path)
    rng = np.random.default_rng(0)
    for photo in Path(data["images"]).iterdir():
        # Large enough that the signal comes long before the end.
        Image.fromarray(rng.integers(0, 256, (900, 900, 3), np.uint8)).save(photo)
    config = tmp_path / "featstore.toml"
    config.write_text(
        f'[data]\nrows = "{data["rows"]}"\nimages = "{data["images"]}"\n'
        f'split_file = "{data["split_file"]}"\n'
        f'[encoders]\nvit = "{tiny_vit}"\ntext = "{tiny_text}"\n'
        f'[store]\nroot = "{tmp_path / "cache"}"\nshard_rows = 2\n'
    )
    command = [sys.executable, "cli.py", "extract-vit", "--config", str(config), "--json"]
    command += ["--ray", "local", "--num-cpus", "1", "--actors", "1"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    while process.poll() is None and not list((tmp_path / "cache").rglob("shard-00002.h5")):
        time.sleep(0.02)
    # As Ctrl-C does: to the whole group.
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130, err
    assert err.decode().splitlines()[-1].startswith("stopped; what was published is kept")
    assert "Traceback" not in err.decode()
    kept = len(list((tmp_path / "cache").rglob("shard-*.h5")))
    assert kept < 28
    assert none_left("ShardActor")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["extracted"] == 56 - 2 * kept
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip()]
    assert all("images" in line or line.startswith(("rows: ", "Ray: 1 actors")) for line in lines)
    alone = subprocess.run(
        [*command[:6], "--root", str(tmp_path / "alone")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    folders = [Path(json.loads(done.stdout)["folder"]), Path(json.loads(alone.stdout)["folder"])]
    one, two = ({p.name: p.read_bytes() for p in shard_paths(folder)} for folder in folders)
    assert one == two
    assert len(one) == 28
    assert read_quarantine(folders[0]) == {}
    assert sorted(os.listdir(folders[0])) == sorted(os.listdir(folders[1]))
