"""Headers of tars that other people wrote: what one may ask for is bounded before it is read or allocated."""

from __future__ import annotations

import tarfile

MOST_HEADER_BYTES = 1 << 20
"""Of all that describes one member: extended headers, long names, maps of sparse files. A path has 4 KB at most."""

MOST_DIGITS = 20
"""Of a size: 64 bits have no more."""

_EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
             tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)  # fmt: skip


class StrictHeader(tarfile.TarInfo):
    """A member's header. What tarfile treats as a quiet end (a bad header, no end marker) is an error.

    So is one that claims a size below zero, or extended headers of more than MOST_HEADER_BYTES, for which tarfile
    would ask for as much memory.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> StrictHeader:
        """Read one block. Raises tarfile.ReadError, or HeaderError, which `fromtarfile` turns into one."""
        info = super().frombuf(buf, encoding, errors)
        if info.size < 0:
            raise tarfile.ReadError("a header with a size below zero")
        if info.type in _EXTENDED and info.size > MOST_HEADER_BYTES:
            raise tarfile.ReadError(f"an extended header of {info.size:,} bytes")
        return info  # type: ignore[return-value]

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> StrictHeader:
        """Read the next member's header. Raises tarfile.ReadError for all but the proper end."""
        try:
            info = super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise  # two blocks of zeros: the proper end
        except tarfile.HeaderError as error:
            kind = (
                "cut in the middle" if "Empty" in type(error).__name__ or "Trunc" in type(error).__name__ else "corrupt"
            )
            raise tarfile.ReadError(f"{kind} at byte {tar.offset}: {error}") from error  # type: ignore[attr-defined]
        if info.size < 0 or tar.offset < info.offset:  # type: ignore[attr-defined]
            raise tarfile.ReadError("an extended header with a size below zero")
        size = info.pax_headers.get("size", "0")
        if not (size.isascii() and size.isdecimal()):
            raise tarfile.ReadError(f"an extended header whose size is no number: {size[:40]!r}")
        if len(size) > MOST_DIGITS:  # tarfile takes what Python refuses to convert for 0
            raise tarfile.ReadError(f"an extended header with a size of {len(size):,} digits")
        return info  # type: ignore[return-value]
