"""The requester's decisions: which block is asked of whom, and when a peer is given up.

`Session.step(event, now)` returns commands; it does no I/O and reads no clock. A wanted block goes
through the states of `life.TRANSITIONS`:

    WANTED ──asked──▶ ASKED ──arrived──▶ VERIFYING ──verified──▶ DONE
       ▲ ◀──released──┘  (its last asker left, said `missing`, was dropped)
       └───────────────────refused──────────┘  (wrong bytes: their sender is banned)
    WANTED ──arrived──▶ VERIFYING  (an ask that had been given up was answered after all)

A block arriving in VERIFYING or later is a duplicate and is thrown away. What is kept true:
- at most `limits.flow.ceiling` bytes are asked and unanswered over all peers, at most a peer's own
  window of one peer; a cancelled ask counts until it is answered or its stream is gone;
- every block is verified once per arrival that could become it, duplicates are never verified;
- bytes of duplicates stay within `duplicates_allowed`, by charging every second ask in advance;
- a peer is never asked for a block it is not known to hold.

Urgent parts go first, then the rarest blocks. When a peer with room finds nothing left to ask, it
takes over asks of those that would need longer (end-game). Verification, dialling, retries and
back-off are the shell's (`client`). Implements spec/05-transfer, section "The requester".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from omnistore.cid import CID
from omnistore.errors import LocalProtocolError
from omnistore.transfer import events as e
from omnistore.transfer.demand import Demand, Group, Wanted, chosen
from omnistore.transfer.life import TRANSITIONS, BlockState
from omnistore.transfer.rate import TokenBucket
from omnistore.transfer.source import Ask, Source, late_asks, replaceable
from omnistore.transfer.window import LIMITS, PeerFlow, SessionLimits


class Session:
    """One model being fetched."""

    def __init__(
        self, rng: Callable[[], float], limits: SessionLimits = LIMITS, cap: TokenBucket | None = None
    ) -> None:
        """`rng` gives floats in [0, 1): breaks ties between equally rare parts.

        `cap` bounds what is asked for per second; sessions of one node share it.
        """
        self.limits = limits
        self.banned: dict[str, str] = {}
        """Peers never to be dealt with again, and why."""
        self.outstanding = 0
        """Bytes asked and unanswered over all peers."""
        self.duplicate_bytes = 0
        self.wanted_bytes = 0
        self._rng = rng
        self._cap = cap
        self._demand = Demand(rng)
        self._named: dict[CID, None] = {}
        """Parts whose blocks are to be wanted once they are known, in order."""
        self._states: dict[CID, BlockState] = {}
        self._askers: dict[CID, list[Source]] = {}
        """Who owes an answer for a block, given up or not."""
        self._charged: dict[CID, int] = {}
        self._sources: dict[str, Source] = {}
        self._stalled: set[str] = set()
        """Peers that stalled once."""
        self._out: list[e.Command] = []
        self._useful_at: float | None = None
        self._lonely_since: float | None = None
        self._busy = False
        self._over = False
        self._exhausted = False
        self._verifying = 0

    # --- what can be asked of it ------------------------------------------------------------

    @property
    def peers(self) -> tuple[str, ...]:
        """Who is joined."""
        return tuple(self._sources)

    @property
    def duplicates_allowed(self) -> int:
        """Bytes that may arrive twice."""
        return max(self.limits.duplicate_least, self.wanted_bytes // self.limits.duplicate_share)

    def missing(self) -> list[CID]:
        """Everything wanted and not verified."""
        return self._demand.missing()

    def unheld(self) -> list[CID]:
        """Parts of which somebody is needed: something is wanted of them that no joined peer holds."""
        found = []
        for group in self._demand.groups:
            if group.part is not None and group.unfinished:
                known = 0
                for source in self._sources.values():
                    known |= source.holdings.masks.get(group, 0)
                if group.unfinished & ~known:
                    found.append(group.part)
        return found

    def rate_of(self, peer: str) -> float | None:
        """Measured bytes per second of a joined peer."""
        source = self._sources.get(peer)
        return source.flow.rate if source else None

    # --- the machine ------------------------------------------------------------------------

    def step(self, event: e.Event, now: float) -> list[e.Command]:
        """Take in one event; what is to be done about it, in this order."""
        if self._over:
            return []
        _STEPS[type(event)](self, event, now)
        if not self._over:
            self._fill(now)
            if self._busy and not self._states:
                self._busy = False
                self._out.append(e.Done())
        out, self._out = self._out, []
        return out

    def _on_wants(self, event: e.WantsAdded, now: float) -> None:
        group = self._demand.add(event.part, event.blocks, event.wanted, self._rng())
        for _, block in chosen(event.blocks, event.wanted):
            if block.cid not in self._states:
                self._states[block.cid] = BlockState.WANTED
                self.wanted_bytes += block.size
        if not self._busy:
            self._useful_at, self._lonely_since = now, None
        self._busy = bool(self._states)
        if event.urgent:
            self._demand.hurry(event.part)
        if group is not None:
            self._named.pop(group.part, None) if group.part else None
            for source in list(self._sources.values()):
                self._introduce(source, group, now)
        self._weigh()

    def _on_named(self, event: e.PartsNamed, now: float) -> None:
        self._named.update((part, None) for part in event.parts if self._demand.group(part) is None)
        for source in self._sources.values():
            self._query(source, now)

    def _on_joined(self, event: e.PeerJoined, now: float) -> None:
        if event.peer in self.banned:
            self._out.append(e.DropPeer(event.peer, self.banned[event.peer], True))
            return
        if event.peer in self._sources:
            raise LocalProtocolError(f"peer {event.peer} joined twice")
        source = Source(event.peer, event.asks, event.queries, PeerFlow(now, self.limits.flow))
        source.suspect = event.peer in self._stalled
        self._sources[event.peer] = source
        for group in self._demand.groups:
            self._introduce(source, group, now)
        if self._named:
            self._query(source, now)
        self._weigh()

    def _on_left(self, event: e.PeerLeft, now: float) -> None:
        source = self._sources.get(event.peer)
        if source is not None:
            self._forget(source, now)

    def _on_broke(self, event: e.PeerBroke, now: float) -> None:
        self._drop(event.peer, event.reason, now, banned=True)

    def _on_holds(self, event: e.HoldsReceived, now: float) -> None:
        source, group = self._sources.get(event.peer), self._demand.group(event.part)
        if source is not None and group is None and event.part in self._named:
            source.told_early(event.part, event.blocks, now, self.limits.refresh)
        if source is None or group is None:
            return
        mask = group.mask_untrusted(event.blocks)
        if mask is None:
            self._drop(event.peer, f"sent a bitmap that does not fit part {event.part}", now, banned=True)
            return
        source.queries.pop(event.part, None)
        source.told_at[event.part] = now
        source.flow.progressed(now)
        if source.holdings.masks.get(group, 0) != mask:
            source.holdings.learn(group, mask)
            self._demand.recount(group)
        self._query(source, now)

    def _on_bytes(self, event: e.BytesReceived, now: float) -> None:
        source = self._sources.get(event.peer)
        if source is not None:
            source.flow.progressed(now)
            source.answered_at = now if event.held_up else source.answered_at

    def _on_block(self, event: e.BlockReceived, now: float) -> None:
        source = self._sources.get(event.peer)
        if source is None:
            return
        ask = source.asks.get(event.cid)
        if ask is None:
            raise LocalProtocolError(f"{event.peer} answered for {event.cid}, which it was not asked for")
        source.flow.answered(event.size, ask.at, now)
        source.answered_at = now
        source.suspect = False
        self._answered(source, event.cid)
        if self._states.get(event.cid) not in (BlockState.WANTED, BlockState.ASKED):
            self.duplicate_bytes += event.size
            self._settle(event.cid)
            return
        self._demand.take(event.cid)
        self._move(event.cid, "arrived")
        self._out.append(e.Verify(event.peer, event.cid))
        for other in self._askers.get(event.cid, ()):
            if not other.asks[event.cid].given_up:
                self._give_up(other, event.cid)

    def _on_missing(self, event: e.MissingReceived, now: float) -> None:
        source = self._sources.get(event.peer)
        if source is None:
            return
        source.flow.progressed(now)
        for cid in event.cids:
            ask = source.asks.get(cid)
            if ask is None:
                raise LocalProtocolError(f"{event.peer} answered for {cid}, which it was not asked for")
            self._answered(source, cid)
            self._pay_back(ask.size, now)
            if ask.cancelled:
                source.holdings.allow(self._demand.places(cid))
            else:
                source.answered_at = now
                source.holdings.deny(self._demand.places(cid))
            self._release(cid)
            self._settle(cid)
            self._recount(cid)

    def _on_verified(self, event: e.BlockVerified, now: float) -> None:
        self._move(event.cid, "verified")
        del self._states[event.cid]
        self._demand.finish(event.cid)
        self._useful_at = now

    def _on_refused(self, event: e.BlockRefused, now: float) -> None:
        self._move(event.cid, "refused")
        self._demand.release(event.cid)
        self._drop(event.peer, f"sent bytes that do not match block {event.cid}", now, banned=True)

    def _on_exhausted(self, event: e.SourcesExhausted, now: float) -> None:
        self._exhausted = True
        self._check_hope(now)

    def _on_tick(self, event: e.Tick, now: float) -> None:
        for source in list(self._sources.values()):
            self._check_source(source, now)
        for source in self._sources.values():
            self._query(source, now)
        self._fill(now)
        for source in sorted(self._sources.values(), key=lambda s: -(s.flow.rate or 0.0)):
            self._relieve(source, now)
        for source in self._sources.values():
            self._probe(source, now)
        self._check_hope(now)

    # --- asking -----------------------------------------------------------------------------

    def _fill(self, now: float) -> None:
        """Ask everybody with room, the least loaded first, those that stalled before last."""
        if not self._demand.pending or self._capped(now):
            return
        room = [s for s in self._sources.values() if self._room(s) > 0]
        for source in sorted(room, key=lambda s: (s.suspect, s.seconds_for(s.outstanding, now))):
            blocks = []
            for block in self._demand.choose(source.holdings):
                if not self._fits(source, block.size) or self._capped(now):
                    break
                self._ask(source, block, now)
                blocks.append(block)
            if blocks:
                self._out.append(e.SendWant(source.id, tuple(blocks)))

    def _room(self, source: Source) -> int:
        """Bytes the peer may be asked for now; 0 until enough is free to make it worth a message."""
        window = source.flow.window
        free = min(window - source.outstanding, self.limits.flow.ceiling - self.outstanding)
        enough = free * self.limits.batch_share >= window or not source.asks
        return free if enough and len(source.asks) < source.max_asks else 0

    def _fits(self, source: Source, size: int) -> bool:
        if self.outstanding + size > self.limits.flow.ceiling or len(source.asks) >= source.max_asks:
            return False
        return source.outstanding + size <= source.flow.window

    def _capped(self, now: float) -> bool:
        """Whether the cap lets nothing be asked now."""
        return self._cap is not None and self._cap.wait(now) > 0

    def _pay_back(self, size: int, now: float) -> None:
        """What was asked will not come."""
        if self._cap is not None:
            self._cap.give_back(size, now)

    def _ask(self, source: Source, block: Wanted, now: float) -> None:
        cid, size = block.cid, block.size
        idle = not source.asks
        source.flow.asked(now, idle=idle)
        if idle:
            source.answered_at = now
        source.asks[cid] = Ask(size, now)
        if self._cap is not None:
            self._cap.take(size, now)
        source.outstanding += size
        self.outstanding += size
        self._askers.setdefault(cid, []).append(source)
        self._demand.take(cid)
        self._move(cid, "asked")

    def _answered(self, source: Source, cid: CID) -> None:
        """The peer no longer owes an answer for the block."""
        ask = source.asks.pop(cid)
        source.outstanding -= ask.size
        self.outstanding -= ask.size
        askers = self._askers[cid]
        askers.remove(source)
        if not askers:
            del self._askers[cid]

    def _release(self, cid: CID) -> None:
        """Want the block from anybody again, unless somebody is still asked for it."""
        live = any(not source.asks[cid].given_up for source in self._askers.get(cid, ()))
        if not live and self._states.get(cid) is BlockState.ASKED:
            self._move(cid, "released")
            self._demand.release(cid)

    def _give_up(self, source: Source, cid: CID) -> None:
        """Cancel an ask. It counts until it is answered; the block is not asked of this peer till then."""
        source.asks[cid].given_up = True
        self._cancel(source, cid)

    def _cancel(self, source: Source, cid: CID) -> None:
        ask = source.asks[cid]
        if not ask.cancelled:
            ask.cancelled = True
            source.holdings.deny(self._demand.places(cid))
            self._out.append(e.SendCancel(source.id, (cid,)))

    def _relieve(self, source: Source, now: float) -> None:
        """End-game: let a peer with nothing to do take over asks that others would need longer for."""
        if source.suspect or source.outstanding * 2 > source.flow.window or self._room(source) <= 0:
            return
        taken = []
        for block, other in late_asks(source, self._sources.values(), self._demand, now):
            charge = self.duplicate_bytes + sum(self._charged.values()) + block.size
            if charge > self.duplicates_allowed or not self._fits(source, block.size) or self._capped(now):
                break
            self._charged[block.cid] = block.size
            self._give_up(other, block.cid)
            self._ask(source, block, now)
            taken.append(block)
        if taken:
            self._out.append(e.SendWant(source.id, tuple(taken)))

    # --- knowing who holds what -------------------------------------------------------------

    def _introduce(self, source: Source, group: Group, now: float) -> None:
        if group.part is None:
            source.holdings.learn(group, group.all)
        elif group.part in source.early:
            self._on_holds(e.HoldsReceived(source.id, group.part, source.early.pop(group.part)), now)
        else:
            self._query(source, now)

    def _query(self, source: Source, now: float) -> None:
        """Ask what the peer holds of parts not asked about yet, and what else it holds by now."""
        parts = source.due(self._demand.groups, now, self.limits.refresh) + source.named(self._named, now)
        if parts:
            self._out.append(e.AskHave(source.id, parts))

    def _recount(self, cid: CID) -> None:
        for group, _ in self._demand.places(cid):
            self._demand.recount(group)

    def _weigh(self) -> None:
        self._demand.weigh(source.holdings for source in self._sources.values())

    # --- giving up --------------------------------------------------------------------------

    def _check_source(self, source: Source, now: float) -> None:
        """Drop a peer that owes something and has been silent, or has trickled, for too long."""
        flow = source.flow
        if source.asks:
            silence = now - flow.alive_at
            if silence > flow.silence_allowed:
                self._drop(source.id, f"stalled: no byte for {silence:.1f} s", now, banned=False)
            elif now - source.answered_at > self.limits.flow.answer_most and replaceable(
                source, self._sources.values(), self._demand
            ):
                waited = now - source.answered_at
                self._drop(source.id, f"too slow: one block took over {waited:.0f} s", now, banned=False)
            return
        since = source.silent_since
        if since is not None and now - max(since, flow.alive_at) > self.limits.flow.silence_most:
            self._drop(source.id, "stalled: does not say what it holds", now, banned=False)

    def _probe(self, source: Source, now: float) -> None:
        """Take back the last ask of a peer that sent nothing for a while: it answers at once, however many
        others it serves before us, unless it stalled. What to ask instead is then chosen again."""
        silent = source.asks and now - source.flow.alive_at >= self.limits.probe
        if silent and not any(ask.cancelled for ask in source.asks.values()):
            self._cancel(source, next(reversed(source.asks)))

    def _drop(self, peer: str, reason: str, now: float, *, banned: bool) -> None:
        if banned:
            self.banned.setdefault(peer, reason)
        self._stalled.add(peer)
        source = self._sources.get(peer)
        if source is not None:
            self._forget(source, now)
            self._out.append(e.DropPeer(peer, reason, banned))

    def _forget(self, source: Source, now: float) -> None:
        del self._sources[source.id]
        for cid, ask in list(source.asks.items()):
            self._answered(source, cid)
            self._pay_back(ask.size, now)
            self._release(cid)
            self._settle(cid)
        self._weigh()

    def _check_hope(self, now: float) -> None:
        """Fail when nothing useful came for too long, or can come."""
        if not self._states or self._useful_at is None:
            return
        if self._verifying:
            return
        if not self.outstanding and self._capped(now):
            self._useful_at = now
        served = any(
            group.unfinished & source.holdings.masks.get(group, 0)
            or source.asks
            or source.silent_since is not None
            for source in self._sources.values()
            for group in self._demand.groups
        )
        self._lonely_since = None if served else now if self._lonely_since is None else self._lonely_since
        if self._lonely_since is not None:
            alone = now - self._lonely_since
            if alone > self.limits.provider_timeout or (self._exhausted and not self._sources):
                self._fail(e.Failed("no-providers", tuple(self.missing())))
        elif now - self._useful_at > self.limits.stall_timeout:
            self._fail(e.Failed("timed-out", tuple(self.missing())))

    def _fail(self, command: e.Failed) -> None:
        self._over = True
        self._out.append(command)

    # --- bookkeeping ------------------------------------------------------------------------

    def _move(self, cid: CID, verb: str) -> None:
        state = self._states.get(cid, BlockState.DONE)
        after = TRANSITIONS.get((state, verb))
        if after is None:
            raise LocalProtocolError(f"block {cid} was {verb} while {state.value}")
        self._states[cid] = after
        self._verifying += (after is BlockState.VERIFYING) - (state is BlockState.VERIFYING)

    def _settle(self, cid: CID) -> None:
        """The charge for a second ask ends when nobody owes an answer any more."""
        if cid in self._charged and cid not in self._askers:
            del self._charged[cid]


_STEPS: Final[Mapping[type, Callable[[Session, Any, float], None]]] = {
    e.WantsAdded: Session._on_wants,
    e.PartsNamed: Session._on_named,
    e.PeerJoined: Session._on_joined,
    e.PeerLeft: Session._on_left,
    e.PeerBroke: Session._on_broke,
    e.HoldsReceived: Session._on_holds,
    e.BytesReceived: Session._on_bytes,
    e.BlockReceived: Session._on_block,
    e.MissingReceived: Session._on_missing,
    e.BlockVerified: Session._on_verified,
    e.BlockRefused: Session._on_refused,
    e.SourcesExhausted: Session._on_exhausted,
    e.Tick: Session._on_tick,
}
