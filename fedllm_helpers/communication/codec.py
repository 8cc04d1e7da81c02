"""Fewer bits for an adapter, or for the difference of two: number formats, and the largest values alone.

An adapter becomes a few flat arrays, because each array costs about 230 bytes of its own in a Flower message.
"""

import zlib

import numpy as np

from fedllm_helpers.adapters.records import Adapter
from fedllm_helpers.adapters.screening import Shapes

BITS = {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4}
KINDS = {"fp32": np.float32, "fp16": np.float16, "int8": np.int8, "int4": np.uint8}  # of ``values``


def encode(adapter: Adapter, number_format: str = "fp32", keep: float = 1.0) -> Adapter:
    """An adapter, or the difference of two, in fewer bytes. Taught in notebook 07.

    int8 and int4 are symmetric and rounded to the nearest, with one scale per row, rows taken along the longer side of
    each array: a row per rank direction of A and of Bᵀ. Scales are float16 in units of the largest.

    Args:
        adapter: float arrays of any shapes.
        number_format: of the values, one of :data:`BITS`.
        keep: share of the values that is sent, the largest by magnitude over all arrays (top-k; Aji & Heafield 2017,
            arXiv:1704.05021); where they are goes along as a compressed mask of one bit per value.

    Returns:
        Flat arrays: ``values`` (for int4 two to a byte), for int8 and int4 ``scales`` and ``unit``, with top-k
        ``mask``. An adapter without values gives an empty ``values``.

    Raises:
        ValueError: a value is not finite, or too large for float16.
    """
    flat = _flat(adapter)
    if not np.isfinite(flat).all():
        raise ValueError("an adapter that is not finite cannot be compressed")
    if number_format == "fp16" and np.abs(flat).max(initial=0) > np.finfo(np.float16).max:
        raise ValueError(f"a value of {np.abs(flat).max():.3g} is too large for fp16: use int8 or fp32")
    chosen, encoded = _largest(flat, keep), {}
    if keep < 1:
        encoded["mask"] = np.frombuffer(zlib.compress(np.packbits(chosen).tobytes(), 9), np.uint8)
    if BITS[number_format] > 8:
        return encoded | {"values": flat[chosen].astype(np.float16 if number_format == "fp16" else np.float32)}
    levels, rows = 2 ** (BITS[number_format] - 1) - 1, _row_of(adapter)
    highest = np.zeros(rows.max(initial=-1) + 1)
    np.maximum.at(highest, rows, np.abs(np.where(chosen, flat, 0)).astype(np.float64))
    unit = np.float32(highest.max(initial=0) / levels)
    scales = (highest / levels / (unit or 1)).astype(np.float16)
    steps = (scales.astype(np.float64) * unit)[rows[chosen]]
    whole = np.divide(flat[chosen], steps, out=np.zeros(len(steps)), where=steps > 0)
    codes = np.clip(np.rint(whole), -levels, levels).astype(np.int8)
    return encoded | {"values": _pack(codes) if levels < 8 else codes, "scales": scales, "unit": np.array([unit])}


def decode(encoded: Adapter, like: Adapter, number_format: str = "fp32", keep: float = 1.0) -> Adapter:
    """The inverse of :func:`encode`, up to its rounding and what it left out.

    Args:
        encoded: from :func:`encode` with the same two settings.
        like: arrays of the keys and shapes to be had; their values do not matter.

    Returns:
        float32 arrays in the order of ``like``.

    Raises:
        ValueError: the arrays are not those of such an encoding.
    """
    rows, kinds = _row_of(like), _kinds(number_format, keep)
    if encoded.keys() != kinds.keys():
        raise ValueError(f"expected the arrays {', '.join(sorted(kinds))}, there are {', '.join(sorted(encoded))}")
    odd = next((name for name in kinds if encoded[name].ndim != 1 or encoded[name].dtype != kinds[name]), None)
    if odd:  # other shapes would multiply to anything
        raise ValueError(
            f"{odd!r} is {encoded[odd].dtype} of shape {encoded[odd].shape}, not flat {kinds[odd].__name__}"
        )
    chosen = np.ones(len(rows), dtype=bool) if keep >= 1 else _unmask(encoded["mask"], len(rows))
    values, count = encoded["values"], int(chosen.sum())
    if number_format == "int4":
        values = _unpack(values)[:count] if len(values) == -(-count // 2) else values
    if len(values) != count:
        raise ValueError(f"{encoded['values'].nbytes} bytes of values for {count} places of {number_format}")
    if "scales" in kinds:
        scales, unit = encoded["scales"], encoded["unit"]
        if len(scales) != rows.max(initial=-1) + 1 or len(unit) != 1:
            raise ValueError(f"{len(scales)} scales for {rows.max(initial=-1) + 1} rows")
        values = values * (scales.astype(np.float64) * unit[0])[rows[chosen]]
    flat = np.zeros(len(rows), dtype=np.float32)
    flat[chosen] = values
    return _shaped(flat, like)


def layout(number_format: str, keep: float) -> Shapes:
    """The arrays of an encoding, by name; :func:`decode` knows how long each has to be."""
    return {name: (np.dtype(kind), (None,)) for name, kind in _kinds(number_format, keep).items()}


def _kinds(number_format: str, keep: float) -> dict[str, type]:
    few = {"scales": np.float16, "unit": np.float32} if BITS[number_format] < 16 else {}
    return {"values": KINDS[number_format], **few, **({"mask": np.uint8} if keep < 1 else {})}


def _flat(adapter: Adapter) -> np.ndarray:
    """All values in a row, each array turned so that its longer side runs fastest; in the order of the keys."""
    parts = [_lengthwise(adapter[key]).ravel() for key in sorted(adapter)]
    return np.concatenate(parts).astype(np.float32) if parts else np.zeros(0, np.float32)


def _lengthwise(array: np.ndarray) -> np.ndarray:
    """As a matrix whose rows are at least as long as they are many."""
    matrix = array.reshape(-1, array.shape[-1]) if array.ndim > 1 else array.reshape(1, -1)
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def _shaped(flat: np.ndarray, like: Adapter) -> Adapter:
    parts, first = {}, 0
    for key in sorted(like):
        shape, matrix = like[key].shape, _lengthwise(like[key])
        part = flat[first : first + matrix.size].reshape(matrix.shape)
        turned = like[key].ndim > 1 and matrix.shape != (matrix.size // shape[-1], shape[-1])
        parts[key] = np.ascontiguousarray(part.T if turned else part).reshape(shape)
        first += matrix.size
    return {key: parts[key] for key in like}


def _row_of(adapter: Adapter) -> np.ndarray:
    """The number of the row that each value of :func:`_flat` is in."""
    shapes = [_lengthwise(adapter[key]).shape for key in sorted(adapter)]
    lengths = [width for height, width in shapes for _ in range(height)]
    return np.repeat(np.arange(len(lengths)), lengths)


def _largest(flat: np.ndarray, keep: float) -> np.ndarray:
    chosen = np.ones(len(flat), dtype=bool)
    if keep < 1 and len(flat):
        count = max(1, round(keep * len(flat)))
        chosen[np.argpartition(np.abs(flat), len(flat) - count)[: len(flat) - count]] = False
    return chosen


def _unmask(mask: np.ndarray, size: int) -> np.ndarray:
    enough = size // 8 + 2  # whatever it claims to hold
    try:
        whole = zlib.decompressobj().decompress(mask.tobytes(), enough)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    bits = np.unpackbits(np.frombuffer(whole, np.uint8))
    if len(bits) != -(-size // 8) * 8 or bits[size:].any():
        raise ValueError(f"a mask of {len(bits)} bits for {size} places")
    return bits[:size].astype(bool)


def _pack(codes: np.ndarray) -> np.ndarray:
    """Two numbers from −7 to 7 in a byte; a lone last one has a zero beside it."""
    nibbles = (np.append(codes, 0) if len(codes) % 2 else codes).astype(np.uint8) & 15
    return nibbles[::2] | nibbles[1::2] << 4


def _unpack(packed: np.ndarray) -> np.ndarray:
    nibbles = np.stack([packed & 15, packed >> 4], axis=1).ravel().astype(np.int8)
    return np.where(nibbles > 7, nibbles - 16, nibbles)
