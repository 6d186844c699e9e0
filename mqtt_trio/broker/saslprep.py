"""SASLprep: one form for user names and passwords that people type in different ways (RFC 4013)."""

from __future__ import annotations

import stringprep
import unicodedata
from typing import Final

_PROHIBITED: Final = (
    stringprep.in_table_c12,
    stringprep.in_table_c21_c22,
    stringprep.in_table_c3,
    stringprep.in_table_c4,
    stringprep.in_table_c5,
    stringprep.in_table_c6,
    stringprep.in_table_c7,
    stringprep.in_table_c8,
    stringprep.in_table_c9,
)


def saslprep(text: str, *, stored: bool) -> str:
    """Return the prepared form of `text`. `stored`: it is going to be kept, so that characters which Unicode 3.2 does
    not know are refused as well; what is compared with stored ones may have them.

    Raises:
      ValueError: `text` has characters that must not stand there.
    """
    mapped = "".join(" " if stringprep.in_table_c12(c) else c for c in text if not stringprep.in_table_b1(c))
    prepared = unicodedata.ucd_3_2_0.normalize("NFKC", mapped)
    for c in prepared:
        if any(within(c) for within in _PROHIBITED) or (stored and stringprep.in_table_a1(c)):
            raise ValueError(f"the character U+{ord(c):04X} is not allowed")
    if any(map(stringprep.in_table_d1, prepared)):
        # Right to left text stays by itself: RFC 3454 section 6.
        if any(map(stringprep.in_table_d2, prepared)):
            raise ValueError("right to left and left to right characters in one string")
        if not (stringprep.in_table_d1(prepared[0]) and stringprep.in_table_d1(prepared[-1])):
            raise ValueError("a right to left string begins and ends with such characters")
    return prepared
