"""The command line: help, exit codes, one line for each error, JSON, flags, signals, pipes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from tiny_runs import IMAGES_OF_SPLIT, SENTENCES, tiny_config

from featstore.config import DEFAULT_FILE
from featstore.quantities import share
from featstore.settings import hints, toml_value
from trainer.commands.console import read_config
from trainer.commands.main import cli
from trainer.config import SECTIONS, Config, load_config, render_config

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("tensorflow", "keras", "keras_hub", "numpy", "pandas", "h5py", "matplotlib")
PHOTOS = sum(IMAGES_OF_SPLIT.values())


def invoke(*args: str) -> Result:
    return CliRunner().invoke(cli, list(args), prog_name="python cli.py")


def succeed(*args: str) -> Result:
    result = invoke(*args)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result


def fail(code: int, *args: str) -> str:
    """Run a command that must end in one line of error, after notes at most; return it."""
    result = invoke(*args)
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], lines
    assert all(line.startswith("rows") for line in lines[:-1]), lines
    return lines[-1]


def python(*args: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


@dataclasses.dataclass
class Project:
    """A folder with a settings file, features and a finished run."""

    folder: Path
    config: Config

    @property
    def file(self) -> str:
        return str(self.folder / DEFAULT_FILE)

    @property
    def runs(self) -> str:
        return str(self.folder / "runs")

    def write(self, folder: Path, **sections: dict[str, Any]) -> str:
        """Write a settings file that differs in some settings; return its path."""
        parts = {
            name: dataclasses.replace(getattr(self.config, name), **changes)
            for name, changes in sections.items()
        }
        path = folder / "other.toml"
        path.write_text(render_config(dataclasses.replace(self.config, **parts)))
        return str(path)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_vit: Path, tiny_text: Path) -> Project:
    folder = tmp_path_factory.mktemp("cli")
    config = tiny_config(folder / "data", tiny_vit, tiny_text)
    made = Project(folder, config)
    Path(made.file).write_text(render_config(config))
    return made


@pytest.fixture(scope="module")
def extraction(project: Project) -> tuple[dict[str, Any], Result]:
    """What `extract-vit --json` printed before and when it did its work."""
    dry = succeed("extract-vit", "--config", project.file, "--dry-run", "--json")
    return json.loads(dry.stdout), succeed("extract-vit", "--config", project.file, "--json")


@pytest.fixture(scope="module")
def trained(project: Project, extraction: object) -> Result:
    return succeed(
        "train", "--config", project.file, "--runs", project.runs, "--name", "first", "--json"
    )


@pytest.mark.slow
def test_plain_sets_what_the_run_keeps(project: Project, trained: Result) -> None:
    common = ("train", "--config", project.file, "--runs", project.runs, "--epochs", "1")
    plain = json.loads(succeed(*common, "--name", "plain", "--plain", "--json").stdout)
    fast = json.loads(succeed(*common, "--name", "fast", "--json").stdout)
    kept = [load_config(Path(run["run"]) / "config.toml").train.fast_path for run in (plain, fast)]
    assert kept == [False, True]
    # The same numbers but for rounding: dropout draws the same on each way.
    assert fast["loss"] == pytest.approx(plain["loss"], abs=1e-5)


def test_help_imports_nothing_heavy() -> None:
    program = f"""
import sys
from trainer.commands.main import cli
from click.testing import CliRunner
for name in [None, *cli.commands]:
    result = CliRunner().invoke(cli, [*([name] if name else []), "--help"])
    assert result.exit_code == 0, (name, result.output)
    assert "Usage:" in result.stdout, name
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    done = python("-c", program)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_every_command_has_a_description_and_described_options() -> None:
    for name, command in cli.commands.items():
        assert command.get_short_help_str(), name
        text = succeed(name, "-h").stdout
        assert text.startswith(f"Usage: python cli.py {name}")


def flag_of(field: dataclasses.Field[Any]) -> str:
    return str(field.metadata["flag"] or f"--{field.name.replace('_', '-')}")


def test_the_settings_flags_show_their_section() -> None:
    text = " ".join(succeed("train", "--help").stdout.split())
    for section, kind in SECTIONS.items():
        for field in dataclasses.fields(kind):
            assert f"{flag_of(field)} " in text
        assert f"[{section}]" in text


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["trin"], "did you mean 'train'"),
        (["train", "--epoch", "3"], "--epochs"),
        (["train", "--batch-size", "many"], "not a valid integer"),
        (["train", "--dtype", "float8"], "float16"),
        (["evaluate"], "missing argument"),
        (["extract-vit", "--split", "dev"], "'val'"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(args: list[str], expected: str) -> None:
    line = fail(2, *args)
    assert expected in line.lower()
    assert "--help`" in line


def test_no_command_shows_the_help() -> None:
    result = invoke()
    assert result.exit_code == 2
    assert "Commands:" in result.output


@pytest.mark.parametrize("command", ["extract-vit", "extract-text", "train"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[train]\nepoch = 3\n", "did you mean 'epochs'"),
        ("[trian]\nepochs = 3\n", "did you mean 'train'"),
        ("[train]\nepochs = 'three'\n", "[train] epochs must be int, found 'three'"),
        ("[train]\nepochs = 0\n", "at least 1"),
        ("[store]\ndtype = 'float61'\n", "did you mean 'float16'"),
        ("[train]\nlr = 0.1\nlr = 0.2\n[", "line 3"),
        ("train = 3\n", "must be a section"),
    ],
)
def test_a_bad_settings_file(tmp_path: Path, command: str, content: str, expected: str) -> None:
    file = tmp_path / DEFAULT_FILE
    file.write_text(content)
    line = fail(2, command, "--config", str(file))
    assert expected in line
    assert DEFAULT_FILE in line


def test_a_missing_settings_file(tmp_path: Path) -> None:
    assert "absent.toml: cannot be read" in fail(
        2, "train", "--config", str(tmp_path / "absent.toml")
    )


def test_an_unknown_preset_has_a_suggestion(project: Project) -> None:
    line = fail(1, "extract-vit", "--config", project.file, "--vit", "vit_base_patch16_224_imagnet")
    assert "did you mean 'vit_base_patch16_224_imagenet'" in line
    line = fail(1, "extract-vit", "--config", project.file, "--vit", "./no/such/folder")
    assert "no such folder" in line


def rows_file(folder: Path, *rows: object) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in rows))
    return str(path)


def row(image_id: str, label: str = "entailment", text: str = "a dog") -> dict[str, str]:
    return {"Image_ID": image_id, "Hypothesis": text, "Label": label}


@pytest.mark.parametrize("command", ["extract-vit", "train"])
def test_a_broken_line_is_named_by_its_number(
    project: Project, tmp_path: Path, command: str
) -> None:
    rows = rows_file(tmp_path, row("photo000"), row("photo001"), '{"Image_ID": ')
    line = fail(1, command, "--config", project.file, "--rows", rows)
    assert "rows.jsonl:3: not JSON" in line


def test_rows_of_one_class_cannot_train(
    project: Project, extraction: object, tmp_path: Path
) -> None:
    rows = rows_file(tmp_path, *(row(f"photo{i:03d}") for i in range(PHOTOS)))
    line = fail(1, "train", "--config", project.file, "--rows", rows, "--runs", str(tmp_path))
    assert "expected rows of both classes" in line
    assert "0 contradiction" in line


def test_a_missing_folder_of_photos(project: Project, tmp_path: Path) -> None:
    absent = str(tmp_path / "absent")
    assert absent in fail(1, "extract-vit", "--config", project.file, "--images", absent)
    line = fail(2, "extract-vit", "--config", project.write(tmp_path, data={"images": ""}))
    assert "--images" in line


def test_too_many_text_layers(project: Project, extraction: object) -> None:
    line = fail(2, "train", "--config", project.file, "--k-txt", "5", "--runs", project.runs)
    assert line.startswith("error: [train] k_txt = 5")
    assert "choose 0 to 4" in line


@pytest.mark.parametrize("name", ["../x", "/abs", "", ".hidden", "a b", "a" * 101])
def test_a_name_that_is_no_folder_name(project: Project, name: str) -> None:
    line = fail(2, "train", "--config", project.file, "--runs", project.runs, f"--name={name}")
    assert f"--name {name!r}: expected letters" in line


@pytest.mark.parametrize(
    ("fractions", "code"), [("a,b,c", 2), ("2,-1,0", 2), ("0.5,0.5", 1), ("0.5,0.1,0.1", 1)]
)
def test_bad_fractions(project: Project, tmp_path: Path, fractions: str, code: int) -> None:
    file = project.write(tmp_path, data={"split_file": ""})
    line = fail(code, "extract-vit", "--config", file, "--fractions", fractions)
    assert "fractions" in line


def test_an_id_that_leaves_the_folder_is_dropped(project: Project, tmp_path: Path) -> None:
    outside = tmp_path / "outside.png"
    Image.new("RGB", (8, 8)).save(outside)
    ids = [f"photo{i:03d}" for i in range(20)]
    rows = rows_file(tmp_path, row("../../x"), row(str(outside)), *map(row, ids))
    file = project.write(
        tmp_path, data={"rows": rows, "split_file": ""}, store={"root": str(tmp_path / "cache")}
    )
    result = succeed("extract-vit", "--config", file, "--json")
    assert json.loads(result.stdout)["extracted"] == 20
    assert "2 unsafe image id" in result.stderr
    assert not (tmp_path / "x").exists()


def test_duplicate_rows_are_dropped_and_counted(project: Project, tmp_path: Path) -> None:
    rows = rows_file(tmp_path, *[row(f"photo{i:03d}") for i in range(20)] * 2)
    file = project.write(
        tmp_path, data={"rows": rows, "split_file": ""}, store={"root": str(tmp_path / "cache")}
    )
    result = succeed("extract-vit", "--config", file, "--json")
    assert "20 duplicate" in result.stderr
    report = next((tmp_path / "cache" / "reports").glob("*.csv"))
    assert str(report) in result.stderr
    assert len(report.read_text().splitlines()) == 21


def test_two_files_for_one_id(project: Project, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(project.config.data.images, images)
    shutil.copy(images / "photo000.png", images / "photo000.jpg")
    line = fail(1, "extract-vit", "--config", project.file, "--images", str(images))
    assert "photo000" in line


def test_missing_features_name_the_command(project: Project, tmp_path: Path) -> None:
    args = ("--config", project.file, "--root", str(tmp_path), "--runs", str(tmp_path / "runs"))
    assert "run `python cli.py extract-vit" in fail(1, "train", *args)
    succeed("extract-vit", "--config", project.file, "--root", str(tmp_path), "--split", "val")
    line = fail(1, "train", *args)
    assert "32 of 32 photos of split 'train'" in line
    assert "`python cli.py extract-vit --split train --config" in line
    assert not (tmp_path / "text").exists()


def test_training_does_not_need_the_test_photos(project: Project, tmp_path: Path) -> None:
    args = ("--config", project.file, "--root", str(tmp_path / "cache"))
    for split in ("train", "val"):
        succeed("extract-vit", *args, "--split", split)
    runs = ("--runs", str(tmp_path / "runs"))
    succeed("train", *args, *runs, "--name", "a", "--epochs", "1")
    line = fail(1, "evaluate", "a", *runs)
    told = f"`python cli.py extract-vit --split test --config {tmp_path}/runs/a/config.toml`"
    assert told in line


def test_photos_of_which_none_can_be_read_are_an_error(project: Project, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for path in Path(project.config.data.images).iterdir():
        (images / path.name).write_bytes(b"no photo")
    store = {"root": str(tmp_path / "cache")}
    file = project.write(tmp_path, data={"images": str(images)}, store=store)
    for _ in range(2):
        result = invoke("extract-vit", "--config", file)
        (line,) = (one for one in result.stderr.splitlines() if one.startswith("error: "))
        assert (result.exit_code, result.stdout) == (1, "")
        assert "no features of any of 56 images" in line
        assert "quarantine.json" in line


def test_stale_features_list_what_differs(project: Project, extraction: object) -> None:
    args = ("--config", project.file, "--dtype", "float16", "--runs", project.runs)
    line = fail(1, "train", *args)
    assert "dtype: wanted 'float16', stored 'float32'" in line
    # Without the flags, it would find nothing to do.
    flags = f"--config {project.file} --dtype float16"
    assert f"`python cli.py extract-vit {flags}`" in line


def test_an_unknown_run_lists_those_there_are(project: Project, trained: object) -> None:
    for args in (
        ["evaluate", "frist"],
        ["train", "--config", project.file, "--init-from", "frist"],
    ):
        line = fail(1, *args, "--runs", project.runs)
        assert "frist: no such run" in line
        assert "first" in line.split("runs there: ")[1]


def test_a_taken_name(project: Project, trained: object) -> None:
    args = ("train", "--config", project.file, "--runs", project.runs, "--name", "first")
    assert "choose another --name" in fail(2, *args)


def test_init_writes_what_loads_again(tmp_path: Path) -> None:
    file = str(tmp_path / "new.toml")
    succeed("init", "--config", file)
    text = Path(file).read_text()
    assert text.count("# ") >= sum(len(dataclasses.fields(kind)) for kind in SECTIONS.values())
    for name, kind in SECTIONS.items():
        assert f"[{name}]" in text
        for field in dataclasses.fields(kind):
            assert f"\n# {field.name} = " in text
    # As it is written it sets nothing: what runs is what runs without a file.
    nothing = tmp_path / "nothing.toml"
    nothing.write_text("")
    assert load_config(file) == load_config(nothing)
    values = text.replace("# rows =", "rows =").replace('rows = ""', 'rows = "r.jsonl"')
    Path(file).write_text(values)
    loaded = load_config(file)
    assert loaded.data.rows == str(tmp_path / "r.jsonl")
    assert loaded.encoders == Config().encoders
    assert loaded.train == Config().train
    Path(file).write_text(text)
    assert "--force" in fail(2, "init", "--config", file)
    assert Path(file).read_text() == text
    Path(file).write_text("")
    succeed("init", "--config", file, "--force")
    assert Path(file).read_text() == text


def test_dry_run_changes_nothing_and_says_what_there_is_to_do(
    project: Project, extraction: tuple[dict[str, Any], Result], tmp_path: Path
) -> None:
    plan, done = extraction
    assert plan["todo"] == plan["requested"] == PHOTOS
    assert plan["cached"] == 0
    assert plan["rows_per_second"] > 0
    assert plan["todo_bytes"] == PHOTOS * 16 * 16 * 4
    assert json.loads(done.stdout)["fingerprint"] == plan["fingerprint"]
    root = tmp_path / "cache"
    for command in ("extract-vit", "extract-text"):
        args = (command, "--config", project.file, "--root", str(root), "--dry-run")
        assert "to do" in succeed(*args).stdout
        assert json.loads(succeed(*args, "--json").stdout)["todo"] > 0
    assert not root.exists()


def test_extract_vit_prints_one_object_and_does_nothing_twice(
    project: Project, extraction: tuple[dict[str, Any], Result]
) -> None:
    first = json.loads(extraction[1].stdout)
    assert (first["extracted"], first["failed"]) == (PHOTOS, {})
    again = json.loads(succeed("extract-vit", "--config", project.file, "--json").stdout)
    assert (again["extracted"], again["cached"]) == (0, PHOTOS)
    assert "nothing to do" in succeed("extract-vit", "--config", project.file).stdout


def test_extract_vit_asks_for_a_framework_where_there_is_something_to_do(
    project: Project, extraction: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    succeed("extract-vit", "--config", project.file)
    line = fail(2, "extract-vit", "--config", project.file, "--root", str(tmp_path / "cache"))
    assert "KERAS_BACKEND=torch: not a backend that is supported" in line


def test_extract_text_prints_one_object(project: Project) -> None:
    args = ("extract-text", "--config", project.file, "--k-txt", "1")
    done = json.loads(succeed(*args, "--json").stdout)
    assert (done["extracted"], done["requested"]) == (len(SENTENCES), len(SENTENCES))
    assert "nothing to do" in succeed(*args).stdout


def test_train_prints_one_object(project: Project, trained: Result) -> None:
    result = json.loads(trained.stdout)
    assert result["run"] == str(Path(project.runs) / "first")
    folder = Path(result["run"])
    data = json.loads((folder / "manifest.json").read_text())["data"]
    for name in ("counts", "rows_left_out", "cut_sentences"):
        assert result[name] == data[name]
    assert (result["epochs"], result["ended"]) == (2, "all epochs")
    assert json.loads((folder / "metrics.json").read_text()).items() <= result.items()
    assert "epoch 2: loss" in trained.stderr


def test_evaluate_prints_one_object_or_a_table(project: Project, trained: object) -> None:
    args = ("evaluate", "first", "--runs", project.runs)
    result = json.loads(succeed(*args, "--json").stdout)
    assert (result["split"], result["rows"]) == ("test", 48)
    shown = succeed(*args).stdout
    assert share(result["at_threshold"]["accuracy"], 2) in shown
    assert "macro-F1" in shown
    control = succeed(*args, "--control", "hypothesis-only", "--split", "val").stdout
    assert "control: hypothesis-only" in control
    assert "50.00 %" in control


LISTS_AND_TABLES: dict[str, Any] = {
    "fractions": (0.5, 0.25, 0.25),
    "row_weights": (2.0, 1.5),
    "label_names": ("entailment", "neutral"),
    "class_weights": {"contradiction": 1.0, "entailment": 2.5},
    "oversample": {"gender": 1.5, "counting": 2.0},
    "to": ("mlflow", "tensorboard"),
}


def other_value(field: dataclasses.Field[Any], kind: Any, value: Any) -> Any:
    """Return a valid value of a setting that is not `value`."""
    choices = field.metadata["choices"]
    if field.name in LISTS_AND_TABLES:
        return LISTS_AND_TABLES[field.name]
    if choices:
        return next(choice for choice in choices if choice != value)
    if kind is bool:
        return not value
    if kind is int:
        return value + 1
    if kind is float:
        return value / 2 or 0.5
    return "/elsewhere"


SETTINGS = [
    (section, field, hints(kind)[field.name])
    for section, kind in SECTIONS.items()
    for field in dataclasses.fields(kind)
]


@pytest.mark.parametrize(
    ("section", "field", "kind"), SETTINGS, ids=[f"{s}.{f.name}" for s, f, _ in SETTINGS]
)
def test_every_flag_overrides_the_file(
    project: Project, section: str, field: dataclasses.Field[Any], kind: Any
) -> None:
    in_file = getattr(getattr(project.config, section), field.name)
    wanted = other_value(field, kind, in_file)
    listed = [f"{k}={v}" for k, v in wanted.items()] if isinstance(wanted, dict) else wanted
    text = ",".join(map(str, listed)) if isinstance(listed, tuple | list) else str(wanted)
    command = cli.commands["train"]
    name = flag_of(field).removeprefix("--")
    given = [f"--{name}" if wanted else f"--no-{name}"] if kind is bool else [f"--{name}", text]
    flags = ["--config", project.file, *given]
    params = command.make_context("train", flags).params
    keep = {key: value for key, value in params.items() if "__" in key}
    config = read_config(params["config_file"], keep, check=False)
    assert getattr(getattr(config, section), field.name) == wanted
    back = dataclasses.replace(getattr(config, section), **{field.name: in_file})
    assert dataclasses.replace(config, **{section: back}) == project.config


def test_relative_paths_of_the_file_and_of_flags(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "settings").mkdir()
    file = tmp_path / "settings" / "s.toml"
    file.write_text(f"[data]\nrows = 'r.jsonl'\n[store]\nroot = {toml_value('kept')}\n")
    monkeypatch.chdir(tmp_path)
    config = load_config(file, {"data": {"images": "photos"}})
    assert config.data.rows == str(tmp_path / "settings" / "r.jsonl")
    assert config.store.root == str(tmp_path / "settings" / "kept")
    assert config.data.images == str(tmp_path / "photos")


def wait_for(found: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while not found():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextlib.contextmanager
def command(*args: str) -> Iterator[subprocess.Popen[str]]:
    """Start a command that a test will signal; never leave it running."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "cli.py"), *args],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def stopped(
    number: signal.Signals, own_process: bool, found: Callable[[], bool], *args: str
) -> tuple[int, str, str]:
    """Run a command that gets a signal once something is there; return its code and its streams.

    In this process a thread sends it, and nothing has to be imported first.
    """
    if own_process:
        with command(*args) as process:
            wait_for(found, process)
            process.send_signal(number)
            stdout, stderr = process.communicate(timeout=60)
        return process.returncode, stdout, stderr
    ended = threading.Event()

    def send() -> None:
        while not found():
            if ended.wait(0.02):
                return
        os.kill(os.getpid(), number)

    # One that comes too late ends no test.
    earlier = signal.signal(number, lambda *_: None)
    thread = threading.Thread(target=send)
    try:
        thread.start()
        result = invoke(*args)
    finally:
        ended.set()
        thread.join()
        signal.signal(number, earlier)
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "own_process"), [(signal.SIGINT, True), (signal.SIGTERM, False)]
)
def test_stopping_an_extraction(
    project: Project, tmp_path: Path, number: signal.Signals, own_process: bool
) -> None:
    images, count = tmp_path / "images", 100
    images.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        # Large enough that the signal comes long before the last one.
        Image.fromarray(rng.integers(0, 9, (600, 600, 3), np.uint8)).save(images / f"p{i}.png")
    data = {
        "rows": rows_file(tmp_path, *(row(f"p{i}") for i in range(count))),
        "images": str(images),
        "split_file": "",
    }
    store = {"root": str(tmp_path / "cache"), "shard_rows": 2, "encode_batch_size": 2}
    file = project.write(tmp_path, data=data, store=store)
    code, stdout, stderr = stopped(
        number,
        own_process,
        lambda: any((tmp_path / "cache").glob("vit/*/shard-00002.h5")),
        *("extract-vit", "--config", file),
    )
    assert code == 130
    assert stdout == ""
    assert "Traceback" not in stderr
    said = [line for line in stderr.splitlines() if "stopped" in line]
    assert len(said) == 1
    assert stderr.splitlines()[-1] == said[0]
    folder = next((tmp_path / "cache").glob("vit/*/spec.json")).parent
    assert not list(folder.glob(".tmp-*"))
    kept = 2 * len(list(folder.glob("shard-*.h5")))
    assert 0 < kept < count
    rest = json.loads(succeed("extract-vit", "--config", file, "--json").stdout)
    assert rest["cached"] == kept
    assert rest["extracted"] == count - kept


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "own_process"), [(signal.SIGINT, False), (signal.SIGTERM, True)]
)
def test_stopping_a_training(
    project: Project,
    extraction: object,
    tmp_path: Path,
    number: signal.Signals,
    own_process: bool,
) -> None:
    changes = {"epochs": 20, "batch_size": 2, "early_stop_patience": 100}
    file = project.write(tmp_path, train=changes)
    args = ("train", "--config", file, "--runs", str(tmp_path), "--name", "stopped")
    run = tmp_path / "stopped"
    code, stdout, stderr = stopped(number, own_process, (run / "history.csv").exists, *args)
    assert code == 130, stderr
    assert stdout == ""
    assert "Traceback" not in stderr
    assert "stopped in epoch" in stderr.splitlines()[-1]
    assert "--name stopped goes on" in stderr.splitlines()[-1]
    assert json.loads((run / "manifest.json").read_text())["status"] == "stopped"
    done = len((run / "history.csv").read_text().splitlines()) - 1
    assert 0 < done < 20
    succeed(*args)
    assert len((run / "history.csv").read_text().splitlines()) - 1 == 20


def test_a_closed_pipe_is_left_quietly(tmp_path: Path) -> None:
    for args in (["--help"], ["init", "--config", str(tmp_path / "a.toml")]):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            [sys.executable, "cli.py", *args],
            cwd=ROOT,
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
        os.close(writer)
        assert done.stderr == ""
        assert done.returncode == 1


def test_a_full_or_forbidden_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    line = fail(1, "init", "--config", str(tmp_path / "file" / "featstore.toml"))
    assert "cannot be written" in line


def test_the_real_command_exits_with_its_code() -> None:
    done = python("cli.py", "evaluate", "absent", "--runs", "/nonexistent")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: absent: no such run")
    assert len(done.stderr.splitlines()) == 1
