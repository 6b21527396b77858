"""Tables that are not UTF-8: read where the bytes leave no doubt, else refused with readings."""

from __future__ import annotations

import io
import random
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from featstore.data.encoding import CANDIDATES, encoding_of
from featstore.data.rows import read_examples
from featstore.errors import ConfigError, RowError

PATH = Path("rows.csv")
ENGLISH = ["A dog runs.", "Two men sit on a bench.", "A woman – smiling – reads.", "It is cold."]
ACCENTS = [
    "A man sits in a café.", "The girl’s crème brûlée.", "A “naïve” jalapeño.", "Zoë skis.",
    "A sign says 5 € and ½.", "Müller scores…", "Señor João waits.",
]  # fmt: skip
SENTENCES = {
    "fr": ["Un homme est assis à côté.", "Le garçon tient un ballon coloré.",
           "Une forêt près de là."],
    "de": ["Ein Mann läuft über die Straße.", "Zwei Mädchen spielen draußen.", "Ein grüner Hut."],
    "hu": ["Egy nő sárga kalapot visel.", "A gyűrű az ujján van.", "Az öregember erős, a fiú él."],
    "tr": ["Köpek yatağın üstünde uyuyor.", "Oğlan müzik dinliyor, ışık güçlü.",
           "Kadın sarı giyer."],
    "ru": ["Мужчина сидит на скамейке.", "Две девочки играют на пляже.", "Собака спит на кровати."],
    "zh": ["一个男人坐在长椅上。", "两个女孩在沙滩上玩耍。",
    "一位女士戴着黄色的帽子。", "狗在床上睡觉。",
           "男孩在听音乐。", "人们在街上走路，天气很好。"],
    "ja": ["男の人がベンチに座っている。", "犬がベッドで寝ている。", "少年が音楽を聴いている。"],
    "ko": ["남자가 벤치에 앉아 있다.", "개가 침대에서 자고 있다.", "소년이 음악을 듣고 있다."],
}  # fmt: skip


def table(sentences: list[str], rows: int = 60, plain: int = 0) -> str:
    """Return a CSV of so many rows of these sentences, and `plain` ones in ASCII for each."""
    draw = random.Random(0)
    some = [text for text in ENGLISH if text.isascii()]
    texts = [draw.choice(sentences) for _ in range(rows)]
    texts += [draw.choice(some) for _ in range(rows * plain)]
    lines = [f"{i},{text.replace(',', '')},entailment\n" for i, text in enumerate(texts)]
    return "image_id,hypothesis,label\n" + "".join(lines)


def found(data: bytes) -> tuple[str, bool]:
    return encoding_of(PATH, io.BytesIO(data))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_utf_8_and_marks_come_first(encoding: str) -> None:
    text = table([*ACCENTS, *SENTENCES["zh"]])
    data = text.encode(encoding)
    name, detected = found(data)
    assert not detected
    assert data.decode(name) == text


@pytest.mark.parametrize("rows", [1, 60])
def test_english_with_few_accents_is_read_as_cp1252(rows: int) -> None:
    data = table(ACCENTS, rows, plain=3).encode("cp1252")
    assert found(data) == ("cp1252", True)


@pytest.mark.parametrize(
    ("language", "encoding"),
    [("de", "cp1252"), ("ru", "cp1251"), ("ru", "koi8_r"), ("zh", "gbk"), ("ja", "shift_jis")],
)
def test_what_leaves_no_doubt_is_read(language: str, encoding: str) -> None:
    data = table(SENTENCES[language]).encode(encoding)
    name, detected = found(data)
    assert detected
    assert data.decode(name) == data.decode(encoding)


@pytest.mark.parametrize(
    ("sentences", "encoding", "shown"),
    [
        (SENTENCES["fr"], "cp1252", "cp1252"),
        (SENTENCES["fr"], "cp850", "cp850"),
        (SENTENCES["hu"], "cp1250", "cp1250"),
        (SENTENCES["tr"], "cp1254", "cp1254"),
        (SENTENCES["ko"], "euc_kr", "cp949"),
        (SENTENCES["zh"][:1], "gbk", "gb18030"),
    ],
)
def test_what_is_in_doubt_is_asked(sentences: list[str], encoding: str, shown: str) -> None:
    rows = 1 if len(sentences) == 1 else 60
    data = table(sentences, rows).encode(encoding)
    with pytest.raises(
        RowError, match=r"rows.csv:\d+: byte \d+ of the line is not UTF-8"
    ) as caught:
        found(data)
    message = str(caught.value)
    assert "\n" not in message
    # A line as it stands in the file, read rightly and wrongly.
    right = message.partition(f"' as {shown}")[0].rpartition("'")[2]
    assert right
    assert right in data.decode(encoding)
    assert message.count(" as c") + message.count(" as g") >= 2
    assert "set [data] encoding (or --encoding) to the one that reads right" in message
    assert "save the file as UTF-8" in message


@pytest.mark.parametrize("encoding", ["mac_roman", "cp850", "gbk", "big5", "cp932"])
@pytest.mark.parametrize("seed", range(8))
def test_english_of_other_encodings_is_never_read_as_cp1252(encoding: str, seed: int) -> None:
    draw = random.Random(seed)
    texts = draw.sample(ACCENTS, 2)
    if encoding in ("gbk", "big5", "cp932"):
        texts = ["A “big” dog.", "The dog’s café…".replace("é", "e"), "He waits… – no."][seed % 3 :]
    data = table(texts, 12, plain=4).encode(encoding, "ignore")
    try:
        name, _ = found(data)
    except RowError:
        return
    assert data.decode(name) == data.decode(encoding)


def test_a_damaged_line_of_utf_8_is_named() -> None:
    data = table(ACCENTS).encode().replace("é".encode(), b"\xc3", 1)
    line = data[: data.index(b"\xc3m")].count(b"\n") + 1 if b"\xc3m" in data else None
    with pytest.raises(RowError, match=r"though \d+ other lines are .* damaged") as caught:
        found(data)
    assert line is None or f"rows.csv:{line}: byte" in str(caught.value)


def test_the_encoding_that_is_named_decides(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    text = table(SENTENCES["zh"], 5)
    path.write_bytes(text.encode("gbk"))
    read = read_examples(path, encoding="GBK", duplicates="keep")
    assert all(text in SENTENCES["zh"] for text in read.examples.hypotheses)
    assert read.issues == []
    path.write_bytes(text.encode("utf-8-sig"))
    assert len(read_examples(path, encoding="utf8", duplicates="keep").examples) == 5
    with pytest.raises(RowError, match=r"r.csv:1: byte 1 of the line is not ascii, and \[data\]"):
        read_examples(path, encoding="ascii")
    with pytest.raises(RowError, match=r"r.csv: is not utf-16, and \[data\] encoding says utf-16"):
        read_examples(path, encoding="utf-16")
    for name, near in (("gbkk", "gbk"), ("shift-jsi", "shift_jis"), ("hex", None), ("\0", None)):
        with pytest.raises(ConfigError, match="no text encoding") as caught:
            read_examples(path, encoding=name)
        assert near is None or f"did you mean {near!r}" in str(caught.value)


@pytest.mark.parametrize("name", ["r.csv", "r.jsonl"])
def test_each_row_that_was_read_so_is_named(tmp_path: Path, name: str) -> None:
    row = '{{"Image_ID": "{}", "Hypothesis": "{}", "Label": 1}}\n'
    if name == "r.csv":
        row = '{},"{}",1\n'
    lines = [row.format(i, "A café." if i == 2 else "A dog.") for i in range(5)]
    head = "image_id,hypothesis,label\n" if name == "r.csv" else ""
    (tmp_path / name).write_bytes((head + "".join(lines)).encode("cp1252"))
    read = read_examples(tmp_path / name)
    assert read.examples.hypotheses[2] == "A café."
    (issue,) = read.issues
    assert (issue.kind, issue.reason, issue.text) == ("kept", "read as cp1252", "A café.")
    assert issue.line == (4 if head else 3)


@given(st.binary(max_size=200), st.sampled_from(["", *CANDIDATES, "utf-16", "utf-7"]))
@example(b"\xff\xfe\x00", "")
@example(b"caf\xe9", "")
def test_any_bytes_are_read_as_what_they_are_or_refused(data: bytes, encoding: str) -> None:
    try:
        name, _ = encoding_of(PATH, io.BytesIO(data), encoding)
    except RowError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        data.decode(name)
