"""Each layout that people bring: written here, small, and read without a word of help."""

from __future__ import annotations

import bz2
import datetime
import gzip
import json
import lzma
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import zstandard

from fastrec.data import ReadOptions, SequenceDataset, prepare
from fastrec.data.layout import parse_columns
from fastrec.data.preparation import PrepareReport
from fastrec.errors import ArgumentError, DataError

T0 = 1511544000
BEHAVIOURS = ("pv", "cart", "fav", "buy")
Event = tuple[int, int, int, str, int]


def _events() -> list[Event]:
    """15 users x 12 events over 30 items, times ascending within a user."""
    rng, rows = random.Random(0), []
    for user in range(1, 16):
        time = T0 + rng.randrange(3600)
        for _ in range(12):
            item = rng.randrange(1, 31)
            time += rng.randrange(5, 9000)
            rows.append((user, item, item % 7 + 1, rng.choice(BEHAVIOURS), time))
    return rows


EVENTS = _events()
LINES = [",".join(map(str, row)) for row in EVENTS]
TEXT = "\n".join(LINES) + "\n"
HEADER = "user_id,item_id,category_id,behavior_type,timestamp"


def _iso(time: int, format: str) -> str:
    return datetime.datetime.fromtimestamp(time, datetime.timezone.utc).strftime(format)


def _each(line: Callable[[int, int, int, str, int], str], header: str = "") -> str:
    lines = [line(*row) for row in EVENTS]
    return "\n".join(([header] if header else []) + lines) + "\n"


ALL = "category behaviour time"
TAOBAO_LIKE: dict[str, str | bytes] = {
    "plain.csv": TEXT,
    "crlf_bom.csv": b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode(),
    "cr.csv": TEXT.replace("\n", "\r").encode(),
    "utf16.csv": TEXT.encode("utf-16"),
    "header.csv": f"{HEADER}\n{TEXT}",
    "extra.csv": _each(lambda *row: f"{','.join(map(str, row))},2017-11-25", f"{HEADER},date"),
    "index.csv": "\n".join([f",{HEADER}", *(f"{i},{line}" for i, line in enumerate(LINES))]),
    "quoted.csv": _each(lambda *row: ",".join(f'"{value}"' for value in row)),
    "floats.csv": _each(lambda u, i, c, b, t: f"{u}.0,{i}.0,{c}.0,{b},{t}.0"),
    "milliseconds.csv": _each(lambda u, i, c, b, t: f"{u},{i},{c},{b},{t * 1000}"),
    "iso.csv": _each(lambda u, i, c, b, t: f"{u},{i},{c},{b},{_iso(t, '%Y-%m-%d %H:%M:%S')}"),
    "iso_t.csv": _each(lambda u, i, c, b, t: f"{u},{i},{c},{b},{_iso(t, '%Y-%m-%dT%H:%M:%SZ')}"),
    "upper.csv": _each(lambda u, i, c, b, t: f"{u},{i},{c},{b.upper()},{t}"),
    "tabs.tsv": TEXT.replace(",", "\t"),
    "semicolon.csv": TEXT.replace(",", ";"),
    "bar.txt": TEXT.replace(",", "|"),
    "colons.dat": TEXT.replace(",", "::"),
    "blanks.csv": TEXT.replace(",", ", "),
    "spaces.txt": TEXT.replace(",", "  "),
    "log.csv.gz": gzip.compress(TEXT.encode()),
    "log.csv.bz2": bz2.compress(TEXT.encode()),
    "log.csv.xz": lzma.compress(TEXT.encode()),
    "log.csv.zst": zstandard.compress(TEXT.encode()),
    "frames.csv.zst": b"".join(zstandard.compress(f"{line}\n".encode()) for line in LINES),
    "objects.json": _each(
        lambda u, i, c, b, t: json.dumps(
            {"user_id": u, "asin": i, "category": c, "event": b, "timestamp": t, "x": {"y": [1]}}
        )
    ),
    "python.json": _each(
        lambda u, i, c, b, t: str(
            {"user": u, "item_id": str(i), "cat_id": c, "behavior": b, "time": t}
        )
    ),
}


def _read(path: Path, **kwargs: object) -> tuple[PrepareReport, SequenceDataset, str]:
    told: list[str] = []
    out = path.parent / "out"
    report = prepare(path, out, tell=told.append, force=True, **kwargs)  # type: ignore[arg-type]
    (line,) = told
    return report, SequenceDataset.open(out, verify=True), line


def _write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def _stored(dataset: SequenceDataset, roles: str = "") -> dict[str, list[tuple[object, ...]]]:
    """Original user -> (item, *roles) of the stored events, oldest first."""
    found = {}
    for user, name in enumerate(dataset.users.to_original(range(1, dataset.n_users + 1))):
        part = slice(int(dataset.offsets[user]), int(dataset.offsets[user + 1]))
        items = dataset.items[part]
        columns: list[object] = [dataset.catalogue.to_original(items)]
        if "category" in roles:
            columns.append(dataset.categories.to_original(dataset.item_category[items]))
        if "behaviour" in roles:
            names = dataset.behaviour_names
            columns.append([names[code - 1] for code in dataset.behaviours[part].tolist()])
        if "time" in roles:
            columns.append(dataset.times[part].tolist())
        found[str(name)] = list(zip(*columns, strict=True))  # type: ignore[call-overload]
    return found


def _wanted(roles: str = "", item: Callable[[int], object] = int) -> dict[str, list[tuple]]:
    found: dict[str, list[tuple]] = {}
    for user, raw, category, behaviour, time in EVENTS:
        values = {"category": category, "behaviour": behaviour, "time": time}
        row = (item(raw), *(values[role] for role in values if role in roles))
        found.setdefault(str(user), []).append(row)
    return found


@pytest.mark.parametrize("name", TAOBAO_LIKE)
def test_five_columns_in_any_dress(name: str, tmp_path: Path) -> None:
    report, dataset, line = _read(_write(tmp_path / name, TAOBAO_LIKE[name]), strict=True)
    assert _stored(dataset, ALL) == _wanted(ALL)
    assert report.rows == report.kept == len(EVENTS)
    assert dataset.behaviour_names == BEHAVIOURS
    assert line == f"read as: {report.read_as}"
    assert not report.notes or "30 items" in report.notes[0]


def test_zip_parquet_and_folders_of_parts(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "log.zip", "w") as archive:
        archive.writestr("UserBehavior.csv", TEXT)
        archive.writestr("__MACOSX/._UserBehavior.csv", b"\x00\x05")
    names = ["user", "item", "category", "behaviour", "time"]
    frame = pl.DataFrame(EVENTS, schema=names, orient="row")
    frame.write_parquet(tmp_path / "log.parquet", row_group_size=50)
    stamped = frame.with_columns(pl.from_epoch("time"), pl.col("user").cast(pl.UInt32))
    stamped.write_parquet(tmp_path / "stamped.parquet")
    parts = tmp_path / "parts"
    parts.mkdir()
    for number, begin in enumerate(range(0, len(LINES), 17)):
        # With the header in each, some compressed; part-10 comes after part-9.
        text = "\n".join([HEADER, *LINES[begin : begin + 17]]) + "\n"
        name = f"part-{number}.csv"
        if number % 2:
            (parts / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (parts / name).write_text(text)
    (parts / "_SUCCESS").touch()
    (parts / ".part-0.csv.crc").write_bytes(b"\x00")
    for name in ("log.zip", "log.parquet", "stamped.parquet", "parts", "parts/*"):
        _, dataset, line = (
            _read(tmp_path / name, strict=True) if "*" not in name else _read_glob(parts)
        )
        assert _stored(dataset, ALL) == _wanted(ALL), name
        assert "time (us)" in line or name != "stamped.parquet"


def _read_glob(parts: Path) -> tuple[PrepareReport, SequenceDataset, str]:
    report = prepare(f"{parts}/part-*", parts.parent / "globbed", strict=True)
    assert report.source.endswith("part-2.csv and 8 more")
    return report, SequenceDataset.open(parts.parent / "globbed"), report.read_as


MOVIELENS: dict[str, str] = {
    "ratings.dat": _each(lambda u, i, c, b, t: f"{u}::{i}::{c % 5 + 1}::{t}"),
    "ratings.csv": _each(
        lambda u, i, c, b, t: f"{u},{i},{c / 2},{t}", "userId,movieId,rating,timestamp"
    ),
    "u.data": _each(lambda u, i, c, b, t: f"{u}\t{i}\t{c % 5 + 1}\t{t}"),
    "ml.inter": _each(
        lambda u, i, c, b, t: f"{u}\t{i}\t4\t{t}.5",
        "user_id:token\titem_id:token\trating:float\ttimestamp:float",
    ),
    "yoochoose.dat": _each(
        lambda u, i, c, b, t: f"{u},{_iso(t, '%Y-%m-%dT%H:%M:%S.123Z')},{i},{c}"
    ),
    "gowalla.txt": _each(
        lambda u, i, c, b, t: f"{u}\t{_iso(t, '%Y-%m-%dT%H:%M:%SZ')}\t{30 + c / 7}\t-97.7{c}\t{i}"
    ),
    "headed.csv": _each(
        lambda u, i, c, b, t: f"{t},{u},{i},", "unixReviewTime,reviewerID,asin,category"
    ),
}


@pytest.mark.parametrize("name", MOVIELENS)
def test_users_items_and_times(name: str, tmp_path: Path) -> None:
    report, dataset, line = _read(_write(tmp_path / name, MOVIELENS[name]), strict=True)
    assert _stored(dataset, "time") == _wanted("time")
    assert (report.categories, dataset.n_categories) == (1, 2)
    assert dataset.categories.to_original([0, 1]) == [None, None]
    assert "not used" in line


@pytest.mark.parametrize(
    ("name", "line", "header"),
    [
        ("a.txt", "{} {}", ""),
        ("a.tsv", "{}\t{}", ""),
        ("a.csv", "{},{}", ""),
        ("b.txt", "{}   {}", ""),
        ("c.txt", " {} {} ", ""),
        ("d.txt", "{} {}", "user_id item_id"),
        ("e.csv", '"{}","{}"', '"user","item"'),
    ],
)
def test_users_and_items_alone(name: str, line: str, header: str, tmp_path: Path) -> None:
    path = _write(tmp_path / name, _each(lambda u, i, *_: line.format(u, i), header))
    report, dataset, told = _read(path, strict=True)
    assert _stored(dataset) == _wanted()
    assert dataset.times.max() == len(EVENTS) - 1
    assert "no time: order of the rows" in told
    assert report.window is None


def test_one_line_a_user(tmp_path: Path) -> None:
    wanted = {
        user: events[: 12 - int(user)] for user, events in _wanted().items() if int(user) < 12
    }
    lines = [" ".join([user, *(str(event[0]) for event in wanted[user])]) for user in wanted]
    _, dataset, told = _read(_write(tmp_path / "lines.txt", "\n".join([*lines, "77", "", ""])))
    assert _stored(dataset) == wanted
    assert "one line a user" in told
    texts = "\n".join(f"u{line.replace(' ', ' i')}" for line in lines)
    options = ReadOptions(container="user-lines")
    _, dataset, _ = _read(_write(tmp_path / "texts.txt", texts), options=options)
    assert _stored(dataset) == {
        f"u{user}": [(f"i{item}",) for (item,) in events] for user, events in wanted.items()
    }


def test_a_broken_row_makes_no_user_of_each_line(tmp_path: Path) -> None:
    lines = [f"{u},{100 - u},5,{T0 + u}" for u in range(40)]
    report, _, line = _read(_write(tmp_path / "log.csv", "\n".join([*lines, "41,9"])))
    assert "user=1, item=2, time=4 (s), not used: 3" in line
    assert (report.kept, report.rejected["fields"]) == (40, 1)


@pytest.mark.parametrize(
    ("user", "item"),
    [
        (lambda u: f"A{u:04d}XQ", lambda i: f"B00{i:05d}"),
        (lambda u: f"{u:08x}-1111-2222-3333-444455556666", str),
        (lambda u: str(u + 2**63), str),
        (lambda u: f"{u:05d}", lambda i: f"é{i}\u3000x"),
        (lambda u: str(-u), lambda i: str(i * 10**15 + 2**62)),
    ],
)
def test_ids_of_any_kind_come_back_as_they_were(
    user: Callable[[int], str], item: Callable[[int], str], tmp_path: Path
) -> None:
    path = _write(tmp_path / "log.csv", _each(lambda u, i, c, b, t: f"{user(u)},{item(i)},{t}"))
    _, dataset, _ = _read(path, strict=True)
    found = {name: [str(row[0]) for row in rows] for name, rows in _stored(dataset).items()}
    wanted = {user(int(u)): [item(row[0]) for row in rows] for u, rows in _wanted().items()}
    assert found == wanted
    for ids, name, count in ((dataset.users, user, 15), (dataset.catalogue, item, 30)):
        originals = [name(i) for i in range(1, count + 1)]
        dense = ids.to_dense(originals)
        assert sorted(dense.tolist()) == list(range(1, count + 1))
        assert list(map(str, ids.to_original(dense))) == originals
        assert ids.to_dense(["987654"]).tolist() == [0]


def test_behaviours_that_are_numbers_or_unknown(tmp_path: Path) -> None:
    codes = {name: str(code) for code, name in enumerate(BEHAVIOURS, 1)}
    path = _write(tmp_path / "a.csv", _each(lambda u, i, c, b, t: f"{u},{i},{c},{codes[b]},{t}"))
    report, dataset, _ = _read(path)
    assert dataset.behaviour_names == ("1", "2", "3", "4")
    counts = {name: sum(row[3] == name for row in EVENTS) for name in BEHAVIOURS}
    assert report.behaviours == {codes[name]: n for name, n in counts.items()}
    renamed = ReadOptions(behaviours={code: name for name, code in codes.items()})
    report, dataset, _ = _read(path, options=renamed)
    assert report.behaviours == counts
    words = {"pv": "view", "cart": "AddToCart", "fav": "share", "buy": "transaction"}
    path = _write(tmp_path / "b.csv", _each(lambda u, i, c, b, t: f"{u},{i},{c},{words[b]},{t}"))
    report, dataset, _ = _read(path)
    assert dataset.behaviour_names == ("pv", "cart", "fav", "buy", "share")
    assert dataset.n_behaviours == 6
    assert report.behaviours == {**counts, "fav": 0, "share": counts["fav"]}


def test_behaviours_do_not_depend_on_the_order_of_the_rows(tmp_path: Path) -> None:
    rows = [f"{user},{user},{word},{T0 + user}" for user, word in enumerate("zyxwv" * 9)]
    names = []
    for lines in (rows, rows[::-1]):
        path = _write(tmp_path / "log.csv", "\n".join(["user,item,event,time", *lines]))
        _, dataset, _ = _read(path)
        names.append(dataset.behaviour_names)
        assert dataset.behaviours[int(dataset.offsets[0])] in range(1, 6)
    assert names == [("v", "w", "x", "y", "z")] * 2


def test_times_of_one_second_keep_their_milliseconds_order(tmp_path: Path) -> None:
    lines = [f"1,{item},{T0 * 1000 + 500 - item}" for item in range(1, 60)]
    _, dataset, line = _read(_write(tmp_path / "log.csv", "\n".join(lines)))
    assert dataset.catalogue.to_original(dataset.items) == list(range(59, 0, -1))
    assert set(dataset.times.tolist()) == {T0}
    assert "time=3 (ms)" in line


@pytest.mark.parametrize(
    ("format", "unit"),
    [
        ("%Y%m%d", "%Y%m%d"),
        ("%Y-%m-%d %H", "ISO"),
        ("%Y/%m/%d %H:%M", "%Y/%m/%d %H:%M"),
        ("%Y-%m-%dT%H:%M:%S+00:00", "ISO"),
        ("%b %d, %Y", "%b %d, %Y"),
    ],
)
def test_dates_in_words(format: str, unit: str, tmp_path: Path) -> None:
    header = "user\titem\tdate"
    path = _write(
        tmp_path / "log.tsv", _each(lambda u, i, c, b, t: f"{u}\t{i}\t{_iso(t, format)}", header)
    )
    _, dataset, line = _read(path, strict=True)
    assert f"time=date ({unit})" in line
    zone = datetime.timezone.utc
    for rows, wanted in zip(
        _stored(dataset, "time").values(), _wanted("time").values(), strict=False
    ):
        assert len(rows) == len(wanted)
    parsed = {
        int(
            datetime.datetime.strptime(_iso(t, format)[:19], format[:17])
            .replace(tzinfo=zone)
            .timestamp()
        )
        for *_, t in EVENTS
    }
    assert set(dataset.times.tolist()) == parsed


def test_plain_numbers_order_the_events(tmp_path: Path) -> None:
    path = _write(tmp_path / "log.csv", "user,item,time\n" + "1,7,1130\n1,8,529\n1,9,1111\n")
    report, dataset, line = _read(path)
    assert dataset.catalogue.to_original(dataset.items) == [8, 9, 7]
    assert "(plain numbers)" in line
    assert any("plain numbers" in note for note in report.notes)


def test_properties_of_a_log_are_said(tmp_path: Path) -> None:
    def notes(lines: list[str]) -> str:
        return " ".join(_read(_write(tmp_path / "log.csv", "\n".join(lines)))[0].notes)

    few = notes([f"{u},{u % 80},{T0 + u}" for u in range(200)])
    assert "200 of 200 users have fewer than 3 events" in few
    small = notes([f"{u},{k % 10},{T0 + k}" for u in range(9) for k in range(6)])
    assert "10 items" not in small
    assert "6 items: evaluation ranks all of them, not 50 candidates" in small
    twice = notes([f"{u},{k},{T0 + k}" for u in range(9) for k in range(50) for _ in "ab"])
    assert "450 stored events repeat another one" in twice
    ties = notes([f"{u},{k},{T0}" for u in range(9) for k in range(60)])
    assert "all events have the same time" in ties
    moved = notes([f"{u},{k},{u},pv,{T0 + k}" for u in range(9) for k in range(60)])
    assert "items under several categories, which have the smallest id: 60" in moved


LASTFM = _each(
    lambda u, i, c, b, t: f"user_{u}\t{_iso(t, '%Y-%m-%dT%H:%M:%SZ')}\tffff-{i}\tName {i}\t\tTrack"
)


def test_what_could_be_read_in_two_ways_is_asked_for(tmp_path: Path) -> None:
    path = _write(tmp_path / "lastfm.tsv", LASTFM)
    with pytest.raises(DataError, match=r"which column is the item.*1='user_1', 2='2017-.*'Name"):
        _read(path)
    options = ReadOptions(columns=parse_columns("user=1,item=3"))
    _, dataset, line = _read(path, options=options)
    assert "user=1 (text), item=3 (text), time=2 (ISO), not used: 4 5 6" in line
    wanted = {f"user_{u}": rows for u, rows in _wanted("time", lambda i: f"ffff-{i}").items()}
    assert _stored(dataset, "time") == wanted


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no usable row"),
        (b"\n \n\n", "no usable row"),
        (f"{HEADER}\n".encode(), "only a header"),
        (b"rubbish\nand more\n", "cannot tell|no delimiter|no usable"),
        (b'[{"user": 1, "item": 2}]', "one JSON array"),
        (b"\x00\x01\x02\x03" * 9, "binary file"),
        (b"SQLite format 3\x00", "SQLite"),
        (gzip.compress(TEXT.encode())[:-9], "cut short or damaged"),
        (lzma.compress(TEXT.encode())[:-9], "cut short or damaged"),
        (bz2.compress(TEXT.encode())[:-9], "cut short or damaged"),
        (zstandard.compress(TEXT.encode())[:-9], "cut short or damaged"),
        (b"PK\x03\x04rest", "zip archive"),
        (b"PAR1rest", "Parquet file that cannot be read"),
        (b"user,item,time\n1,2,soon\n1,3,later\n", "holds no known time"),
    ],
)
def test_bad_files_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = _write(tmp_path / "log.bin", content)
    with pytest.raises(DataError, match=message) as caught:
        prepare(path, tmp_path / "out")
    assert str(path) in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["log.bin"]


def test_bad_sources_are_named(tmp_path: Path) -> None:
    (tmp_path / "ml").mkdir()
    for name in ("ratings.dat", "README.txt"):
        (tmp_path / "ml" / name).write_text(TEXT)
    with pytest.raises(DataError, match=r"files of several kinds \(README.txt, ratings.dat\)"):
        prepare(tmp_path / "ml", tmp_path / "out")
    with pytest.raises(DataError, match="no such file"):
        prepare(tmp_path / "*.csv", tmp_path / "out")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="no file in this folder"):
        prepare(tmp_path / "none", tmp_path / "out")
    with pytest.raises(ArgumentError, match="at least one file"):
        prepare([], tmp_path / "out")
    with pytest.raises(ArgumentError, match="alone"):
        prepare(["-", "x.csv"], tmp_path / "out")
    (tmp_path / "a.csv").write_text(f"{HEADER}\n{TEXT}")
    (tmp_path / "b.csv").write_text(f"item_id,user_id,{HEADER[16:]}\n{TEXT}")
    with pytest.raises(DataError, match=r"b\.csv: its columns are in another order"):
        prepare([tmp_path / "a.csv", tmp_path / "b.csv"], tmp_path / "out")


def test_quoted_headers_and_blank_lines_before_them(tmp_path: Path) -> None:
    for part in "ab":
        lines = [f'"{part}{k}","x,{k}"' for k in range(9)]
        (tmp_path / f"{part}.csv").write_text("\n".join(["", '"user","item"', *lines]))
    report = prepare([tmp_path / "a.csv", tmp_path / "b.csv"], tmp_path / "out", strict=True)
    assert (report.users, report.items, report.rows, report.blank_lines) == (18, 9, 18, 0)


def test_windows_hold_in_any_unit(tmp_path: Path) -> None:
    path = _write(tmp_path / "log.csv", _each(lambda u, i, c, b, t: f"{u},{i},{t * 10**9}"))
    middle = sorted(row[-1] for row in EVENTS)[90]
    report, dataset, line = _read(path, window=(middle, 1 << 60))
    assert report.kept == sum(row[-1] >= middle for row in EVENTS)
    assert dataset.times.min() == middle
    assert "(ns)" in line


def test_two_ids_of_one_hash_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastrec.data import text_ids

    monkeypatch.setattr(
        text_ids, "text_keys", lambda texts: text_ids.np.array([len(t) for t in texts])
    )
    path = _write(tmp_path / "log.csv", "user,item\naa,x\nab,x\n")
    with pytest.raises(DataError, match=r"'a[ab]' and 'a[ab]' have the same hash"):
        prepare(path, tmp_path / "out")
