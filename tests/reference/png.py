"""Reads screenshots: 8-bit RGB or RGBA PNG without interlacing, with numpy and zlib alone."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def read_png(path: Path) -> NDArray[np.uint8]:
    """Pixels [height, width, 3]."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n", f"{path} is no PNG"
    packed, at, header = b"", 8, b""
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + size]
        header = body if kind == b"IHDR" else header
        packed += body if kind == b"IDAT" else b""
        at += 12 + size
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    assert depth == 8 and colour in (2, 6) and not interlaced, "not an 8-bit RGB or RGBA PNG"
    channels = 3 if colour == 2 else 4
    return _unfilter(zlib.decompress(packed), height, width, channels)[:, :, :3]


def _unfilter(raw: bytes, height: int, width: int, channels: int) -> NDArray[np.uint8]:
    rows = np.frombuffer(raw, np.uint8).reshape(height, 1 + width * channels)
    pixels = np.zeros((height, width, channels), np.int64)
    above = np.zeros((width, channels), np.int64)
    for y in range(height):
        line = rows[y, 1:].reshape(width, channels).astype(np.int64)
        pixels[y] = above = _line(int(rows[y, 0]), line, above)
    return pixels.astype(np.uint8)


def _line(kind: int, line: NDArray[np.int64], above: NDArray[np.int64]) -> NDArray[np.int64]:
    if kind == 0:
        return line
    if kind == 1:
        return np.cumsum(line, axis=0) & 255
    if kind == 2:
        return (line + above) & 255
    return _by_pixel(kind, line, above)


def _by_pixel(kind: int, line: NDArray[np.int64], above: NDArray[np.int64]) -> NDArray[np.int64]:
    """Filters that need the pixel to the left: average (3) and Paeth (4)."""
    channels = line.shape[1]
    left, corner = [0] * channels, [0] * channels
    found = []
    for given, over in zip(line.tolist(), above.tolist(), strict=True):
        now = []
        for x, a, b, c in zip(given, left, over, corner, strict=True):
            guess = (a + b) // 2 if kind == 3 else _paeth(a, b, c)
            now.append((x + guess) & 255)
        found.append(now)
        left, corner = now, over
    return np.array(found, np.int64)


def _paeth(a: int, b: int, c: int) -> int:
    p = a + b - c
    distances = (abs(p - a), abs(p - b), abs(p - c))
    return (a, b, c)[distances.index(min(distances))]
