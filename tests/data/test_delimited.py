from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastrec.data import TAOBAO_WINDOW, ReadOptions, delimited
from fastrec.data.blocks import MAX_LINE_BYTES, Block, read_blocks
from fastrec.data.layout import Column, Layout
from fastrec.data.normalisation import Normaliser
from fastrec.data.rows import REASONS, Rows
from fastrec.data.sources import LogFile
from fastrec.data.streams import ByteStream
from fastrec.errors import DataError

GOOD = "1,2,3,pv,1511539200"
KINDS = {"user": "integer", "item": "integer", "category": "integer", "behaviour": "text"}
COLUMNS = {
    role: Column(i, None, KINDS.get(role, "integer"))
    for i, role in enumerate(("user", "item", "category", "behaviour", "time"))
}
TAOBAO = Layout("delimited", COLUMNS, n_fields=5)
NARROW = Layout(
    "delimited",
    {"user": COLUMNS["user"], "item": Column(2, None, "float"), "time": Column(1, None, "float")},
    n_fields=4,
)
USER_ITEM = Layout("delimited", {r: COLUMNS[r] for r in ("user", "item")}, " ", n_fields=2)


def parse(data: bytes, layout: Layout) -> list[Rows]:
    return list(delimited._parse(Block(data, 1, data.count(b"\n")), layout))


def reasons(text: str, layout: Layout = TAOBAO) -> list[str | None]:
    normalise = Normaliser(layout, ReadOptions(), TAOBAO_WINDOW)
    found = [code for rows in parse(text.encode(), layout) for code in normalise(rows)[1].tolist()]
    assert len(found) == text.count("\n")
    return [REASONS[code - 1] if code else None for code in found]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (GOOD, None),
        ("-1,+2,003,buy,1512316799", None),
        (" 1, 2, 3,pv, 1511539200", None),
        ("1 ,2,3, pv ,1511539200", None),
        ("1.0,2,3,pv,1511539200", None),
        ('"1",2,3,"pv",1511539200', None),
        ("1,2,,pv,1511539200", None),
        ("1,2,3,view,1511539200", None),
        ("", "blank"),
        ("  \t", "blank"),
        ("1,2,3,pv", "fields"),
        ("1,2,3,pv,1511539200,9", "fields"),
        ('"1,2,3,pv,1511539200', "fields"),
        ("1,2,3,pv,", "time"),
        ("1,2,3,pv,noon", "time"),
        (",2,3,pv,1511539200", "user"),
        ("1,,3,pv,1511539200", "item"),
        ("1.5,2,3,pv,1511539200", "user"),
        ("99999999999999999999,2,3,pv,1511539200", "user"),
        ("1,2,x,pv,1511539200", "category"),
        ("1,2,9223372036854775807,pv,1511539200", "category"),
        ("1,2,3,,1511539200", "behaviour"),
        ("1,2,3,pv,1511539199", "window"),
        ("1,2,3,pv,1512316800", "window"),
        ("1,2,3,pv,-1", "window"),
        ("1,2,3,pv,2130000000", "window"),
    ],
)
def test_reason_of_a_line_between_good_ones(line: str, reason: str | None) -> None:
    assert reasons(f"{GOOD}\n{line}\n{GOOD}\n") == [None, reason, None]
    # First, where polars guesses the number of columns; and alone.
    assert reasons(f"{line}\n{GOOD}\n") == [reason, None]
    assert reasons(f"{line}\n") == [reason]


def test_one_bad_line_in_many_is_found_where_it_is(tmp_path: Path) -> None:
    lines = [GOOD] * 9000
    lines[7777] = "1,2,3"
    text = "\n".join(lines) + "\n"
    assert reasons(text) == [None] * 7777 + ["fields"] + [None] * 1222
    found = [(rows, i) for rows in parse(text.encode(), TAOBAO) for i in range(rows.frame.height)]
    rows, index = found[7777]
    assert rows.where(index) == (7778, "1,2,3")


def test_invalid_utf8_and_null_bytes_are_refused() -> None:
    texts = Layout(
        "delimited", {r: Column(i, None, "text") for i, r in enumerate(("user", "item"))}
    )
    texts = Layout("delimited", texts.columns, ",", n_fields=2)
    normalise = Normaliser(texts, ReadOptions(), None)
    (rows,) = parse(b"a,b\n\xff\xfe,b\n", texts)
    assert [REASONS[code - 1] if code else None for code in normalise(rows)[1]] == [
        None,
        "encoding",
    ]
    (rows,) = parse(GOOD.encode() + b"\n1\x00,2,3,pv,1511539200\n", TAOBAO)
    assert [bool(code) for code in Normaliser(TAOBAO, ReadOptions(), None)(rows)[1]] == [
        False,
        True,
    ]


def test_user_item_lines() -> None:
    text = "1 2\n3 4 5\n\n6 x\n 7\t  8 \r\n"
    assert reasons(text, USER_ITEM) == [None, "fields", "blank", "item", None]


FIELD = st.one_of(
    st.integers(-3, 2**63 + 2).map(str),
    st.sampled_from(["", " ", "\t7", " 7", "7 ", "+7", "0x1", "-", "1e3", "7\r", "\r7", "\x0b7"]),
    st.text(st.characters(codec="utf-8", exclude_characters='\n"'), max_size=3),
)
WORD = st.sampled_from(["pv", "buy", "", "x", "pv ", "pv\r"])
LINE = st.one_of(
    st.tuples(FIELD, FIELD, FIELD, WORD, FIELD).map(",".join),
    st.lists(FIELD, min_size=2, max_size=5).map(",".join),
)


@pytest.mark.parametrize("layout", [TAOBAO, NARROW])
@given(lines=st.lists(LINE, min_size=1, max_size=4))
def test_both_parsers_agree_wherever_polars_takes_the_block(
    layout: Layout, lines: list[str]
) -> None:
    data = "".join(line + "\n" for line in lines).encode("utf-8")
    block = Block(data, 1, data.count(b"\n"))
    fast = delimited._parse_fast(block, layout)
    if fast is not None:
        slow = delimited.parse_lines(block, layout)
        one, two = (Normaliser(layout, ReadOptions(), None)(rows) for rows in (fast, slow))
        assert one[1].tolist() == two[1].tolist()
        assert one[0].filter(one[1] == 0).rows() == two[0].filter(two[1] == 0).rows()


@pytest.mark.parametrize("block_bytes", [20, 33, 1 << 20])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("header", ["", "user_id,item_id,category_id,behavior,timestamp"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("final", [True, False])
def test_blocks_hold_whole_lines_with_their_numbers(
    tmp_path: Path, block_bytes: int, end: str, header: str, bom: bytes, final: bool
) -> None:
    rows = [f"{user},2,3,pv,1511539200" for user in range(7)]
    text = end.join(([header] if header else []) + rows) + (end if final else "")
    path = tmp_path / "log.csv"
    path.write_bytes(bom + text.encode())
    found = {}
    with ByteStream(LogFile(path)) as stream:
        for block in read_blocks(stream, skip_lines=bool(header), block_bytes=block_bytes):
            assert block.data.endswith(b"\n")
            lines = block.data.decode().replace("\r\n", "\n").split("\n")[:-1]
            assert len(lines) == block.n_lines
            found.update({block.first_line + i: line for i, line in enumerate(lines)})
    first = 2 if header else 1
    assert found == {first + i: row for i, row in enumerate(rows)}


def test_quoted_fields_hold_delimiters_quotes_and_line_ends(tmp_path: Path) -> None:
    lines = ['"a,1",x', '"say ""hi""",y', '"two\nlines",z', 'plain,"x"']
    columns = {r: Column(i, None, "text") for i, r in enumerate(("user", "item"))}
    layout = Layout("delimited", columns, ",", quoted=True, n_fields=2)
    path = tmp_path / "log.csv"
    path.write_text("\n".join(lines * 50) + "\n")
    wanted = [("a,1", "x"), ('say "hi"', "y"), ("two\nlines", "z"), ("plain", "x")] * 50
    for block_bytes in (30, 100, 1 << 20):
        with ByteStream(LogFile(path)) as stream:
            rows = list(delimited.read(stream, layout, first=True, block_bytes=block_bytes))
        assert [row for part in rows for row in part.frame.rows()] == wanted
        numbers = [part.where(i)[0] for part in rows for i in range(part.frame.height)]
        assert numbers[:5] == [1, 2, 3, 5, 6]


def test_a_line_without_end_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes(GOOD.encode() + b"\n" + b"7" * (MAX_LINE_BYTES + 2))
    with (
        ByteStream(LogFile(path)) as stream,
        pytest.raises(DataError, match=r"log\.csv:2: a line of more than"),
    ):
        list(read_blocks(stream, block_bytes=1 << 16))
