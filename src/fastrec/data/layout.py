"""The layout of a log: which container it is in and which column is the user, the item, the time.

:class:`ReadOptions` is what a user states, :class:`Layout` is what is then known of a log, stated
or found by looking (:mod:`fastrec.data.detection`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from fastrec.errors import ArgumentError, MissingDependencyError

ROLES = ("user", "item", "category", "behaviour", "time")
"""Roles of columns. A log needs user and item; the others may be absent."""

CONTAINERS = ("delimited", "json", "parquet", "user-lines")
"""``delimited``: one event a line (CSV, TSV, ``::``, spaces). ``json``: one JSON object a line.
``parquet``. ``user-lines``: one user a line, ``user item item ...`` in time order."""

TICKS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
"""Time units and their number in a second."""

_SHOWN_UNUSED = 8

Reference = str | int | None
"""A column by its name, by its number (from 1), or None: the log has none."""


@dataclass(frozen=True)
class ReadOptions:
    """How to read a log, where it should not be found by looking; the default is to look.

    Attributes:
        columns: role (``user``, ``item``, ``category``, ``behaviour``, ``time``) -> name of a
            column, its number (from 1), or None for "the log has none".
        container: one of :data:`CONTAINERS`.
        delimiter: text between the fields of a ``delimited`` log; ``" "`` stands for any spaces or
            tabs.
        header: whether the first line names the columns.
        time_unit: unit of numeric times: ``s``, ``ms``, ``us`` or ``ns`` since 1970.
        ids: ``integer`` or ``text``: how user, item and category ids are taken.
        behaviours: a behaviour as written in the log -> its name, e.g. ``{"1": "pv", "4": "buy"}``.
    """

    columns: Mapping[str, Reference] = field(default_factory=lambda: MappingProxyType({}))
    container: str | None = None
    delimiter: str | None = None
    header: bool | None = None
    time_unit: str | None = None
    ids: str | None = None
    behaviours: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        for name, known in (
            ("container", CONTAINERS),
            ("time_unit", tuple(TICKS)),
            ("ids", ("integer", "text")),
        ):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise ArgumentError(name, " or ".join(map(repr, known)), repr(value))
        if self.delimiter is not None and (
            not self.delimiter or set(self.delimiter) & set('"\r\n')
        ):
            raise ArgumentError(
                "delimiter", "text without quotes and line ends", repr(self.delimiter)
            )
        for role, reference in self.columns.items():
            if role not in ROLES:
                raise ArgumentError("columns", f"roles among {', '.join(ROLES)}", repr(role))
            if isinstance(reference, int) and reference < 1:
                raise ArgumentError("columns", "column numbers from 1", f"{role}={reference}")
            if role in ("user", "item") and reference is None:
                raise ArgumentError("columns", f"a column for {role}", f"{role}=none")


def parse_pairs(argument: str, text: str | None) -> dict[str, str]:
    """``a=b,c=d`` as a dictionary.

    Raises:
        ArgumentError: a part without ``=``, or a name given twice.
    """
    pairs: dict[str, str] = {}
    for part in (text or "").split(","):
        if not part.strip():
            continue
        name, equals, value = part.partition("=")
        name = name.strip()
        if not equals or not value.strip() or name in pairs:
            raise ArgumentError(
                argument, "NAME=VALUE pairs, each name once, e.g. user=1,item=2", repr(text)
            )
        pairs[name] = value.strip()
    return pairs


def parse_columns(text: str | None) -> dict[str, Reference]:
    """``user=userId,item=2,category=none`` as the ``columns`` of :class:`ReadOptions`."""
    return {
        role: None if value.lower() == "none" else int(value) if value.isdecimal() else value
        for role, value in parse_pairs("columns", text).items()
    }


@dataclass(frozen=True)
class Column:
    """One column of a log that is used.

    Attributes:
        index: position from 0 (``delimited``), else meaningless.
        name: as in the header or schema, or None.
        kind: ids and numeric times: ``integer`` or ``float``; ids, behaviours: ``text``; times in
            words: a format of ``strftime``.
    """

    index: int
    name: str | None
    kind: str

    @property
    def label(self) -> str:
        """Its name, or its number from 1."""
        return str(self.index + 1) if self.name is None else self.name


@dataclass(frozen=True)
class Layout:
    """Everything needed to read a log.

    Attributes:
        container: one of :data:`CONTAINERS`.
        columns: role -> column; user and item at least.
        delimiter: between fields (``delimited``, ``user-lines``).
        quoted: whether fields may stand in double quotes.
        header: names in the first line, or None where there are none.
        n_fields: fields of a line.
        time_unit: ``s``, ``ms``, ``us``, ``ns``, or ``number`` (orders the rows, is no date).
        unused: labels of the columns that are not used.
    """

    container: str
    columns: Mapping[str, Column]
    delimiter: str = ","
    quoted: bool = False
    header: tuple[str, ...] | None = None
    n_fields: int = 0
    time_unit: str = "s"
    unused: tuple[str, ...] = ()

    def describe(self) -> str:
        """One line, e.g. ``csv, header, user=userId, item=movieId, time=timestamp (s)``."""
        if self.container == "user-lines":
            return f"one line a user ({_delimiter_name(self.delimiter)}), items oldest first"
        parts = [
            _delimiter_name(self.delimiter) if self.container == "delimited" else self.container
        ]
        if self.container == "delimited":
            parts += ["header" if self.header else "no header"]
            parts += ["quoted"] if self.quoted else []
        for role, column in self.columns.items():
            text = f"{role}={column.label}"
            if role == "time":
                text += f" ({self._time_name(column)})"
            elif role != "behaviour" and column.kind == "text":
                text += " (text)"
            parts.append(text)
        if "time" not in self.columns:
            parts.append("no time: order of the rows")
        if self.unused:
            more = len(self.unused) - _SHOWN_UNUSED
            shown = " ".join(self.unused[:_SHOWN_UNUSED])
            parts.append(f"not used: {shown}" + (f" and {more} more" if more > 0 else ""))
        return ", ".join(parts)

    def _time_name(self, time: Column) -> str:
        if "%" in time.kind:
            return "ISO" if time.kind.startswith("%Y-%m-%d") else time.kind
        return "plain numbers" if self.time_unit == "number" else self.time_unit


def _delimiter_name(delimiter: str) -> str:
    names = {",": "csv", "\t": "tsv", " ": "spaces", ";": "csv with ;", "|": "csv with |"}
    return names.get(delimiter, f"fields between {delimiter!r}")


# Names of columns in public logs, lower case, letters and digits only; the first found wins.
_NAMES = {
    "user": """user userid uid visitorid reviewerid customerid customer username memberid member
        accountid account usersha1 uuid clientid deviceid sessionid session""",
    "item": """item itemid iid movieid productid product asin parentasin videoid trackid songid
        artistid musicid bookid isbn articleid newsid newsarticleid clickarticleid docid documentid
        goodsid sku skuid appid gameid venueid poiid locationid businessid recipeid animeid""",
    "category": """category categoryid itemcategory itemcategoryid cat catid cate cateid
        categorycode genreid""",
    "behaviour": """behaviour behavior behaviourtype behaviortype action actiontype event eventtype
        interaction interactiontype btag""",
    "time": """timestamp time ts unixtime unixreviewtime eventtime timems timestampms timestamps
        createdat datetime clicktimestamp date reviewtime""",
}
ROLE_NAMES = {role: tuple(names.split()) for role, names in _NAMES.items()}


def plain_name(name: str) -> str:
    """A column's name without case, punctuation and RecBole's type (``item_id:token``)."""
    return re.sub(r"[^a-z0-9]", "", name.lower().split(":")[0])


def roles_by_name(names: tuple[str, ...]) -> dict[str, int]:
    """Role -> index of the column whose name says so."""
    plain = [plain_name(name) for name in names]
    found = {}
    for role, known in ROLE_NAMES.items():
        index = next((plain.index(name) for name in known if name in plain), None)
        if index is not None:
            found[role] = index
    return found


def require_polars() -> None:
    """Raise MissingDependencyError naming the extra where polars is not installed."""
    try:
        import polars  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("polars", "data", "Reading and writing logs") from error
