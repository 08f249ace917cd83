"""What every transport says of its other end: gone, or not reading. And what it carries: the parts of a message."""

from __future__ import annotations

from sllm_faas.errors import PlatformError

Parts = list[bytes]


class PeerGone(PlatformError):
    """No such peer is connected."""

    code = "peer_gone"


class PeerBusy(PlatformError):
    """The peer does not read: what may wait for it is full. It is to be treated as lost."""

    code = "peer_busy"
