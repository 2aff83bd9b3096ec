from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastrec.data import parse
from fastrec.data.parse import REASONS, Block, parse_block, read_blocks
from fastrec.errors import DataError

GOOD = "1,2,3,pv,1511539200"


def reasons(text: str, format: str = "taobao") -> list[str | None]:
    block = Block(text.encode(), 1, text.count("\n"), len(text))
    frame = parse_block(block, format, parse.TAOBAO_WINDOW)
    assert frame.height == block.n_lines
    return [REASONS[code - 1] if code else None for code in frame["reason"]]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (GOOD, None),
        ("-1,+2,003,buy,1512316799", None),
        (" 1, 2, 3,pv, 1511539200", None),
        ("", "blank"),
        ("  \t", "blank"),
        ("1,2,3,pv", "fields"),
        ("1,2,3,pv,1511539200,9", "fields"),
        ("1,2,3,pv,", "integer"),
        ("1,,3,pv,1511539200", "integer"),
        ("1.0,2,3,pv,1511539200", "integer"),
        ("1 ,2,3,pv,1511539200", "integer"),
        ("99999999999999999999,2,3,pv,1511539200", "integer"),
        ('"1",2,3,pv,1511539200', "integer"),
        ("1,2,3,,1511539200", "behaviour"),
        ("1,2,3,view,1511539200", "behaviour"),
        ("1,2,3, pv,1511539200", "behaviour"),
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


def test_invalid_utf8_and_null_bytes_are_refused() -> None:
    for raw in (b"1,2,3,\xff\xfe,1511539200\n", b"1,2,3,p\x00v,1511539200\n"):
        frame = parse_block(Block(GOOD.encode() + b"\n" + raw, 1, 2, 0), "taobao", None)
        assert [bool(code) for code in frame["reason"]] == [False, True]


def test_user_item_lines() -> None:
    assert reasons("1 2\n3 4 5\n\n6 x\n7 8\n", "user-item") == [
        None,
        "fields",
        "blank",
        "integer",
        None,
    ]


FIELD = st.one_of(
    st.integers(-3, 2**63 + 2).map(str),
    st.sampled_from(["", " ", "\t7", " 7", "7 ", "+7", "0x1", "-", "1e3", "7\r", "\r7", "\x0b7"]),
    st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=3),
)
LINE = st.tuples(
    FIELD, FIELD, FIELD, st.sampled_from(["pv", "buy", "", "x", "pv ", "pv\r"]), FIELD
).map(",".join)


@given(st.lists(LINE, min_size=1, max_size=4))
def test_both_parsers_agree_wherever_polars_takes_the_block(lines: list[str]) -> None:
    data = "".join(line + "\n" for line in lines).encode("utf-8")
    block = Block(data, 1, data.count(b"\n"), len(data))
    fast = parse._parse_fast(block, "taobao")
    if fast is not None:
        slow = parse._parse_lines(block, "taobao").select(fast.columns)
        assert slow.rows() == fast.rows()


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
    for block in read_blocks(path, "taobao", block_bytes):
        assert block.data.endswith(b"\n")
        lines = block.data.decode().replace("\r\n", "\n").split("\n")[:-1]
        assert len(lines) == block.n_lines
        found.update({block.first_line + i: line for i, line in enumerate(lines)})
    first = 2 if header else 1
    assert found == {first + i: row for i, row in enumerate(rows)}


@pytest.mark.parametrize("line", [GOOD, "a,b,c,pv,d", "1,b,c,d,e", "a,b,c,d", "a,b,,d,e", ""])
def test_only_a_line_of_names_is_a_header(line: str) -> None:
    assert not parse.is_header(line.encode(), "taobao")


def test_compressed_and_binary_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "log.csv.zip"
    path.write_bytes(b"PK\x03\x04rest")
    with pytest.raises(DataError, match=r"log\.csv\.zip: is a zip file"):
        list(read_blocks(path, "taobao"))
    path.write_bytes(GOOD.encode() + b"\n" + b"7" * (parse.MAX_LINE_BYTES + 2))
    with pytest.raises(DataError, match=r"log\.csv\.zip:2: a line of more than"):
        list(read_blocks(path, "taobao", 1 << 16))
