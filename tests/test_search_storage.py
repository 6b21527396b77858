"""Where a study is kept: what cannot be opened is one line, and no password is shown."""

from __future__ import annotations

import sys
from pathlib import Path

import optuna
import pytest

from featstore.errors import RunError, UsageError
from trainer.tuning.storage import masked, open_storage

PASSWORD = "s3cret-word"


@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+psycopg"])
def test_a_server_that_is_not_there(tmp_path: Path, scheme: str) -> None:
    with pytest.raises(UsageError, match="cannot be opened") as raised:
        open_storage(tmp_path, f"{scheme}://me:{PASSWORD}@127.0.0.1:1/x")
    assert PASSWORD not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_driver_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(UsageError, match=r"pip install -e '.\[postgresql\]'"):
        open_storage(tmp_path, "postgresql://me@127.0.0.1:1/x")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://a:b@c:1/d", "postgresql://a:***@c:1/d"),
        ("postgresql://a:b%40x@c/d", "postgresql://a:***@c/d"),
        ("postgresql://a@c/d", "postgresql://a@c/d"),
        ("sqlite:///x.db", "sqlite:///x.db"),
    ],
)
def test_a_shown_url_has_no_password(url: str, shown: str) -> None:
    assert masked(url) == shown


@pytest.mark.parametrize("damage", [b"\0\xff\n", b"{\n"])
def test_a_damaged_line_of_a_journal_is_one_line(tmp_path: Path, damage: bytes) -> None:
    storage = open_storage(tmp_path, None)
    study = optuna.create_study(storage=storage, study_name="s")
    study.enqueue_trial({"x": 1})
    journal = tmp_path / "study.journal"
    first, _, rest = journal.read_bytes().partition(b"\n")
    journal.write_bytes(first + b"\n" + damage + rest)
    with pytest.raises(RunError, match=r"study\.journal: a line is damaged") as raised:
        open_storage(tmp_path, None)
    assert "\n" not in str(raised.value)
    # As it says: what comes before is still there.
    journal.write_bytes(first + b"\n")
    assert optuna.load_study(storage=open_storage(tmp_path, None), study_name="s").trials == []
