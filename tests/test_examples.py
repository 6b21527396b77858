"""Row files: formats, labels, line numbers, what is dropped and what is an error."""

from __future__ import annotations

import csv
import gzip
import json
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featstore.data.examples import (
    Examples,
    ReadResult,
    RowIssue,
    UnusableRowsError,
    drop_missing,
    require_every_class,
    summarise,
    write_report,
)
from featstore.data.labels import ACCEPTED, CHOICES, LABELS, UNLABELLED
from featstore.data.rows import MAX_LINE_CHARACTERS, read_examples
from featstore.errors import DataError, RowError

A2 = {"Image_ID": "7", "Label": "entailment", "Hypothesis": "A dog runs.", "Premise": "x"}


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def a2(**changes: Any) -> dict[str, Any]:
    return {**A2, **changes}


def table(result: ReadResult) -> list[tuple[str, str, int, int]]:
    e = result.examples
    return list(
        zip(e.image_ids, e.hypotheses, e.labels.tolist(), e.source_lines.tolist(), strict=True)
    )


def reasons(result: ReadResult) -> list[tuple[int, str]]:
    return [(issue.line, issue.reason) for issue in result.issues]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def test_entailment_is_the_positive_class() -> None:
    assert LABELS == {"contradiction": 0, "entailment": 1}


def test_a2_jsonl(rows: Path) -> None:
    jsonl(rows, A2, a2(Label=" Contradiction ", Hypothesis="  A cat.\t"))
    result = read_examples(rows)
    assert table(result) == [("7", "A dog runs.", 1, 1), ("7", "A cat.", 0, 2)]
    assert result.issues == []
    assert result.examples.labels.dtype == np.int8
    assert result.examples.source_lines.dtype == np.int64
    assert list(result.examples.sources) == [str(rows)] * 2


def test_snli_ve_drops_neutral_and_unlabelled(rows: Path) -> None:
    lines = [
        {"Flickr30K_ID": "1", "sentence1": "p", "sentence2": f"h{i}", "gold_label": label}
        for i, label in enumerate(["entailment", "neutral", "-", "contradiction"])
    ]
    result = read_examples(jsonl(rows, *lines))
    assert table(result) == [("1", "h0", 1, 1), ("1", "h3", 0, 4)]
    assert reasons(result) == [(2, "neutral"), (3, "unknown label")]
    assert summarise(result.issues) == {"neutral": 1, "unknown label": 1}


@pytest.mark.parametrize(
    ("value", "label"),
    [
        *(("ENTAILMENT", 1), (1, 1), ("1", 1), (1.0, 1), ("1.0", 1), (True, 1), ("TRUE", 1)),
        *(("yes", 1), ("E", 1), ("e ", 1)),
        *(("Contradiction", 0), (0, 0), (" 0 ", 0), (0.0, 0), ("0.0", 0), (False, 0)),
        *(("false", 0), ("No", 0), ("C", 0)),
    ],
)
def test_labels_read(rows: Path, value: Any, label: int) -> None:
    assert read_examples(jsonl(rows, a2(Label=value))).examples.labels.tolist() == [label]


@pytest.mark.parametrize("value", [2, -1, "2", 0.5, "0.5", "y", "", "-", None, [], {"a": 1}, [1]])
def test_labels_not_guessed(rows: Path, value: Any) -> None:
    result = read_examples(jsonl(rows, A2, a2(Hypothesis="other", Label=value)))
    assert len(result.examples) == 1
    assert reasons(result) == [(2, "unknown label")]


@pytest.mark.parametrize("codes", [[0, 1, 2], ["2", "0"], [1, 2, 2], [3, "1"], [1.0, 2.0]])
def test_class_ids_are_refused(rows: Path, codes: list[Any]) -> None:
    jsonl(rows, *(a2(Hypothesis=f"h{i}", Label=code) for i, code in enumerate(codes)))
    with pytest.raises(
        RowError, match="would be read inverted; write the labels as words"
    ) as caught:
        read_examples(rows)
    assert "\n" not in str(caught.value)


def test_class_ids_name_both_lines(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("image_id,hypothesis,label\n1,a,entailment\n1,b,0\n1,c,2\n")
    with pytest.raises(RowError, match=r"r.csv:4: label 2, but line 3 has 0"):
        read_examples(path)
    assert len(read_examples(path, labelled=False).examples) == 3


def test_letters_are_labels_unless_they_are_choices(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("image,caption,answer\n1,a,E\n1,b,N\n1,c,C\n1,d,x y\n")
    found = read_examples(path)
    assert found.examples.labels.tolist() == [1, 0]
    assert reasons(found) == [(3, "neutral"), (5, "unknown label")]
    path.write_text("image,caption,answer\n1,a,E\n1,b,A\n1,c,C\n1,d,yes\n")
    with pytest.raises(RowError, match=r"r.csv:3: label 'A', but line 2 has 'E'; .* a choice"):
        read_examples(path)
    found = read_examples(path, labelled=False)
    assert found.examples.labels.tolist() == [UNLABELLED] * 3 + [1]
    assert summarise(found.issues) == {CHOICES: 2, "unknown label": 1}


def test_class_ids_beside_a_repeat_take_no_other_label(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("image,caption,label\n1,a,1\n1,a,1\n1,b,entailment\n1,c,2\n")
    assert read_examples(path, labelled=False).examples.labels.tolist() == [-1, 1, -1]


def test_labels_that_are_none_are_shown_beside_those_that_are(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("image,caption,label\n1,a,ent\n1,b,con\n1,,ent\n")
    with pytest.raises(UnusableRowsError) as caught:
        read_examples(path)
    assert str(caught.value) == (
        f"{path}: has no usable row: all were dropped (2 unknown label, 1 empty text): line 2:"
        f" unknown label (label 'ent'); labels read: {ACCEPTED}"
    )
    assert [(issue.line, issue.detail) for issue in caught.value.issues] == [
        (2, "label 'ent'"), (3, "label 'con'"), (4, "empty")
    ]  # fmt: skip
    sent = pickle.loads(pickle.dumps(caught.value))
    assert (str(sent), sent.issues) == (str(caught.value), caught.value.issues)


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.gz", "rows"])
def test_packed_by_gzip(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(GOOD) + gzip.compress(b"\n" + GOOD.replace(b"runs", b"sits")))
    assert [line for *_, line in table(read_examples(path))] == [1, 3]
    with path.open("rb") as file:
        assert len(read_examples(file).examples) == 2
    path = tmp_path / "rows.csv.gz"
    path.write_bytes(gzip.compress(HEADER + b"1,a,1\n"))
    assert table(read_examples(path)) == [("1", "a", 1, 2)]
    broken = tmp_path / "b.jsonl.gz"
    broken.write_bytes(gzip.compress(b"not an object\n"))
    with pytest.raises(RowError, match=r"b.jsonl.gz:1: not JSON"):
        read_examples(broken)


def test_whole_numbers_are_ids(rows: Path) -> None:
    ids = read_examples(jsonl(rows, a2(Image_ID=12.0), a2(Image_ID=2.0**53))).examples.image_ids
    assert list(ids) == ["12"]  # from 2**53 on a float may stand for several integers


def test_minus_one_is_no_class_id(rows: Path) -> None:
    jsonl(rows, a2(Label=0), a2(Label=1, Hypothesis="b"), a2(Label=-1, Hypothesis="c"))
    assert reasons(read_examples(rows)) == [(3, "unknown label")]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"Hypothesis": "  "}, "empty text"),
        ({"Hypothesis": None}, "empty text"),
        ({"Hypothesis": 3}, "broken text"),
        ({"Hypothesis": "a\ud800b"}, "broken text"),
        ({"Hypothesis": "a\0b"}, "broken text"),
        ({"Image_ID": ""}, "no image id"),
        ({"Image_ID": None}, "no image id"),
        ({"Image_ID": True}, "unsafe image id"),
        ({"Image_ID": 1.5}, "unsafe image id"),
        ({"Image_ID": "../secret"}, "unsafe image id"),
        ({"Image_ID": "a/../../b"}, "unsafe image id"),
        ({"Image_ID": "/etc/passwd"}, "unsafe image id"),
        ({"Image_ID": "C:/x"}, "unsafe image id"),
        ({"Image_ID": "a\\b"}, "unsafe image id"),
        ({"Image_ID": "a\nb"}, "unsafe image id"),
        ({"Image_ID": "./a"}, "unsafe image id"),
        ({"Image_ID": "a//b"}, "unsafe image id"),
        ({"Image_ID": "a\ud800"}, "unsafe image id"),
        ({"Image_ID": "x" * 2000}, "unsafe image id"),
    ],
)
def test_unusable_rows_are_dropped(rows: Path, changes: dict[str, Any], reason: str) -> None:
    result = read_examples(jsonl(rows, A2, a2(**changes)))
    assert len(result.examples) == 1
    assert reasons(result) == [(2, reason)]
    result.examples.digest()


@pytest.mark.parametrize("image_id", ["sub/7", "a.b", "7.jpg", "..a", "a..b", "été 3"])
def test_ordinary_image_ids_stay(rows: Path, image_id: str) -> None:
    assert list(read_examples(jsonl(rows, a2(Image_ID=image_id))).examples.image_ids) == [image_id]


def test_integer_id_becomes_text(rows: Path) -> None:
    ids = read_examples(jsonl(rows, a2(Image_ID=12))).examples.image_ids
    assert list(ids) == ["12"]
    assert isinstance(ids[0], str)


def test_duplicates_and_conflicts(rows: Path) -> None:
    jsonl(rows, A2, a2(Hypothesis="b"), a2(Label="contradiction"), a2(Hypothesis=" A dog runs. "))
    result = read_examples(rows)
    assert [line for *_, line in table(result)] == [1, 2, 3]
    assert [(i.kind, i.line, i.reason) for i in result.issues] == [
        ("kept", 1, "conflicting labels"),
        ("kept", 3, "conflicting labels"),
        ("dropped", 4, "duplicate"),
    ]
    assert "line 3" in result.issues[0].detail
    assert "line 1" in result.issues[2].detail
    kept = read_examples(rows, duplicates="keep")
    assert len(kept.examples) == 4
    assert summarise(kept.issues) == {"conflicting labels": 3}
    with pytest.raises(ValueError, match="duplicates"):
        read_examples(rows, duplicates="warn")


def test_a_later_line_without_a_key_is_dropped(rows: Path) -> None:
    jsonl(rows, A2, {"Image_ID": "1", "Label": "entailment"}, {"Hypothesis": "h", "Label": 1})
    result = read_examples(rows)
    assert reasons(result) == [(2, "empty text"), (3, "no image id")]


def test_formats_may_be_mixed_in_a_jsonl(rows: Path) -> None:
    other = {"Flickr30K_ID": "9", "sentence2": "h", "gold_label": "contradiction"}
    assert table(read_examples(jsonl(rows, A2, other)))[1] == ("9", "h", 0, 2)


def test_unlabelled(rows: Path, tmp_path: Path) -> None:
    jsonl(rows, {"Image_ID": "1", "Hypothesis": "h"}, {"Image_ID": "1", "Hypothesis": "g"})
    assert read_examples(rows, labelled=False).examples.labels.tolist() == [UNLABELLED] * 2
    with pytest.raises(RowError, match="no label column; columns found: 'Image_ID, Hypothesis'"):
        read_examples(rows)
    jsonl(rows, a2(Label="neutral"), a2(Hypothesis="b", Label="?"))
    assert read_examples(rows, labelled=False).examples.labels.tolist() == [UNLABELLED] * 2
    path = tmp_path / "r.csv"
    path.write_text("image_id,caption\n1,x\n")
    assert read_examples(path, labelled=False).examples.labels.tolist() == [UNLABELLED]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_csv_dialects(tmp_path: Path, delimiter: str, encoding: str, newline: str) -> None:
    lines = [
        delimiter.join(cells)
        for cells in (["Image ID", "Sentence", "Answer"], ["0012", "Un café – là", "Entailment"])
    ]
    path = tmp_path / "r.csv"
    path.write_bytes((newline.join(lines) + newline).encode(encoding))
    assert table(read_examples(path)) == [("0012", "Un café – là", 1, 2)]


@pytest.mark.parametrize(
    "header",
    [
        "image_id,hypothesis,label",
        "IMAGE-ID, Hypothesis ,Gold Label",
        "filename,caption,answer",
        "Flickr30K_ID,sentence2,gold_label",
        "image,text,LABEL",
        "image_id,hypothesis,label,premise",
        ",image_id,sentence,label",
    ],
)
def test_csv_column_names(tmp_path: Path, header: str) -> None:
    path = tmp_path / "r.csv"
    row = {"premise": "1,h,0,p", "": "5,1,h,0"}
    names = header.split(",")
    value = next((row[name] for name in (names[0], names[-1]) if name in row), "1,h,0")
    path.write_text(f"{header}\n{value}\n")
    assert table(read_examples(path)) == [("1", "h", 0, 2)]


def test_a_known_name_goes_before_a_synonym(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("image_id,caption,hypothesis,label\n1,premise,h,1\n")
    assert table(read_examples(path)) == [("1", "h", 1, 2)]


def test_csv_line_numbers_with_quoted_newlines(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text(
        '\nimage_id,hypothesis,label\n1,"two\nlines",1\n\n2,"said ""hi"", left",0\n,,\n3,c,?\n'
    )
    result = read_examples(path)
    assert table(result) == [("1", "two\nlines", 1, 3), ("2", 'said "hi", left', 0, 6)]
    assert reasons(result) == [(8, "unknown label")]


def test_csv_wrong_number_of_cells(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("image_id,hypothesis,label\n1,a,1\n2,a man, sitting,1\n3,b\n4,c,0,,\n")
    result = read_examples(path)
    assert [line for *_, line in table(result)] == [2, 5]
    assert reasons(result) == [(3, "wrong number of cells"), (4, "wrong number of cells")]
    assert result.issues[0].detail == "4 cells, the header has 3"
    assert result.issues[0].text == "2,a man,sitting,1"


HEADER = b"image_id,hypothesis,label\n"
GOOD = json.dumps(A2).encode() + b"\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "the file is empty"),
        ("a.csv", b" \n\n", "the file is empty"),
        ("a.csv", b" " * 70000 + b"x", "64 KiB of white space"),
        ("a.jsonl", GOOD + b'{"Image_ID": \n', "a.jsonl:2: not JSON: Expecting value at column 14"),
        ("a.jsonl", GOOD + b'{"Image_ID', "a.jsonl:2: not JSON: Unterminated string starting at c"),
        ("a.jsonl", b"oops\n", "a.jsonl:1: not JSON"),
        ("a.jsonl", GOOD + b"\n[1, 2]\n", r"a.jsonl:3: expected an object .* found \[1, 2\]"),
        ("a.jsonl", GOOD + b'"text"\n', "a.jsonl:2: expected an object"),
        ("a.json", b"[{}]", "JSON array"),
        ("a.jsonl", GOOD + b'{"Image_ID": "\xff"}\n', "a.jsonl:2: byte 15 of the line is not UTF"),
        ("a.csv", b"\xff\xfe\x00", "a.csv: is not utf-16, and its first bytes say so; save"),
        ("a.csv", "image_id,text,label\n1,a,1\n".encode("utf-16-le"), "a.csv:1: NUL byte.* UTF-16"),
        ("a.csv", b"PK\x03\x04rest", "is a ZIP archive or an Excel workbook; unpack it"),
        ("a.parquet", b"PAR1rest", "is a Parquet file; save it as CSV or JSONL"),
        ("a.jsonl.gz", b"\x1f\x8brest", "gzip file that is damaged or cut short"),
        ("a.jsonl.gz", gzip.compress(GOOD, mtime=0)[:-9], "gzip file that is damaged or cut short"),
        ("a.jsonl", GOOD + b"{\0}\n", "a.jsonl:2: NUL byte"),
        ("a.jsonl", GOOD + b'{"a":' * 5000 + b"\n", "a.jsonl:2: not a row"),
        ("a.jsonl", GOOD + b'{"a":' + b"1" * 5000 + b"}\n", "a.jsonl:2: not a row"),
        ("a.jsonl", GOOD + b" " * (MAX_LINE_CHARACTERS + 1), "a.jsonl:2: line of more than"),
        ("a.jsonl", b'{"foo": 1, "bar": 2}\n', "found: 'foo, bar'; columns expected: Image_ID"),
        ("a.jsonl", b'{"label": 1, "Label": 1}\n', "more than one label column, 'label' and 'La"),
        ("a.csv", b"foo;bar\n1;2\n", "a.csv:1: no image id column.* found: 'foo, bar'"),
        ("a.csv", b"image,filename,text,label\n", "more than one image id column"),
        ("a.csv", b"label,image_id,label,text\n", "more than one label column"),
        ("a.csv", HEADER, "no usable row: nothing follows the header"),
        ("a.csv", HEADER + b"1,a,neutral\n2,b,?\n", "dropped .1 neutral, 1 unknown label"),
        ("a.csv", HEADER + b'1,a,1\n2,"open,1\n3,c,1\n', "a.csv:3: the record that starts here"),
        ("a.csv", HEADER + b'1,"a" b,1\n', "a.csv:2: the record that starts here"),
        ("a.csv", HEADER + b"1,a\0,1\n", "a.csv:2: NUL byte"),
        ("a.csv", HEADER + b"1,a,1\n" + b"x" * (MAX_LINE_CHARACTERS + 1), "a.csv:3: line of more"),
        ("a.csv", HEADER + b'1,"' + b"a long line\n" * 20000, "a.csv:2: the record"),
        ("a.csv", b'"image\n', "the header is not CSV"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(RowError, match=message) as caught:
        read_examples(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_line_of_100_mb_costs_little(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"Image_ID": "')
        file.seek(100 << 20)
        file.write(b"x")
    with pytest.raises(RowError, match=r"a.jsonl:1: line of more than"):
        read_examples(path)


def test_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(RowError, match="no such file"):
        read_examples(tmp_path / "none.csv")
    with pytest.raises(RowError, match="is a folder"):
        read_examples(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RowError, match="not a regular file"):
        read_examples(tmp_path / "pipe")


def test_three_classes_keep_neutral_rows(rows: Path) -> None:
    lines = [a2(Hypothesis=f"h{i}", Label=label) for i, label in enumerate(("neutral", "N", 1, 0))]
    path = jsonl(rows, *lines, a2(Hypothesis="h0"), a2(Hypothesis="h9", Label="none"))
    two, three = read_examples(path), read_examples(path, classes=3)
    assert two.examples.labels.tolist() == [1, 0, 1]
    assert [issue.reason for issue in two.issues] == ["neutral", "neutral", "unknown label"]
    assert three.examples.labels.tolist() == [2, 2, 1, 0, 1]
    # What contradicts a neutral row is another label, wherever it stands.
    assert [(i.line, i.reason, i.detail) for i in three.issues] == [
        (1, "conflicting labels", "the other label stands in line 5"),
        (5, "conflicting labels", "the other label stands in line 1"),
        (6, "unknown label", "label 'none'"),
    ]
    require_every_class(three.examples, "train", 3)
    with pytest.raises(DataError, match=r"all three classes, found 0 contradiction.*--classes 2"):
        require_every_class(three.examples.select([0, 2]), "train", 3)
    alone = jsonl(rows, lines[0])
    with pytest.raises(RowError, match="--classes 3 keeps neutral rows"):
        read_examples(alone)
    ids = jsonl(rows, *(a2(Hypothesis=f"h{i}", Label=i) for i in range(3)))
    with pytest.raises(RowError, match="would be read inverted"):
        read_examples(ids, classes=3)


def test_require_every_class(rows: Path) -> None:
    both = read_examples(jsonl(rows, A2, a2(Label=0, Hypothesis="b"))).examples
    require_every_class(both, "train")
    with pytest.raises(DataError, match=r"train: .*found 0 contradiction, 1 entailment"):
        require_every_class(both.select([0]), "train")


def test_drop_missing_keeps_order_and_asks_once(rows: Path) -> None:
    examples = read_examples(
        jsonl(rows, *(a2(Image_ID=i, Hypothesis=f"h{n}") for n, i in enumerate("abac")))
    ).examples
    asked: list[str] = []

    def available(image_id: str) -> str | None:
        asked.append(image_id)
        return image_id if image_id != "b" else None

    left, issues = drop_missing(examples, available)
    assert list(left.hypotheses) == ["h0", "h2", "h3"]
    assert asked == ["a", "b", "c"]
    assert issues == [RowIssue("dropped", str(rows), 2, "b", "no photo", "h1")]
    none, issues = drop_missing(examples, lambda _: False)
    assert len(none) == 0
    assert summarise(issues) == {"no photo": 4}


def test_report_is_csv_and_atomic(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.csv"
    issue = RowIssue("dropped", "f.jsonl", 3, "é,1", "broken text", 'a "b"\n\ud800', "d")
    write_report(path, [issue, issue])
    with path.open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert len(read) == 2
    assert read[0]["image_id"] == "é,1"
    assert read[0]["text"] == 'a "b"\n\\ud800'
    assert read[0]["line"] == "3"
    assert os.listdir(path.parent) == ["report.csv"]


def test_select_concatenate_and_digest(rows: Path) -> None:
    e = read_examples(jsonl(rows, *(a2(Hypothesis=f"h{i}") for i in range(4)))).examples
    assert list(e.select([2, 0]).hypotheses) == ["h2", "h0"]
    assert list(e.select(np.array([True, False, False, True])).hypotheses) == ["h0", "h3"]
    assert len(e.select([])) == 0
    joined = Examples.concatenate([e.select([0, 1]), e.select([2, 3])])
    assert joined.digest() == e.digest()
    assert e.select([1, 0, 2, 3]).digest() != e.digest()
    with pytest.raises(ValueError, match="different lengths"):
        Examples(e.image_ids, e.hypotheses, e.labels[:1], e.source_lines, e.sources)


def test_digest_does_not_depend_on_where_rows_were_read(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("\nimage_id,hypothesis,label\n7,A dog runs.,1\n")
    one = read_examples(path).examples.digest()
    assert one == read_examples(jsonl(tmp_path / "r.jsonl", A2)).examples.digest()
    assert one == read_examples(path, labelled=False).examples.digest()
    path.write_text("\nimage_id,hypothesis,label\n7,A dog runs.,\n")
    assert one != read_examples(path, labelled=False).examples.digest()


def examples_of(rows: list[tuple[str, str, int]]) -> Examples:
    ids, texts, labels = zip(*rows, strict=True) if rows else ((), (), ())
    return Examples(
        np.array(ids, dtype=object),
        np.array(texts, dtype=object),
        np.array(labels, dtype=np.int8),
        np.arange(1, len(rows) + 1),
        np.full(len(rows), "f", dtype=object),
    )


words = st.text(st.characters(codec="utf-8"), max_size=4)
row_lists = st.lists(st.tuples(words, words, st.sampled_from([-1, 0, 1])), max_size=4)


@given(row_lists, row_lists)
def test_digest_tells_tables_apart(a: list[Any], b: list[Any]) -> None:
    assert (examples_of(a).digest() == examples_of(b).digest()) == (a == b)


visible = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(
    lambda text: text == text.strip()
)


@given(
    st.lists(st.tuples(visible, st.sampled_from(["entailment", "contradiction"])), min_size=1),
    st.sampled_from([",", ";", "\t"]),
    st.sampled_from(["\n", "\r\n"]),
)
def test_what_is_written_is_read(rows: list[tuple[str, str]], delimiter: str, end: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        lines, line = [], 2
        as_csv, as_jsonl = Path(folder, "r.csv"), Path(folder, "r.jsonl")
        with as_csv.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(
                file, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL
            )
            writer.writerow(["image_id", "hypothesis", "label"])
            for i, (text, label) in enumerate(rows):
                writer.writerow([f"{i:04}", text, label])
                lines.append(line)
                line += 1 + text.replace("\r\n", "\n").replace("\r", "\n").count("\n")
        jsonl(
            as_jsonl,
            *(a2(Image_ID=f"{i:04}", Hypothesis=t, Label=y) for i, (t, y) in enumerate(rows)),
        )
        wanted = [(f"{i:04}", text, LABELS[label]) for i, (text, label) in enumerate(rows)]
        from_csv, from_jsonl = read_examples(as_csv), read_examples(as_jsonl)
        assert [row[:3] for row in table(from_csv)] == wanted
        assert from_csv.examples.source_lines.tolist() == lines
        assert [row[:3] for row in table(from_jsonl)] == wanted
        assert from_jsonl.examples.source_lines.tolist() == list(range(1, len(rows) + 1))


@given(st.binary(max_size=300), st.sampled_from([b"", GOOD, HEADER]))
def test_any_bytes_give_rows_or_one_line(data: bytes, start: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows")
        path.write_bytes(start + data)
        try:
            assert len(read_examples(path).examples) > 0
        except RowError as error:
            assert "\n" not in str(error)  # noqa: PT017
