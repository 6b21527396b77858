"""Who uses a store is recorded in it, without locks, and told apart from others of that path."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import trainer
from featstore.errors import StoreError
from featstore.extract.speed import (
    LEAST_ROWS,
    estimated_speed,
    operations,
    record_speed,
    recorded_speed,
)
from featstore.progress import SILENT
from featstore.project import Project
from featstore.store.users import RUNS, User, give_up, read_uses, record_use, user_of
from tests.tiny_runs import write_data
from tests.unprivileged import read_only
from trainer.commands.main import cli
from trainer.run.training import Reporter


def run_in(runs: Path) -> Path:
    (runs / "first").mkdir(parents=True)
    (runs / "first" / "manifest.json").write_text("{}")
    return runs / "first" / "config.toml"


def test_a_use_is_recorded_once_and_given_up(tmp_path: Path) -> None:
    user = user_of(run_in(tmp_path / "runs"))
    for _ in range(2):
        record_use(tmp_path, user, ["b", "a", "a"])
    (use,) = read_uses(tmp_path)
    assert (use.user, use.digests, use.forgotten) == (user, {"a", "b"}, False)
    assert use.user.what == RUNS
    assert use.user.is_here
    give_up(use)
    assert [one.forgotten for one in read_uses(tmp_path)] == [True]


def test_an_empty_folder_at_that_path_is_another_user(tmp_path: Path) -> None:
    user = user_of(run_in(tmp_path / "runs"))
    (tmp_path / "runs").rename(tmp_path / "moved")
    (tmp_path / "runs").mkdir()
    assert not user.is_here
    assert User(RUNS, str(tmp_path / "moved"), user.identity).is_here


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    record_use(tmp_path, user_of(tmp_path / "c.toml"), ["a"])
    (use,) = read_uses(tmp_path)
    use.path.write_text(use.path.read_text().replace('"a"', '"b"'))
    with pytest.raises(StoreError, match="checksum differs"):
        read_uses(tmp_path)


# --- what `gc` keeps for others


@dataclasses.dataclass
class Places:
    """Two projects over one store, each with features that the other does not ask for."""

    root: Path
    one: Path
    two: Path

    def gc(self, home: Path, *args: str, delete: bool = True) -> dict[str, Any]:
        """Run `store gc --yes` with a project's file."""
        given = ["store", "gc", "--config", str(home / "featstore.toml"), *args, "--json"]
        done = CliRunner().invoke(cli, given + ["--yes"] * delete, prog_name="python cli.py")
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    def features(self) -> set[str]:
        """Return the fingerprints of the stored photo features."""
        return {path.name for path in (self.root / "vit").iterdir()}


def write_file(home: Path, data: Path, root: Path, vit: Path, text: Path, dtype: str) -> Path:
    home.mkdir()
    (home / "featstore.toml").write_text(
        f'[data]\nrows = "{data}/rows.jsonl"\nimages = "{data}/images"\n'
        f'split_file = "{data}/split.json"\n[encoders]\nvit = "{vit}"\ntext = "{text}"\n'
        f'[store]\nroot = "{root}"\ndtype = "{dtype}"\n'
        "[train]\nk_txt = 0\nepochs = 1\nnum_heads = 2\nhead_dim = 4\nmlp_dim = 8\n"
    )
    return home


@pytest.fixture(scope="module")
def shared_store(
    tmp_path_factory: pytest.TempPathFactory, tiny_vit: Path, tiny_text: Path
) -> tuple[Path, tuple[Path, Path, Path]]:
    folder = tmp_path_factory.mktemp("users")
    write_data(folder / "data")
    return folder, (folder / "data", tiny_vit, tiny_text)


@pytest.fixture
def places(shared_store: tuple[Path, tuple[Path, Path, Path]], tmp_path: Path) -> Places:
    data, vit, text = shared_store[1]
    root = tmp_path / "store"
    homes = [
        write_file(tmp_path / name, data, root, vit, text, dtype)
        for name, dtype in (("one", "float32"), ("two", "float16"))
    ]
    for home in homes:
        Project.load(home / "featstore.toml").extract("vit", show=SILENT)
    found = Places(root, *homes)
    assert len(found.features()) == 2
    return found


def test_what_another_configuration_needs_is_kept(places: Places) -> None:
    found = places.gc(places.one)
    assert found["garbage"] == []
    (user,) = found["users"]
    assert user["path"] == str(places.two / "featstore.toml")
    assert user["here"]
    (note,) = found["notes"]
    assert str(places.two / "featstore.toml") in note
    # A copy of the file elsewhere, with no run beside it, owns nothing of either.
    clone = Path(shutil.copytree(places.one, places.one.with_name("clone")))
    assert places.gc(clone)["garbage"] == []
    assert len(places.features()) == 2


def test_a_configuration_that_is_gone_is_kept_until_it_is_forgotten(places: Places) -> None:
    file = places.two / "featstore.toml"
    own = Project.load(file).vision_spec.fingerprint
    shutil.rmtree(places.two)
    found = places.gc(places.one)
    assert found["garbage"] == []
    assert "if that is gone for good" in found["notes"][0]
    assert f"--forget {file}" in found["notes"][0]
    # Something else at that path is not the user that was there.
    places.two.mkdir()
    assert places.gc(places.one)["garbage"] == []
    shown = places.gc(places.one, "--forget", str(file), delete=False)
    assert [Path(item["path"]).name for item in shown["garbage"]] == [own]
    assert own in places.features()
    places.gc(places.one, "--forget", str(file))
    assert own not in places.features()
    # It is known to have been given up.
    assert places.gc(places.one)["users"] == []
    done = CliRunner().invoke(
        cli, ["store", "gc", "--config", str(places.one / "featstore.toml"), "--forget", "/none"]
    )
    assert done.exit_code == 2
    assert "no such user" in done.stderr


def test_a_configuration_that_changed_lets_go_itself(places: Places) -> None:
    text = (places.two / "featstore.toml").read_text()
    old = Project.load(places.two / "featstore.toml").vision_spec.fingerprint
    (places.two / "featstore.toml").write_text(text.replace("float16", "bfloat16"))
    # From elsewhere it is asked for what it needed; its own gc knows better.
    assert places.gc(places.one)["garbage"] == []
    assert [Path(item["path"]).name for item in places.gc(places.two)["deleted"]] == [old]
    assert len(places.features()) == 1


def test_the_runs_of_others_are_asked_where_they_can_be(places: Places) -> None:
    two = places.two / "featstore.toml"
    run = trainer.train(Project.load(two), name="r", show=SILENT, reporter=Reporter())
    assert run.folder == places.two / "runs" / "r"
    own = run.manifest["features"]["vision"]["fingerprint"]
    # The configuration needs other features now; the run still needs its own.
    two.write_text(two.read_text().replace("float16", "float32"))
    assert places.gc(places.two)["garbage"] == []
    found = places.gc(places.one)
    assert found["garbage"] == []
    assert {user["what"] for user in found["users"]} == {"configuration", "runs"}
    # Its folder of runs is elsewhere, and an empty one is where it was.
    moved = (places.two / "runs").rename(places.two / "kept")
    (places.two / "runs").mkdir()
    found = places.gc(places.two)
    assert found["garbage"] == []
    assert str(places.two / "runs") in found["notes"][0]
    # Where they are now they can be asked; a run that is deleted needs nothing.
    moved.rename(shutil.rmtree(places.two / "runs") or places.two / "runs")
    shutil.rmtree(places.two / "runs" / "r")
    assert own in {Path(item["path"]).name for item in places.gc(places.two)["deleted"]}


def test_states_of_finished_runs_can_go(places: Places) -> None:
    project = Project.load(places.one / "featstore.toml")
    given = {"show": SILENT, "reporter": Reporter()}
    lean, kept = (
        trainer.train(project, name=name, keep_state=keep, **given)
        for name, keep in (("lean", False), ("kept", True))
    )
    assert [run.checkpoint_path.exists() for run in (lean, kept)] == [False, True]
    assert places.gc(places.one)["garbage"] == []
    # As an earlier version left them.
    shutil.copy(kept.checkpoint_path, lean.checkpoint_path)
    lean.write_manifest({k: v for k, v in lean.manifest.items() if k != "keeps_state"})
    (found,) = places.gc(places.one)["deleted"]
    assert (found["what"], found["path"]) == ("state", str(lean.checkpoint_path))
    assert not lean.checkpoint_path.exists()
    assert kept.checkpoint_path.exists()


def test_features_from_before_there_was_a_list_are_asked_for(places: Places) -> None:
    shutil.rmtree(places.root / "users")
    found = places.gc(places.one)
    assert found["garbage"] == []
    assert len(found["unrecorded"]) == 1
    assert "--unrecorded" in found["notes"][0]
    found = places.gc(places.one, "--unrecorded")
    assert len(found["deleted"]) == 1
    assert len(places.features()) == 1


def test_a_read_only_store_is_used_without_a_record(places: Places, tmp_path: Path) -> None:
    before = len(list((places.root / "users").iterdir()))
    with read_only(places.root):
        record_use(places.root, user_of(tmp_path / "c.toml"), ["a"])
    assert len(list((places.root / "users").iterdir())) == before


# --- how long an extraction will take


def test_an_estimate_is_of_the_last_extraction_here(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Project.load(places.one / "featstore.toml")
    spec = project.vision_spec
    record_speed(places.root, spec, LEAST_ROWS - 1, 3.0)
    assert recorded_speed(places.root, spec) is None
    record_speed(places.root, spec, LEAST_ROWS, 3.0)
    record_speed(places.root, spec, LEAST_ROWS, 4.0)
    assert recorded_speed(places.root, spec) == 4.0
    shutil.rmtree(spec.folder(places.root))
    assert project.estimate("vit")[1] == 4.0
    monkeypatch.setattr("platform.node", lambda: "another")
    assert recorded_speed(places.root, spec) is None
    (places.root / "speeds.json").write_text("{")
    assert project.estimate("vit")[1] > 4.0


def test_operations_are_those_of_the_blocks(places: Places) -> None:
    project = Project.load(places.one / "featstore.toml")
    # Two blocks 16 wide, inner width 32, over 16 patches and the class token: by hand.
    spec = project.vision_spec
    made = spec.architecture
    width, inner, tokens = made["hidden_dim"], made["mlp_dim"], 17
    products = tokens * (4 * width * width + 2 * width * inner) + 2 * tokens * tokens * width
    assert operations(spec) == spec.boundary * 2 * products
    text = project.text_spec(0)
    assert operations(project.text_spec(2)) < operations(text)
    slow = estimated_speed(spec, [next((places.one.parent).rglob("*.toml"))], 1)
    assert slow > 0
