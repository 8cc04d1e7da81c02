"""A file of rows, whatever its suffix, to a table of values as they were written, with a line on what was found out."""

import csv
import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from fedllm_helpers.data.contents import PACKED_SUFFIXES, SUFFIXES, decode, unpack

ROW_NAMES = {"question", "answer", "instruction", "prompt", "input", "output", "messages", "conversations"}
SAMPLE = 65_536  # characters from which the delimiter is found


@dataclass(frozen=True)
class Table:
    """Rows as they were written: strings, and from JSON and Parquet whatever else a value may be."""

    name: str  # of the file or the dataset, for messages
    frame: pd.DataFrame
    found: str = ""  # such as "csv, delimiter ';', utf-8"
    doubt: str = ""  # why it may be misread


def known_suffix(path: str | Path) -> str:
    """The suffix of a file that :func:`read` takes, in small letters and without what packs it; empty for others."""
    path = Path(path)
    path = path.with_suffix("") if path.suffix.lower() in PACKED_SUFFIXES else path
    return path.suffix.lower() if path.suffix.lower() in SUFFIXES else ""


def read(path: str | Path) -> Table:
    """Read CSV, TSV, JSON, JSON lines or Parquet, packed or not; the content decides where the suffix disagrees.

    Values stay as they were written: "007", "NA" and "39.0" are texts, and nothing is taken for a date.

    Raises:
        FileNotFoundError: there is no such file.
        PermissionError: it may not be read.
        ValueError: it holds no rows; the line says what is wrong, and where.
    """
    path = Path(path).expanduser()
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no data file at {path}")
    try:
        content = unpack(path.read_bytes(), path)
        frame, found, doubt = _table(content, known_suffix(path) or path.suffix.lower())
        if not len(frame):
            raise ValueError("there are column names, but no row below them")
    except PermissionError:
        raise PermissionError(f"{path}: this file may not be read: ask for the permission") from None
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    return Table(str(path), frame, found, doubt)


def from_arrow(table: pa.Table) -> pd.DataFrame:
    """Columns of plain Python values: pandas' own would turn whole numbers beside a gap into 39.0."""
    columns = [pd.Series(column.to_pylist(), dtype=object) for column in table.columns]
    frame = pd.concat(columns, axis=1) if columns else pd.DataFrame()
    return frame.set_axis(table.column_names, axis=1)


def _table(content: bytes, suffix: str) -> tuple[pd.DataFrame, str, str]:
    if content.startswith(b"PAR1"):
        try:
            return from_arrow(pq.read_table(pa.BufferReader(content))), "parquet", ""
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"cannot be read as parquet: {error}; is the file whole?") from None
    text, encoding = decode(content)
    doubt = "not UTF-8, so read as cp1252: look at its accents" if encoding == "cp1252" else ""
    start, delimited = text.lstrip()[:1], bool(re.search("[,;\t|]", text.lstrip().split("\n", 1)[0]))
    if suffix == ".parquet" and start not in ("[", "{") and not delimited:
        raise ValueError("cannot be read as parquet: its first bytes are of another kind; is the file whole?")
    if start in ("[", "{") or (suffix in (".json", ".jsonl", ".ndjson") and (start == '"' or not delimited)):
        try:
            frame, form = _json(text)
            return frame, f"{form}, {encoding}", doubt
        except ValueError:
            if suffix not in (".csv", ".tsv"):
                raise
    frame, delimiter = _csv(text, suffix)
    return frame, f"csv, delimiter {'tab' if delimiter == chr(9) else repr(delimiter)}, {encoding}", doubt


def _json(text: str) -> tuple[pd.DataFrame, str]:
    """Rows of a list, of lines, or within one mapping. Not by pandas or arrow, which turn texts into dates."""
    decoder, values, at = json.JSONDecoder(object_pairs_hook=_once, parse_float=str, parse_constant=_constant), [], 0
    try:
        while (at := re.compile(r"[\s\ufeff]*").match(text, at).end()) < len(text):
            value, at = decoder.raw_decode(text, at)
            values.append(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"cannot be read as JSON: {error}; is the file whole?") from None
    rows = _rows(values[0]) if len(values) == 1 else values
    wrong = next((number for number, row in enumerate(rows, 1) if not isinstance(row, dict)), None)
    if not any(rows) or wrong:
        what = f"row {wrong} is {type(rows[wrong - 1]).__name__}" if wrong else "there is none"
        raise ValueError(f'expected a list of rows with names, such as {{"question": …, "answer": …}}; {what}')
    return pd.DataFrame(rows, dtype=object), "JSON lines" if len(values) > 1 else "JSON"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"a row has {twice!r} twice ({', '.join(names)}): which one counts?")
    return row


def _constant(name: str) -> str | None:
    return None if name == "NaN" else name


def _rows(value: Any) -> list:
    """The rows of one JSON value: a list; a mapping that holds one; or columns, or rows by their id."""
    if not isinstance(value, dict):
        return value if isinstance(value, list) else [value]
    names, inner = {str(name).strip().casefold() for name in value}, list(value.values())
    if value.keys() >= {"columns", "data"}:  # pandas' to_json(orient="split")
        header, rows = value["columns"], value["data"]
        if all(isinstance(row, list) and len(row) == len(header) for row in rows):
            return [dict(zip(header, row, strict=True)) for row in rows]
    if not names & ROW_NAMES:
        lists = [item for item in inner if isinstance(item, list) and item and isinstance(item[0], dict)]
        if len(lists) == 1:
            return lists[0]
        return inner if inner and all(isinstance(item, dict) for item in inner) else [value]
    if len(value) > 1 and all(isinstance(item, dict) for item in inner):  # pandas' own to_json
        inner = [list(item.values()) for item in inner if list(item) == list(inner[0])]
    if len(value) > 1 and len(inner) == len(value) and all(isinstance(item, list) for item in inner):
        turns = any(isinstance(item, dict) for items in inner for item in items)
        if not turns and len({len(item) for item in inner}) == 1:
            return [dict(zip(value, row, strict=True)) for row in zip(*inner, strict=True)]
    return [value]


def _csv(text: str, suffix: str) -> tuple[pd.DataFrame, str]:
    said = re.match(r'"?sep=(.)"?(?:\r\n?|\n)', text, re.IGNORECASE)  # Excel's own way to say it
    delimiter, text = (said[1], text[said.end() :]) if said else (_delimiter(text, suffix), text)
    lines = list(_cells(text, delimiter, 1 if said else 0))
    names = lines[0][1] if lines else []
    least, rows = max((i for i, name in enumerate(names, 1) if name.strip()), default=0), []
    for line, cells in lines[1:]:
        extra = "".join(cells[len(names) :]).strip()
        if len(cells) < least or extra:
            raise ValueError(
                f"line {line} has another number of columns than the first ({len(cells)} for {len(names)}; delimiter "
                f"{delimiter!r}); put text with delimiters or line ends into quotes"
            )
        rows.append((cells + [""] * len(names))[: len(names)])
    frame = pd.DataFrame(rows, columns=names, dtype=object)
    nameless = [not str(name).strip() and (frame.iloc[:, i] == "").all() for i, name in enumerate(names)]
    return frame.loc[:, [not empty for empty in nameless]], delimiter


def _cells(text: str, delimiter: str, before: int) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of each row. By `csv`: pandas fills short rows and passes over stray quotes without a word."""
    limit = csv.field_size_limit(len(text) + 1)
    options = {"delimiter": delimiter, "skipinitialspace": True, "strict": True}
    try:
        for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_NONE) if delimiter == "\t" else (csv.QUOTE_MINIMAL,):
            reader, rows = csv.reader(io.StringIO(text, newline=""), quoting=quoting, **options), []
            try:
                for cells in reader:
                    if len(cells) > 1 or "".join(cells).strip():
                        rows.append((reader.line_num + before, cells))
                return iter(rows)
            except csv.Error as caught:
                error = caught
    finally:
        csv.field_size_limit(limit)
    raise ValueError(
        f"cannot be read as csv: line {reader.line_num + before}: {error}; is the file whole, each quote doubled?"
    )


def _delimiter(text: str, suffix: str) -> str:
    """Which of , ; tab | parts the most rows into as many cells as the first."""
    found = {}
    for delimiter in ",;\t|":
        reader = csv.reader(io.StringIO(text[:SAMPLE], newline=""), delimiter=delimiter, skipinitialspace=True)
        widths = [len(row) for row in reader if row]
        widths = widths[:-1] if len(text) > SAMPLE and len(widths) > 1 else widths  # the last one is cut
        same = widths.count(widths[0]) / len(widths)
        found[delimiter] = (widths[0] > 1, same, suffix == ".tsv" and delimiter == "\t", widths[0])
    return max(found, key=found.get)
