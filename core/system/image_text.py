"""Text that a picture carries about itself: chunks of a PNG, a comment of a JPEG."""

import zlib

from ... import __version__

_HEADER_END = 33
"""Bytes of a PNG up to the end of its first chunk, behind which others may stand."""

COMMENT = b"\xff\xfe"
"""Marker of a segment of a JPEG that holds a comment."""

_MOST_COMMENT_BYTES = 0xFFFF - 2


def labelled(png: bytes, text: str) -> bytes:
    """The PNG with two text chunks: what it shows, and what made it."""
    chunks = b"".join(
        # What Latin-1 lacks is written as an escape.
        png_chunk(b"tEXt", f"{keyword}\0{words}".encode("latin-1", "backslashreplace"))
        for keyword, words in (("Description", text), ("Software", f"mien {__version__}"))
    )
    return png[:_HEADER_END] + chunks + png[_HEADER_END:]


def commented(jpeg: bytes, text: str) -> bytes:
    """The JPEG with a comment behind its first segment, which readers want to be the first.

    Raises:
        ValueError: The text is longer than a comment can be.
    """
    body = text.encode(errors="backslashreplace")
    if len(body) > _MOST_COMMENT_BYTES:
        raise ValueError(f"a comment may have {_MOST_COMMENT_BYTES} bytes, got {len(body)}")
    # Behind the marker of the JPEG and that of its first segment, whose length counts itself.
    first_end = 4 + int.from_bytes(jpeg[4:6])
    segment = COMMENT + (len(body) + 2).to_bytes(2) + body
    return jpeg[:first_end] + segment + jpeg[first_end:]


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG: its size, its kind of four letters, its data and their checksum."""
    crc = zlib.crc32(data, zlib.crc32(kind))
    return b"".join([len(data).to_bytes(4, "big"), kind, data, crc.to_bytes(4, "big")])
