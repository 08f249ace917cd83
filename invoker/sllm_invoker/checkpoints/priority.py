"""Whose read goes first."""

from __future__ import annotations

from enum import IntEnum


class Priority(IntEnum):
    """The highest is read first; a read that several want has that of the most urgent."""

    PROMOTION = -1
    """It may be asked for one day."""
    AHEAD = 0
    """An instance starts that nobody waits for yet."""
    WAITED = 1
    """Somebody waits."""
