"""Text that is safe to print, and numbers of things in English.

Names and messages come from files that somebody else made.

A key that holds an escape sequence could recolour a terminal, one that holds a line break could fake a line of ours.
So every message is put together from single lines, and each of them is escaped; only the code that joins them writes
line breaks.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable

# C0, DEL and C1 controls; marks, embeddings, overrides and isolates of direction; line and paragraph separators;
# lone surrogates, which stand for bytes that are not UTF-8 and cannot be encoded
_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def printable(text: str) -> str:
    """Return `text` as one line in which nothing moves, hides or recolours: such characters become \\x1b, \\u202e.

    Every other character stays. What is printable already comes back unchanged, so it may be done twice.
    """
    return _HIDDEN.sub(lambda match: _escaped(match[0]), text)


def _escaped(character: str) -> str:
    number = ord(character)
    return _SHORT.get(character) or (f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}")


def block(lines: Iterable[str]) -> str:
    """Join lines, each made printable: whatever a name holds, it stays within its line."""
    return "\n".join(printable(line) for line in lines)


def shell_words(words: Iterable[str]) -> str:
    """Write a command that can be typed: words with hidden characters, or bytes that are not UTF-8, as $'...'."""
    return " ".join(_shell_word(word) for word in words)


def _shell_word(word: str) -> str:
    if printable(word) == word:
        return shlex.quote(word)
    escaped = "".join(
        chr(byte) if 32 <= byte < 127 and byte not in b"'\\" else f"\\x{byte:02x}" for byte in os.fsencode(word)
    )
    return f"$'{escaped}'"


def counted(number: int, noun: str) -> str:
    """Write a number of things: 1 view, 2,000 views."""
    return f"{number:,} {plural(number, noun)}"


def plural(number: float, noun: str) -> str:
    """Return a noun, or the last word of several, as it stands behind a number: view for 1, else views."""
    if number == 1:
        return noun
    if noun.endswith(("s", "x", "tch", "sh")):
        return noun + "es"
    return noun[:-1] + "ies" if noun.endswith("y") else noun + "s"


def have(number: float) -> str:
    """Return the verb behind a number of things: has for 1, else have."""
    return "has" if number == 1 else "have"


def are(number: float) -> str:
    """Return the verb behind a number of things: is for 1, else are."""
    return "is" if number == 1 else "are"
