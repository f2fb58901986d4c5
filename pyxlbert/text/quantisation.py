"""Vectors in eight bits or one bit a number, the same values as `sentence_transformers.quantization` gives."""

from __future__ import annotations

import numpy as np

PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")


def quantise(
    vectors: np.ndarray,
    precision: str,
    ranges: np.ndarray | None = None,
    calibration: np.ndarray | None = None,
) -> np.ndarray:
    """Vectors in fewer bits.

    Args:
        vectors: floating point [N, E] or [E].
        precision: "float32"; "uint8" and "int8" cut each column's range into 256 steps, from 0 or from -128;
            "ubinary" and "binary" keep whether a number is positive, eight of them a byte, the first one in the
            highest bit, as uint8 or less 128 as int8.
        ranges: [2, E], the smallest and the largest value of each column; values beyond are cut to them. For "int8"
            and "uint8" alone.
        calibration: [M, E], vectors to find `ranges` in; without either they are found in `vectors`, at least two.

    Returns:
        [N, E] or [E], of binary precisions the last axis ⌈E / 8⌉ long.

    Raises:
        TypeError: `vectors` are not floating point.
        ValueError: `precision` is another word, the ranges have another shape or are not there, or `vectors` hold
            values that are not finite where eight bits are wanted.
    """
    check_precision(precision)
    vectors = np.asarray(vectors)
    if not np.issubdtype(vectors.dtype, np.floating):
        raise TypeError(f"vectors: got {vectors.dtype}, wanted floating point")
    if vectors.ndim not in (1, 2):
        raise ValueError(f"vectors: got shape {vectors.shape}, wanted [N, E] or [E]")
    if precision == "float32":
        return vectors.astype(np.float32)
    if precision in ("binary", "ubinary"):
        bits = np.packbits(vectors > 0, axis=-1)
        return bits if precision == "ubinary" else (bits - np.uint8(128)).view(np.int8)
    kind = np.dtype(precision)
    if ranges is None and len(vectors) == 0 and vectors.ndim == 2:
        return vectors.astype(kind)
    if not np.isfinite(vectors).all():
        raise ValueError(f"vectors: hold values that are not finite, which {precision} cannot")
    starts, ends = _ranges(vectors, precision, ranges, calibration)
    steps = (ends - starts) / 255
    steps = np.where(steps == 0, 1, steps)
    values = np.clip(np.floor((vectors - starts) / steps), 0, 255)
    return (values if precision == "uint8" else values - 128).astype(kind)


def check_precision(precision: object) -> None:
    """One of the words.

    Raises:
        ValueError: it is another.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: got {precision!r}, wanted one of {', '.join(PRECISIONS)}")


def check_ranges(ranges: object, size: int) -> np.ndarray:
    """The smallest and the largest value of each of `size` columns, as float32 [2, size].

    Raises:
        ValueError: they are no numbers, of another shape, not finite, or one is larger than its largest.
    """
    try:
        found = np.asarray(ranges, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"ranges: got {type(ranges).__name__}, wanted numbers: {error}") from None
    if found.shape != (2, size):
        raise ValueError(f"ranges: got shape {found.shape}, wanted (2, {size})")
    if not np.isfinite(found).all() or (found[1] < found[0]).any():
        raise ValueError("ranges: wanted finite numbers, none of the second row below that of the first")
    return found


def _ranges(
    vectors: np.ndarray, precision: str, ranges: np.ndarray | None, calibration: np.ndarray | None
) -> np.ndarray:
    if ranges is not None:
        return check_ranges(ranges, vectors.shape[-1])
    found = vectors if calibration is None else np.asarray(calibration)
    if found.ndim != 2 or len(found) < 2 or found.shape[-1] != vectors.shape[-1]:
        raise ValueError(
            f"ranges: {precision} needs the range of each column, which cannot be found in vectors of shape "
            f"{found.shape}; give ranges [2, {vectors.shape[-1]}] or calibration vectors"
        )
    return np.stack([found.min(0), found.max(0)]).astype(np.float32)
