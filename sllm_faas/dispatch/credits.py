"""The credit book: which gateway may have how many invocations in flight on which instance. Pure.

Kept by an invoker for its instances. A gateway dispatches without asking while it holds a free slot, so slots
are leases: a limit may be lowered at any time, but the slot counts as taken until the gateway says that it has
taken the lower limit in, and until what it already sent has ended.

    held(share)  = max(limit, every limit not yet replaced in an acknowledgement, in_flight)
    invariant    : sum of held + orphans <= capacity, for every instance at every moment
                   (only an instance that was closed, capacity 0, may have more running than that)

Who gets what (`_targets`): what a gateway could use is `in_flight`, or `limit + want` while it wants more. Slots
are shared max-min over that; what nobody needs stays where it is, and fresh slots go evenly, the remainder to
the first. Where there are fewer slots than gateways that want one, the one served longest ago is next: nobody
starves. A limit is never lowered again before the last grant was acknowledged, so a grant can always be used.

Every method only changes the tables and marks the instance; `settle()` then returns the grants to be sent.
`open/close`, `connect/disconnect`, `take/give`, `reserve/unreserve` are pairs. Not here: who is alive, sockets, time.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from sllm_faas.errors import IllegalTransition

Gateway = bytes


@dataclass(frozen=True, slots=True)
class Granted:
    """A GRANT to send: `limit` is absolute, `seq` rises with every grant of the book."""

    gateway: Gateway
    instance: int
    seq: int
    limit: int


@dataclass(slots=True)
class Share:
    """One gateway's part of one instance. `pending` are the grants (seq, limit) not yet acknowledged."""

    limit: int = 0
    acked: int = 0
    in_flight: int = 0
    want: int = 0
    served: int = 0
    pending: deque[tuple[int, int]] = field(default_factory=deque)

    @property
    def allowed(self) -> int:
        """The highest limit the gateway may still act on."""
        return max(self.acked, max((limit for _, limit in self.pending), default=0))

    @property
    def held(self) -> int:
        return max(self.allowed, self.in_flight)

    @property
    def usable(self) -> int:
        """How many slots it could use now, in all."""
        return max(self.in_flight, self.limit + self.want) if self.want else self.in_flight


@dataclass(slots=True)
class Ledger:
    """One instance. `orphans` are invocations that take a slot and are no gateway's: those whose gateway is lost, and
    those held for another node. `wished` are slots wanted for more of these."""

    capacity: int
    shares: dict[Gateway, Share] = field(default_factory=dict)
    orphans: int = 0
    wished: set[bytes] = field(default_factory=set)
    announce: set[Gateway] = field(default_factory=set)
    """Gateways to be told their limit even if it does not change."""
    contended: bool = False
    """Somebody lacks a slot, so one that becomes free matters."""

    @property
    def free(self) -> int:
        return self.capacity - self.orphans - sum(share.held for share in self.shares.values())

    @property
    def running(self) -> int:
        return self.orphans + sum(share.in_flight for share in self.shares.values())


class CreditBook:
    def __init__(self) -> None:
        self._ledgers: dict[int, Ledger] = {}
        self._gateways: dict[Gateway, None] = {}
        self._seq = 0
        self._dirty: dict[int, None] = {}
        self._served = 0

    # -- instances -------------------------------------------------------------------------------------------

    def open(self, instance: int, capacity: int) -> None:
        """An instance exists; capacity 0 while it is not ready. Opening again changes the capacity upwards."""
        ledger = self._ledgers.get(instance)
        if ledger is None:
            ledger = self._ledgers[instance] = Ledger(0, {gateway: Share() for gateway in self._gateways})
        if capacity < ledger.capacity:
            raise IllegalTransition(f"instance {instance} has {ledger.capacity} slots; they cannot become {capacity}")
        ledger.capacity = capacity
        self._announce(instance, ledger)

    def close(self, instance: int) -> None:
        """No slot of it is granted any more; what runs goes on."""
        ledger = self._ledgers[instance]
        ledger.capacity = 0
        self._announce(instance, ledger)

    def forget(self, instance: int) -> None:
        """The instance is gone with all that ran on it."""
        self._ledgers.pop(instance, None)
        self._dirty.pop(instance, None)

    # -- gateways --------------------------------------------------------------------------------------------

    def connect(self, gateway: Gateway) -> None:
        """A gateway said hello; one that is still known starts anew and leaves orphans."""
        self.disconnect(gateway)
        self._gateways[gateway] = None
        for instance, ledger in self._ledgers.items():
            ledger.shares[gateway] = Share()
            self._announce(instance, ledger, gateway)

    def disconnect(self, gateway: Gateway) -> None:
        """A gateway is gone: its slots are free once what it left running has ended (`give(instance, None)`)."""
        if gateway not in self._gateways:
            return
        del self._gateways[gateway]
        for instance, ledger in self._ledgers.items():
            ledger.orphans += ledger.shares.pop(gateway).in_flight
            ledger.announce.discard(gateway)
            self._dirty[instance] = None

    def ordinal(self) -> int:
        """The next grant's seq. Never repeated, so that an acknowledgement cannot be mistaken for a later one's."""
        self._seq += 1
        return self._seq

    def want(self, instance: int, gateway: Gateway, seq: int, slots: int) -> None:
        """The gateway took in grants up to `seq` and could use `slots` beyond them. Unknown names are ignored:
        the instance or link may have gone while the frame was on its way."""
        ledger = self._ledgers.get(instance)
        share = ledger.shares.get(gateway) if ledger else None
        if share is None:
            return
        while share.pending and share.pending[0][0] <= seq:
            share.acked = share.pending.popleft()[1]
        # What was granted after the gateway spoke already serves part of what it asked for.
        share.want = max(0, slots - max(0, share.limit - share.acked))
        self._dirty[instance] = None

    # -- invocations -----------------------------------------------------------------------------------------

    def take(self, instance: int, gateway: Gateway) -> bool:
        """Put one invocation in a slot; False when this gateway has none there."""
        ledger = self._ledgers.get(instance)
        share = ledger.shares.get(gateway) if ledger else None
        if share is None or ledger is None or not ledger.capacity:
            return False
        if share.in_flight >= share.acked and share.in_flight >= share.allowed:
            return False
        share.in_flight += 1
        return True

    def give(self, instance: int, gateway: Gateway | None) -> None:
        """An invocation has really ended. `gateway` None: it was an orphan."""
        ledger = self._ledgers.get(instance)
        if ledger is None:
            return
        share = ledger.shares.get(gateway) if gateway is not None else None
        if share is None:
            if ledger.orphans <= 0:
                raise IllegalTransition(f"a slot of instance {instance} is given back twice")
            ledger.orphans -= 1
        else:
            if share.in_flight <= 0:
                raise IllegalTransition(f"a slot of instance {instance} is given back twice by {gateway!r}")
            share.in_flight -= 1
        if share is None or ledger.contended:
            self._dirty[instance] = None

    def adopt(self, instance: int, gateway: Gateway) -> None:
        """An orphan is that gateway's now, even beyond its limit."""
        ledger = self._ledgers[instance]
        if ledger.orphans <= 0:
            raise IllegalTransition(f"instance {instance} has no orphan to adopt")
        ledger.orphans -= 1
        ledger.shares[gateway].in_flight += 1
        self._dirty[instance] = None

    def reserve(self, instance: int, key: bytes) -> bool:
        """Take a slot for `key`, which is no gateway's (yet). False: none is free; one is called back from whoever does
        not use it, so ask again after settling, or `unreserve`."""
        ledger = self._ledgers[instance]
        self._dirty[instance] = None
        if not ledger.capacity or ledger.free < 1:
            ledger.wished.add(key)
            return False
        ledger.wished.discard(key)
        ledger.orphans += 1
        return True

    def unreserve(self, instance: int, key: bytes, *, taken: bool) -> None:
        """`key` wants no slot any more; `taken`: it had one."""
        ledger = self._ledgers.get(instance)
        if ledger is None:
            return
        ledger.wished.discard(key)
        self._dirty[instance] = None
        if taken:
            self.give(instance, None)

    def running(self, instance: int) -> int:
        ledger = self._ledgers.get(instance)
        return ledger.running if ledger else 0

    # -- decide ----------------------------------------------------------------------------------------------

    def settle(self) -> list[Granted]:
        """The grants that bring limits to what they should be, as far as free slots allow."""
        grants: list[Granted] = []
        dirty, self._dirty = self._dirty, {}
        for instance in dirty:
            self._settle(instance, self._ledgers[instance], grants)
        return grants

    def _settle(self, instance: int, ledger: Ledger, grants: list[Granted]) -> None:
        targets = self._targets(ledger)
        limits: dict[Gateway, int] = {}
        for gateway, share in ledger.shares.items():
            if share.limit > targets[gateway] and (not share.pending or not ledger.capacity):
                limits[gateway] = targets[gateway]
        free = ledger.free
        lacking = [gateway for gateway, share in ledger.shares.items() if share.limit < targets[gateway]]
        raising = deque(sorted(lacking, key=lambda gateway: ledger.shares[gateway].served))
        while raising:
            gateway = raising.popleft()
            share = ledger.shares[gateway]
            limit = limits.get(gateway, share.limit) + 1
            if limit > share.held:  # a slot that it still holds, from an earlier limit, costs nothing
                if not free:
                    continue
                free -= 1
            limits[gateway] = limit
            if limit < targets[gateway]:
                raising.append(gateway)
        for gateway, share in ledger.shares.items():
            limit = limits.get(gateway, share.limit)
            if limit == share.limit and gateway not in ledger.announce:
                continue
            self._grant(instance, gateway, share, limit, grants)
        ledger.announce.clear()
        several = len(ledger.shares) > 1
        ledger.contended = any(
            share.limit != targets[gateway] or (several and share.want > 0) for gateway, share in ledger.shares.items()
        )

    def _targets(self, ledger: Ledger) -> dict[Gateway, int]:
        """What each limit should be. Never more in all than the capacity that orphans, and those to come, leave."""
        shares = ledger.shares
        left = max(0, ledger.capacity - ledger.orphans - len(ledger.wished))
        targets = dict.fromkeys(shares, 0)
        unmet = sorted((g for g, s in shares.items() if s.usable), key=lambda g: shares[g].served)
        while left and unmet:
            level = left // len(unmet)
            if not level:
                break
            for gateway in unmet:
                part = min(level, shares[gateway].usable - targets[gateway])
                targets[gateway] += part
                left -= part
            unmet = [gateway for gateway in unmet if targets[gateway] < shares[gateway].usable]
        if unmet:
            # Fewer slots left than gateways that could use one. Those that have none at all come in the order
            # in which they were served; otherwise the remainder stays with whoever has it.
            unmet.sort(key=lambda g: (targets[g] > 0, shares[g].limit <= targets[g] if targets[g] else 0))
            for gateway in unmet[:left]:
                targets[gateway] += 1
            return targets
        for gateway, share in shares.items():
            kept = min(left, max(0, share.limit - targets[gateway]))
            targets[gateway] += kept
            left -= kept
        while left and targets:
            gateway = min(targets, key=lambda g: targets[g])
            targets[gateway] += 1
            left -= 1
        return targets

    def _grant(self, instance: int, gateway: Gateway, share: Share, limit: int, grants: list[Granted]) -> None:
        if limit > share.limit:
            self._served += 1
            share.served = self._served
            share.want = max(0, share.want - (limit - share.limit))
        share.limit = limit
        seq = self.ordinal()
        share.pending.append((seq, limit))
        grants.append(Granted(gateway, instance, seq, limit))

    def _announce(self, instance: int, ledger: Ledger, *gateways: Gateway) -> None:
        ledger.announce.update(gateways or ledger.shares)
        self._dirty[instance] = None

    # -- look ------------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Raises AssertionError when a rule of this module does not hold."""
        for instance, ledger in self._ledgers.items():
            assert set(ledger.shares) == set(self._gateways), (instance, ledger)
            assert ledger.orphans >= 0 and all(share.in_flight >= 0 for share in ledger.shares.values())
            if ledger.capacity:
                assert ledger.free >= 0, (instance, ledger)
            for share in ledger.shares.values():
                assert share.limit == (share.pending[-1][1] if share.pending else share.acked)

    def __str__(self) -> str:
        rows = ["instance  capacity  gateway              limit  acked  running  want  pending"]
        for instance, ledger in sorted(self._ledgers.items()):
            head = f"{instance:8}  {ledger.capacity:8}"
            for gateway, share in ledger.shares.items():
                rows.append(
                    f"{head}  {gateway.decode(errors='replace'):20} {share.limit:5}  {share.acked:5}  "
                    f"{share.in_flight:7}  {share.want:4}  {len(share.pending):7}"
                )
            rows.append(f"{head}  {'(orphans)':20} {'':5}  {'':5}  {ledger.orphans:7}")
        return "\n".join(rows)
