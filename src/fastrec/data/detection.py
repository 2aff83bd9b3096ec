"""The layout of a log found by looking at its first megabyte.

Columns are known by their names, or, without a header, by their values where only one reading is
possible. A log that could be read in two ways is refused with the columns that were seen, so that
the user states them; nothing is guessed.
"""

from __future__ import annotations

import contextlib
import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastrec.data.blocks import split_line
from fastrec.data.json_lines import as_text, parse_object
from fastrec.data.layout import Column, Layout, ReadOptions, Reference, roles_by_name
from fastrec.data.streams import SAMPLE_BYTES, ByteStream
from fastrec.data.values import Values
from fastrec.errors import ArgumentError, DataError

_DELIMITERS = ("\t", "::", ",", ";", "|", " ")
_QUOTING = (",", ";", "\t", "|")
_LINES = 5_000
_MOSTLY = 0.9
_TAOBAO_FIELDS = 5


@dataclass(frozen=True)
class _Table:
    """The sample as columns of text."""

    file: str
    names: tuple[str, ...] | None
    columns: list[Values]

    def show(self) -> str:
        """The columns with an example each, for messages."""
        labels = self.names or tuple(str(number) for number in range(1, len(self.columns) + 1))
        shown = [
            f"{label}={column.example!r}"
            for label, column in zip(labels, self.columns, strict=True)
        ]
        return ", ".join(shown[:12]) + (", ..." if len(shown) > 12 else "")


def look(stream: ByteStream, options: ReadOptions) -> Layout:
    """The layout of a text log; what ``options`` states is not looked for.

    Raises:
        DataError: there is no row, or user and item are not known; shows the columns.
        ArgumentError: ``options`` names a column or delimiter that is not there.
    """
    lines = _lines(stream.sample)
    if not lines:
        raise DataError(f"{stream.file.name}: no usable row (it is empty)")
    container = options.container
    if container is None and lines[0].lstrip().startswith("{"):
        container = "json"
    if container is None and lines[0].lstrip().startswith("["):
        raise DataError(
            f"{stream.file.name}: is one JSON array; one object a line is read (jq -c '.[]')"
        )
    if container == "json":
        return _look_json(stream.file.name, lines, options)
    if container in (None, "user-lines"):
        delimiter = _user_lines_delimiter(lines, options)
        if delimiter is not None:
            return _user_lines(lines, delimiter, options)
        if container == "user-lines":
            raise DataError(f"{stream.file.name}: its lines are no 'user item item ...'")
    return _look_delimited(stream.file.name, lines, options)


def look_parquet(file: str, columns: dict[str, list[str]], options: ReadOptions) -> Layout:
    """The layout of a Parquet file, from the first rows as text.

    Raises:
        DataError, ArgumentError: as :func:`look`.
    """
    if not columns or not any(columns.values()):
        raise DataError(f"{file}: no usable row (it is empty)")
    table = _Table(file, tuple(columns), [Values(values) for values in columns.values()])
    return choose_columns(Layout("parquet", {}), table, options)


def _lines(sample: bytes) -> list[str]:
    lines = sample.decode("utf-8", "replace").split("\n")
    if len(sample) >= SAMPLE_BYTES:
        lines.pop()  # cut in the middle
    return [line.rstrip("\r") for line in lines if line.strip()][:_LINES]


def _split(lines: Sequence[str], delimiter: str, quoted: bool) -> list[list[str]]:
    if quoted:
        with contextlib.suppress(csv.Error):  # quotes that are no CSV's
            return [row for row in csv.reader(lines, delimiter=delimiter) if row]
    return [split_line(line, delimiter) for line in lines]


def _user_lines_delimiter(lines: list[str], options: ReadOptions) -> str | None:
    """The delimiter of lines that differ in length and begin with a user each, or None."""
    if options.columns or options.header is not None:
        return None
    for delimiter in (" ", "\t", ",") if options.delimiter is None else (options.delimiter,):
        rows = [split_line(line, delimiter) for line in lines]
        lengths = {len(row) for row in rows}
        first = {row[0] for row in rows}
        if options.container == "user-lines":
            if max(lengths) > 1:
                return delimiter
        elif max(lengths) > 2 and len(first) == len(rows) > 2 and not _alike(rows):
            words = [Values(row).kind for row in rows[:200]]
            if (len(set(words)) == 1 and words[0] == "integer") or options.delimiter is not None:
                return delimiter
    return None


def _alike(rows: list[list[str]]) -> bool:
    """Whether nearly all have the same number of fields."""
    return Counter(map(len, rows)).most_common(1)[0][1] >= _MOSTLY * len(rows)


def _user_lines(lines: list[str], delimiter: str, options: ReadOptions) -> Layout:
    rows = [split_line(line, delimiter) for line in lines]
    columns = {
        "user": Column(0, None, options.ids or Values([row[0] for row in rows]).id_kind),
        "item": Column(
            1, None, options.ids or Values([item for row in rows for item in row[1:]]).id_kind
        ),
    }
    return Layout("user-lines", columns, delimiter)


def _look_json(file: str, lines: list[str], options: ReadOptions) -> Layout:
    objects = [value for line in lines if (value := parse_object(line)) is not None]
    if not objects:
        raise DataError(f"{file}: no usable row (no line is a JSON object)")
    names = tuple(dict.fromkeys(name for value in objects for name in value))
    columns = [Values([as_text(value.get(name)) or "" for value in objects]) for name in names]
    return choose_columns(Layout("json", {}), _Table(file, names, columns), options)


def _look_delimited(file: str, lines: list[str], options: ReadOptions) -> Layout:
    delimiter = options.delimiter or _find_delimiter(lines)
    if delimiter is None:
        raise DataError(
            f"{file}: no delimiter gives every line the same number of fields, at least two: "
            f"{lines[0][:80]!r}; state it with --delimiter"
        )
    quoted = delimiter in _QUOTING and _quoted(lines, delimiter)
    rows = _split(lines, delimiter, quoted)
    n_fields = Counter(len(row) for row in rows).most_common(1)[0][0]
    if n_fields < 2:
        raise ArgumentError("delimiter", "text between the fields of each line", repr(delimiter))
    names = _header(rows, n_fields) if options.header is None else None
    if options.header:
        names = tuple(field.strip() for field in rows[0])
        n_fields = len(names)
    body = [row for row in rows[1 if names else 0 :] if len(row) == n_fields]
    if not body:
        what = "only a header" if names else f"no row of {n_fields} fields"
        raise DataError(f"{file}: no usable row ({what})")
    columns = [Values([row[i] for row in body]) for i in range(n_fields)]
    layout = Layout("delimited", {}, delimiter, quoted, names, n_fields)
    return choose_columns(layout, _Table(file, names, columns), options)


def _find_delimiter(lines: list[str]) -> str | None:
    """The first delimiter that splits nearly all lines into the same number of fields."""
    for delimiter in _DELIMITERS:
        rows = _split(lines[:200], delimiter, delimiter in _QUOTING and _quoted(lines, delimiter))
        if _alike(rows) and Counter(map(len, rows)).most_common(1)[0][0] >= 2:
            return delimiter
    # A log of which many lines are broken: what splits most of them alike.
    best: tuple[int, str] | None = None
    for delimiter in _DELIMITERS[:-1]:
        counts = Counter(line.count(delimiter) for line in lines[:200] if delimiter in line)
        if counts and (best is None or counts.most_common(1)[0][1] > best[0]):
            best = counts.most_common(1)[0][1], delimiter
    return best[1] if best and best[0] * 2 >= min(len(lines), 200) else None


def _quoted(lines: list[str], delimiter: str) -> bool:
    return any(line.startswith('"') or f'{delimiter}"' in line for line in lines)


def _header(rows: list[list[str]], n_fields: int) -> tuple[str, ...] | None:
    """The first line, where it names columns: it holds no value, and known names or words above
    numbers."""
    names = tuple(field.strip() for field in rows[0])
    given = [name for name in names if name]
    if len(names) != n_fields or len(set(given)) < len(given) or len(given) < n_fields - 1:
        return None
    if any(Values([name]).is_value for name in given):
        return None
    if len({"user", "item"} & set(roles_by_name(names))) or len(roles_by_name(names)) > 2:
        return names
    below = [Values([row[i] for row in rows[1:] if len(row) == n_fields]) for i in range(n_fields)]
    return names if any(column.kind in ("integer", "float") for column in below) else None


def choose_columns(layout: Layout, table: _Table, options: ReadOptions) -> Layout:
    """``layout`` with its columns: stated, else by name, else by their values."""
    stated = {
        role: _find(table, role, ref) for role, ref in options.columns.items() if ref is not None
    }
    if len(set(stated.values())) < len(stated):
        raise ArgumentError("columns", "a column of its own for each role", dict(options.columns))
    if table.names is not None:
        looked = roles_by_name(table.names)
    else:
        looked = _roles_by_value(table.columns, stated)
    roles = {role: index for role, index in looked.items() if role not in options.columns}
    roles = {role: index for role, index in roles.items() if index not in stated.values()} | stated
    # An empty column says nothing; its role is then absent.
    roles = {r: i for r, i in roles.items() if r in stated or table.columns[i].kind != "empty"}
    if not {"user", "item"} <= set(roles):
        missing = " and ".join(role for role in ("user", "item") if role not in roles)
        raise DataError(
            f"{table.file}: cannot tell which column is the {missing}; name the columns, by name "
            f"or number: --columns user=..,item=..[,time=..]. Columns seen: {table.show()}"
        )
    columns: dict[str, Column] = {}
    unit = "s"
    for role in ("user", "item", "category", "behaviour", "time"):
        if role not in roles:
            continue
        values = table.columns[roles[role]]
        name = None if table.names is None else table.names[roles[role]]
        if role == "time":
            kind, unit = values.time_kind(options.time_unit)
            if not kind:
                raise DataError(
                    f"{table.file}: column {name or roles[role] + 1} holds no known time "
                    f"({values.example!r}); expected seconds, milliseconds or ISO dates. For the "
                    "order of the rows instead: --columns time=none"
                )
        else:
            kind = "text" if role == "behaviour" else options.ids or values.id_kind
        columns[role] = Column(roles[role], name, kind)
    labels = table.names or tuple(map(str, range(1, len(table.columns) + 1)))
    used = set(roles.values())
    unused = tuple(label or f"column {i + 1}" for i, label in enumerate(labels) if i not in used)
    return replace(layout, columns=columns, time_unit=unit, unused=unused)


def _find(table: _Table, role: str, reference: Reference) -> int:
    """Index of a column stated by name or number."""
    if table.names is not None:
        exact, lower = list(table.names), [name.lower() for name in table.names]
        if str(reference) in exact:
            return exact.index(str(reference))
        if str(reference).lower() in lower:
            return lower.index(str(reference).lower())
    if isinstance(reference, int) and reference <= len(table.columns):
        return reference - 1
    raise ArgumentError("columns", f"for {role} one of the columns {table.show()}", repr(reference))


def _roles_by_value(columns: list[Values], stated: dict[str, int]) -> dict[str, int]:
    """Roles of columns without names; without an item where several readings are possible.

    Args:
        columns: of the sample.
        stated: role -> index, as the user says; those columns are nothing else.
    """
    ids_stated = {"user", "item"} <= set(stated)
    free = [i for i in range(len(columns)) if i not in stated.values()]
    if len(columns) == 2 and not stated:
        return {"user": 0, "item": 1}
    roles: dict[str, int] = {}
    if "user" not in stated and free:
        roles["user"] = free.pop(0)
    free = [i for i in free if columns[i].kind != "empty"]
    # A number like a time in the second column is more likely an item.
    epochs = [i for i in free if columns[i].is_epoch and (i >= 2 or ids_stated)]
    times = [i for i in free if columns[i].is_date or i in epochs]
    words = [i for i in free if columns[i].is_behaviour]
    if times:
        roles["time"] = times[-1]
    if words:
        roles["behaviour"] = words[0]
    if ids_stated:
        return roles
    if len(columns) == _TAOBAO_FIELDS and times == [4] and not words and columns[3].is_small_number:
        # Taobao's columns with numbers for behaviours.
        return {"user": 0, "item": 1, "category": 2, "behaviour": 3, "time": 4}
    rest = [i for i in free if i not in times and i not in words and not columns[i].has_fractions]
    extra = rest[1:] if words else [i for i in rest[1:] if not columns[i].is_rating]
    if rest and len(extra) < 2:
        roles["item"] = rest[0]
        roles.update({"category": extra[0]} if extra else {})
    return roles
