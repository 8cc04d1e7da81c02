"""What a node sent, looked at once: a record of bounded numbers and arrays, or one line that says what is wrong.

Nothing else reads a reply, and nothing of one goes further unscreened: not into an average, a table, a log or an
exception. numpy and Flower alone, so that it serves any other Flower app.
"""

import io
import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Array, Message, RecordDict

Arrays = dict[str, np.ndarray]
Shapes = Mapping[str, tuple[np.dtype, tuple[int | None, ...]]]  # by key; None is any length

LARGEST = 1e12  # of a value: the square of one, and a sum of products of two, are finite in float32
MOST_NUMBERS, MOST_HOSPITALS, WORDS, LINES = 64, 100_000, 200, 30
WHOLE = ("partition-id", "num-partitions", "num-examples")
LIMITS = {  # of what a node says about itself, both ends allowed; of cards the configuration decides
    "partition-id": (0, MOST_HOSPITALS - 1),
    "num-partitions": (1, MOST_HOSPITALS),
    "examples": (0, 1e12),
    "tokens": (0, 1e15),
    "loss-before": (0, 1e6),
    "loss-after": (0, 1e6),
    "nll": (0, 1e6),
    "train-seconds": (0, 1e9),
    "seconds": (0, 1e9),
}


@dataclass(frozen=True)
class Expected:
    """What a usable reply holds.

    ``numbers`` has the limits of each that is read, of which those in ``required`` must be there; ``restore`` makes the
    adapter of the arrays that came, such as an update in few bits, and raises ValueError where it cannot.
    """

    numbers: Mapping[str, tuple[float, float]]
    required: Sequence[str]
    arrays: Shapes = field(default_factory=dict)
    restore: Callable[[Arrays], Arrays] | None = None


@dataclass(frozen=True)
class Reply:
    """What a hospital sent, screened; ``sender`` is its number, or that of its node.

    ``status`` is ``used``, or in one line why not; ``arrays`` are in the order in
    which they were expected, {} where the reply cannot be used; ``numbers`` are NaN where it says nothing; ``trace`` is
    the end of what a client's failure left, in printable lines.
    """

    sender: int
    status: str
    arrays: Arrays
    numbers: dict[str, float]
    trace: str = ""


def screen(message: Message, sender: int, expected: Expected) -> Reply:
    """Make a record of a reply, whatever it is; it never raises. Taught in notebook 03."""
    numbers, why = looked_at(message, lambda content: read_numbers(content, expected.numbers, expected.required))
    arrays, wrong = ({}, why) if why else looked_at(message, lambda content: read_adapter(content, expected))
    trace = message.error.reason or "" if message.has_error() else ""
    lines = "\n".join(map(printable, trace.splitlines()[-LINES:]))
    nothing = dict.fromkeys(expected.numbers, math.nan)
    return Reply(sender, why or wrong or "used", arrays or {}, numbers or nothing, lines)


def looked_at(message: Message, read: Callable[[RecordDict], Any]) -> tuple[Any, str]:
    """What ``read`` makes of a message's content; or None, and why it can make nothing of it, in one line."""
    try:
        if message.has_error():
            return None, printable(f"it failed: {complaint(message)}")
        with np.errstate(over="ignore", invalid="ignore"):
            return read(message.content), ""
    except ValueError as error:
        return None, printable(error)
    except Exception as error:  # a stranger's bytes: numpy, zlib and Flower raise a dozen types
        return None, f"it cannot be read: {type(error).__name__}"


def read_numbers(
    content: RecordDict, limits: Mapping[str, tuple[float, float]], required: Sequence[str]
) -> dict[str, float]:
    """The numbers of a content's one metric record, by the names of ``limits``; NaN for one that is not there.

    Raises:
        ValueError: one is no number within its limits or is missing, or there are none, or hundreds.
    """
    if len(content.metric_records) != 1 or len(content.array_records) > 1:
        raise ValueError("it does not hold one adapter and one set of numbers")
    (given,), found = content.metric_records.values(), {}
    if len(given) > MOST_NUMBERS:
        raise ValueError(f"it holds {len(given)} numbers; allowed are {MOST_NUMBERS}")
    for name, (low, high) in limits.items():
        value, whole = given.get(name), name in WHOLE
        if value is None and name not in required:
            found[name] = math.nan
        elif type(value) not in (int, float) or not low <= value <= high or (whole and value != int(value)):
            kind = "number, whole and" if whole else "finite number"
            raise ValueError(f"its {name} is {reprlib.repr(value)}, not a {kind} from {low:.9g} to {high:.9g}")
        else:
            found[name] = float(value)
    return found


def read_arrays(content: RecordDict, shapes: Shapes) -> Arrays:
    """The arrays of a content's one array record, in the order of ``shapes``; no byte is copied before it fits.

    Raises:
        ValueError: other keys, shapes, dtypes or bytes than these.
    """
    if len(content.array_records) != 1:
        raise ValueError("it does not hold one adapter and one set of numbers")
    (given,) = content.array_records.values()
    odd = set(given) ^ set(shapes)
    if odd:
        raise ValueError(f"{len(odd)} keys are missing or unknown, the first is {printable(min(odd), 100)!r}")
    return {key: _read(key, given[key], *expected) for key, expected in shapes.items()}


def read_adapter(content: RecordDict, expected: Expected) -> Arrays:
    """The adapter of a reply: as it stands there, or from its update; {} where none is expected. In notebook 03.

    Raises:
        ValueError: other arrays than expected, or values that are not finite or out of all proportion.
    """
    if not expected.arrays:
        return {}
    try:
        arrays = read_arrays(content, expected.arrays)
        arrays = expected.restore(arrays) if expected.restore else arrays
    except ValueError as error:
        raise ValueError(f"its update cannot be decoded: {error}" if expected.restore else str(error)) from None
    for key, value in arrays.items():
        if not np.isfinite(value).all():
            raise ValueError(f"{key!r} holds values that are not finite")
        largest = max(value.max(initial=0), -float(value.min(initial=0)))
        if largest > LARGEST:
            raise ValueError(f"{key!r} holds a value of {largest:.3g}; allowed are up to {LARGEST:.0e}")
    return arrays


def read_parts(content: RecordDict, record: str, names: Sequence[str], size: int) -> dict[str, bytes]:
    """The bytes of a config record by name, each of one size.

    Raises:
        ValueError: there is no such record, or another one.
    """
    given = content.config_records.get(record) or {}
    if set(given) != set(names) or not all(type(part) is bytes and len(part) == size for part in given.values()):
        raise ValueError(f"its answer is not what the protocol asks for: {', '.join(names)}, {size} bytes each")
    return {name: given[name] for name in names}


def read_shares(content: RecordDict, record: str, name: str, hospitals: Sequence[int], size: int) -> dict[int, bytes]:
    """Bytes of one size for each of the hospitals, from the lists ``hospitals`` and ``name`` of a config record.

    Raises:
        ValueError: they are for others, or of another size.
    """
    given = content.config_records.get(record) or {}
    made, parts = given.get("hospitals"), given.get(name)
    right = isinstance(made, list) and isinstance(parts, list) and len(made) == len(parts) == len(hospitals)
    right = right and sorted(made) == sorted(hospitals)
    if not right or not all(type(part) is bytes and len(part) == size for part in parts):
        raise ValueError(f"its answer is not what the protocol asks for: {size} bytes for each of {len(hospitals)}")
    return dict(zip(made, parts, strict=True))


def shapes_of(adapter: Arrays) -> Shapes:
    """What is expected of a reply that is like an adapter."""
    return {key: (value.dtype, value.shape) for key, value in adapter.items()}


def complaint(message: Message) -> str:
    """Why a reply is an error: the last line of its reason, which says most."""
    lines = (message.error.reason or "").strip().splitlines()
    return printable(lines[-1]) if lines else f"an error without a reason (code {message.error.code})"


def printable(text: object, most: int = WORDS) -> str:
    """A text on one line, without control characters, of so many characters at most."""
    shown = str(text)
    line = " ".join("".join(c if c.isprintable() else " " for c in shown[: 4 * most]).split())
    return line if len(line) <= most and len(shown) <= 4 * most else f"{line[: most - 1]}…"


def _read(key: str, array: Array, dtype: np.dtype, shape: tuple[int | None, ...]) -> np.ndarray:
    """The array of Flower's bytes, which are a .npy file: its header is read first, and believed in nothing."""
    stream, form = io.BytesIO(array.data), np.lib.format
    if array.stype != "numpy.ndarray":
        raise ValueError(f"{key!r} cannot be read: it is serialised as {printable(array.stype, 20)!r}, not by numpy")
    try:
        readers = {(1, 0): form.read_array_header_1_0, (2, 0): form.read_array_header_2_0}
        there, fortran, kind = readers[form.read_magic(stream)](stream)
    except Exception as error:  # also SyntaxError and RecursionError
        raise ValueError(f"{key!r} cannot be read: {type(error).__name__}") from None
    if len(array.data) - stream.tell() != math.prod(there) * kind.itemsize:
        raise ValueError(f"{key!r} cannot be read: {len(array.data)} bytes are not one array of shape {there}")
    if kind != dtype:
        raise ValueError(f"{key!r} is {kind}, not {dtype}")
    if len(there) != len(shape) or any(wanted not in (None, size) for size, wanted in zip(there, shape, strict=True)):
        raise ValueError(f"{key!r} has shape {there}, not {shape}")
    values = np.frombuffer(array.data, dtype, offset=stream.tell())
    return np.ascontiguousarray(values.reshape(there, order="F" if fortran else "C")).reshape(there)
