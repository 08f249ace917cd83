"""One change of the instance that answers an invocation, as its timeline and the metrics tell it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(slots=True)
class Handover:
    """`migration`: it was moved, `why` is empty. `resume`: its instance was lost, `why` says how. Times are of the
    gateway's clock, in seconds; `ended` is 0 until there is a first output under the new fence."""

    kind: Literal["migration", "resume"]
    source: str
    began: float
    silent: float
    """When the client's last output came before it."""
    why: str = ""
    destination: str = ""
    ended: float = 0.0

    @property
    def gap(self) -> float:
        """Seconds between two outputs that the client may have noticed; 0 while it is not over."""
        return self.ended - self.silent if self.ended else 0.0

    @property
    def where(self) -> str:
        return f"{self.source} -> {self.destination or '?'}"

    @property
    def detail(self) -> str:
        return f"{self.where} ({self.why})" if self.why else self.where

    @property
    def comment(self) -> str:
        """For people who watch the stream."""
        return f"{'migrated' if self.kind == 'migration' else 'resumed'} {self.where}"
