"""The names that git gives to content, by which the Hub lists small files."""

from __future__ import annotations

import hashlib


def blob_id(data: bytes) -> str:
    """Git's name for a file's content: the SHA-1 of a header and the bytes, in hexadecimal."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
