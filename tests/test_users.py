"""Who uses a store is recorded in it, without locks, and told apart from others of that path."""

from __future__ import annotations

from pathlib import Path

import pytest

from featstore.errors import StoreError
from featstore.store.users import RUNS, User, give_up, read_uses, record_use, user_of


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
