"""What a container's bytes say that PyAV does not: whether MP4 is whole, how frames are turned.

MP4 and QuickTime are boxes (ISO/IEC 14496-12), Matroska and WebM are EBML elements (RFC 9559).
What this leaves out: containers whose headers hold no rotation (AVI, MPEG-TS).
"""

import struct
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

_EBML = b"\x1a\x45\xdf\xa3"
_SEGMENT, _TRACKS, _TRACK, _VIDEO = 0x18538067, 0x1654AE6B, 0xAE, 0xE0
_PROJECTION, _KIND, _ROLL = 0x7670, 0x7671, 0x7675


def length(data: bytes) -> int:
    """Bytes that the outer boxes of an MP4 need; more than there are if the file was cut off.

    `len(data)` for other containers.
    """
    at = 0
    while data[4:8] == b"ftyp" and at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if size == 1:  # a 64-bit size follows the name
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        if 0 < size < 8:
            return len(data) + 1  # no box is that small: what follows is not a box
        at += size or len(data) - at  # 0: to the end of the file
    return max(at, len(data))


def quarter_turns(data: bytes, track: int) -> int:
    """How often frames of the first video track are turned by 90 degrees counter-clockwise, 0 to 3.

    `track` is the track's id in MP4 (PyAV's `stream.id`). 0 where the header says nothing.
    """
    if data[4:8] in (b"ftyp", b"moov", b"wide", b"free", b"mdat", b"skip"):
        degrees = _matrix_degrees(data, track)
    elif data.startswith(_EBML):
        degrees = _roll_degrees(data)
    else:
        degrees = 0.0
    return round(degrees / 90) % 4


# ---- MP4


def _boxes(data: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(name, first byte of the content, byte after it) of the boxes between two places."""
    while at + 8 <= end:
        size, head = int.from_bytes(data[at : at + 4], "big"), 8
        if size == 1:
            size, head = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        stop = at + size if size else end
        if stop < at + head or stop > end:
            return
        yield data[at + 4 : at + 8], at + head, stop
        at = stop


def _matrix_degrees(data: bytes, track: int) -> float:
    """The track's matrix times the movie's, as FFmpeg applies them, as degrees."""
    for name, at, end in _boxes(data, 0, len(data)):
        if name != b"moov":
            continue
        movie, shown = np.eye(2), None
        for child, start, stop in _boxes(data, at, end):
            if child == b"mvhd":
                movie = _matrix(data, start, 36, 48)
            elif child == b"trak":
                for inner, first, _ in _boxes(data, start, stop):
                    if inner == b"tkhd" and _track_id(data, first) == track:
                        shown = _matrix(data, first, 40, 52)
        if shown is not None:
            m = shown @ movie
            scale = np.hypot(m[0], m[1])  # of the two columns
            if scale.all():
                return -float(np.degrees(np.arctan2(m[0, 1] / scale[1], m[0, 0] / scale[0])))
    return 0.0


def _track_id(data: bytes, at: int) -> int:
    at += 20 if data[at] == 1 else 12  # times are 64 or 32 bits wide
    return int.from_bytes(data[at : at + 4], "big")


def _matrix(data: bytes, at: int, short: int, long: int) -> Float[np.ndarray, "2 2"]:
    at += long if data[at] == 1 else short
    words = struct.unpack(">9i", data[at : at + 36].ljust(36, b"\0"))
    return np.array([words[0:2], words[3:5]]) / 65536


# ---- Matroska


def _elements(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(id, first byte of the content, byte after it) of the elements between two places."""
    while at < end:
        name = 9 - data[at].bit_length()  # leading zeros say how many bytes follow
        start = at + name
        wide = 9 - data[start].bit_length() if start < end else 9
        if name > 4 or wide > 8:
            return
        size = int.from_bytes(data[start : start + wide], "big") & ((1 << 7 * wide) - 1)
        first = start + wide
        unknown = size == (1 << 7 * wide) - 1  # as live streams are written
        stop = end if unknown else min(first + size, end)
        yield int.from_bytes(data[at:start], "big"), first, stop
        at = stop


def _roll_degrees(data: bytes) -> float:
    """ProjectionPoseRoll of the first video track, where the projection is flat."""
    spans = [(0, len(data))]
    for wanted in (_SEGMENT, _TRACKS, _TRACK, _VIDEO):
        spans = [(a, b) for at, end in spans for i, a, b in _elements(data, at, end) if i == wanted]
    if not spans:
        return 0.0
    found = {
        i: data[a:b]
        for name, at, end in _elements(data, *spans[0])
        if name == _PROJECTION
        for i, a, b in _elements(data, at, end)
    }
    roll = found.get(_ROLL, b"")
    if int.from_bytes(found.get(_KIND, b""), "big") or len(roll) not in (4, 8):
        return 0.0
    return struct.unpack(">f" if len(roll) == 4 else ">d", roll)[0]
