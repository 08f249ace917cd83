"""What happens to versions: checked, warmed, switched to, superseded, rolled back, deleted, kept as history.

Part of the machine (`state.Machine`), which calls it; its table is there. Invariants: an app serves one version, and
switches only when the store has committed that; a deployment ends exactly once, with `DeployEnded`; one that fails
leaves what serves as it was.
"""

from __future__ import annotations

from typing import cast

from sllm_faas.controller import events as ev
from sllm_faas.controller import tables
from sllm_faas.controller.commands import (
    Advance,
    DeployEnded,
    ForgetVersions,
    PublishFunctions,
    SendCheck,
    SendUncheck,
    StoreActivation,
    StoreFailure,
)
from sllm_faas.controller.ledger import Ledger, resolve
from sllm_faas.controller.model import App, Version, VersionState, key_of
from sllm_faas.errors import Conflict, ErrorInfo, IllegalTransition, Unavailable, to_info
from sllm_faas.spec import AppSpec, Target
from sllm_faas.wire.messages import Check, FunctionRoute, Uncheck

CHECK_WAIT = 30.0
"""Seconds a check waits for a node to run on."""
CHECK_LIMIT = 3600.0
"""Seconds of a check: it may ingest a checkpoint of many gigabytes."""
UNDER_WAY = ("checking", "warming")
HISTORY = 20
"""Versions kept per app."""


class Deployments:
    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.state = ledger.state
        self._under_way = {
            (app.name, version.number) for app, version in ledger.versions() if version.state in UNDER_WAY
        }
        """Versions that were checked or warmed when they were last looked at: nearly always none."""

    # -- registered and checked ------------------------------------------------------------------------------

    def add(self, event: ev.VersionAdded) -> None:
        """A version was registered: have it checked."""
        app = self.state.apps.get(event.app)
        known = app.versions.get(event.number) if app else None
        name = f"version {event.app}@{event.number}"
        state = cast(VersionState, tables.move(tables.VERSION, name, known.state if known else "absent", "added"))
        if app is None:
            app = self.state.apps[event.app] = App(event.app)
        before = self._supersede(app, f"version {event.number}")
        version = Version(
            event.app, event.number, event.spec, state, event.created, deadline=self.ledger.now + CHECK_WAIT
        )
        app.versions[event.number] = version
        app.pending = event.number
        self._assign_check(version)
        self._end_check(before)  # last: what it is bringing may be what this one needs

    def _assign_check(self, version: Version) -> None:
        """Hand the check to the node with the fewest instances; it waits when there is none."""
        self._under_way.add((version.app, version.number))
        nodes = self.ledger.open_nodes() or [node for node in self.state.nodes.values() if node.state == "up"]
        if not nodes:
            version.check_node = ""
            version.deadline = self.ledger.now + CHECK_WAIT
            self.ledger.emit(Advance(version.app, version.number, "wait", "no node is up; waiting for one"))
        else:
            node = min(nodes, key=lambda node: (len(self.ledger.on_node(node.name)), node.name))
            version.check_node = node.name
            version.deadline = self.ledger.now + CHECK_LIMIT
            self.ledger.emit(SendCheck(node.name, Check(version.spec, version.number)))
            self.ledger.emit(Advance(version.app, version.number, "check", f"import check on {node.name}"))
        self.ledger.wake(version.deadline, f"check|{version.app}|{version.number}")

    def reassign_checks(self, node: str | None) -> None:
        """`node` is gone, or None: one has come, for the checks that wait."""
        for app, number in sorted(self._under_way):
            version = self.ledger.version(app, number)
            if version is None:
                self._under_way.discard((app, number))
            elif version.state == "checking" and version.check_node == (node or ""):
                self._assign_check(version)

    def give_up(self, version: Version) -> None:
        """Its check is past its deadline."""
        if version.check_node:
            text = f"the import check on {version.check_node} did not end within {CHECK_LIMIT:g} s"
            self._end_check(_check_of(version))
        else:
            text = f"no node joined within {CHECK_WAIT:g} s to run the import check"
        self._fail(version, "failed", to_info(Unavailable(text, hint="See `sllm node list`.")))

    def take_check(self, event: ev.VersionChecked) -> None:
        """A node has checked it."""
        result = event.result
        version = self.ledger.version(result.app, result.version)
        if version is None or version.state != "checking" or version.check_node != event.node:
            return  # a late answer: another node was asked since, or nobody wants it any more
        if result.error is not None:
            self._fail(version, "failed", result.error)
            return
        version.digests = dict(result.checkpoints)
        self.ledger.forget_specs()
        for digest, size in result.sizes.items():
            self.ledger.note_size(digest, size)
        for digest in result.checkpoints.values():
            self.ledger.where.note_checkpoint(self.state.nodes[event.node], digest)
        app = self.state.apps[version.app]
        active = app.versions.get(app.active)
        if active is not None and active.spec == version.spec and active.digests == version.digests:
            self._move_version(version, "unchanged")
            del app.versions[version.number]
            self.ledger.forget_specs()
            app.pending = 0
            self.ledger.emit(ForgetVersions(app.name, (version.number,)))
            self.ledger.emit(DeployEnded(app.name, version.number, active.number))
            return
        self._move_version(version, "passed")
        version.check_node = ""
        self.keep_minimum(version)
        self._switch_when_warm(version)
        if not version.storing:
            self.ledger.emit(Advance(version.app, version.number, "start", "starting its first instances"))

    def keep_minimum(self, version: Version) -> None:
        """Look after the functions that are to have instances without being called."""
        for target in _kept(version):
            self.ledger.touch(target)

    def activate(self, app_name: str, number: int) -> None:
        """The store has made it the serving version: the end of its deployment, or a rollback."""
        version = self.ledger.version(app_name, number)
        name = f"version {app_name}@{number}"
        state = tables.move(tables.VERSION, name, version.state if version else "absent", "activated")
        assert version is not None
        app = self.state.apps[app_name]
        deployed = version.state == "warming"
        if not deployed:
            self._end_check(self._supersede(app, f"a rollback to version {number}"))
        version.state, version.storing, version.error = cast(VersionState, state), False, None
        before = app.versions.get(app.active)
        app.active = number
        if app.pending == number:
            app.pending = 0
        gone = {spec.name for spec in before.spec.functions} if before else set()
        gone -= {spec.name for spec in version.spec.functions}
        self.ledger.emit(PublishFunctions(app.name, self.routes(app), tuple(sorted(gone))))
        self._touch_app(app.name)
        self.keep_minimum(version)
        if deployed:
            self.ledger.emit(DeployEnded(app.name, number, number))
        self._trim_history(app)

    def refuse(self, app: str, number: int, error: ErrorInfo) -> None:
        """The store would not make the switch."""
        version = self.ledger.version(app, number)
        if version is not None and version.storing:
            self._fail(version, "failed", error)

    def _supersede(self, app: App, by: str) -> SendUncheck | None:
        """Returns what tells the node that checks it, if one does."""
        version = app.versions.get(app.pending)
        app.pending = 0
        # One whose switch is with the store already is past recall: it will serve for a moment.
        if version is not None and not version.storing:
            error = Conflict(f"version {version.number} of {app.name} was superseded by {by} before it was ready")
            check = _check_of(version)
            self._fail(version, "superseded", to_info(error))
            return check
        return None

    def _end_check(self, check: SendUncheck | None) -> None:
        """Nobody waits for it any more: it may be bringing many gigabytes."""
        if check is not None:
            self.ledger.emit(check)

    def _fail(self, version: Version, event: str, error: ErrorInfo) -> None:
        """End a deployment; what serves goes on serving."""
        self._move_version(version, event)
        version.error, version.check_node, version.storing = error, "", False
        app = self.state.apps[version.app]
        if app.pending == version.number:
            app.pending = 0
        self._touch_app(app.name)
        self.ledger.emit(StoreFailure(app.name, version.number, error))
        self.ledger.emit(DeployEnded(app.name, version.number, app.active, error))

    def _move_version(self, version: Version, event: str) -> None:
        name = f"version {version.app}@{version.number}"
        version.state = cast(VersionState, tables.move(tables.VERSION, name, version.state, event))
        if version.state not in UNDER_WAY:
            self._under_way.discard((version.app, version.number))

    def _trim_history(self, app: App) -> None:
        used = {i.target.version for i in self.state.instances.values() if i.target.app == app.name}
        old = sorted(set(app.versions) - {app.active, app.pending} - used)
        forget = old[: max(0, len(app.versions) - HISTORY)]
        for number in forget:
            del app.versions[number]
        if forget:
            self.ledger.forget_specs()
            self.ledger.emit(ForgetVersions(app.name, tuple(forget)))

    def delete(self, name: str) -> None:
        """Nothing of the app is to serve any more. Raises IllegalTransition."""
        app = self.state.apps.get(name)
        if app is None:
            raise IllegalTransition(f"app {name} is absent: event 'AppDeleted' is not possible")
        self._end_check(self._supersede(app, "the deletion of the app"))
        for version in app.versions.values():
            if version.storing:
                error = Conflict(f"{name} was deleted while version {version.number} was being deployed")
                self.ledger.emit(DeployEnded(name, version.number, 0, to_info(error)))
        active = app.versions.get(app.active)
        del self.state.apps[name]
        self.ledger.forget_specs()
        if active is not None:
            self.ledger.emit(PublishFunctions(app.name, (), tuple(sorted(spec.name for spec in active.spec.functions))))
        self._touch_app(app.name)

    def _touch_app(self, app: str) -> None:
        self.ledger.dirty.update(key for key, record in self.state.targets.items() if record.target.app == app)

    def routes(self, app: App) -> tuple[FunctionRoute, ...]:
        """What gateways are told of the app: its active version's functions."""
        version = app.versions.get(app.active)
        if version is None:
            return ()
        routes, (cap, more) = [], self.cap(version.spec)
        for function in version.spec.functions:
            spec = resolve(version, function.name)
            assert spec is not None
            weight = version.spec.weight
            routes.append(FunctionRoute(app.name, version.number, spec, weight, version.created, cap, more))
        return tuple(routes)

    def cap(self, spec: AppSpec) -> tuple[int, tuple[str, ...]]:
        """Each gateway's part of the app's cap, and the gateways, first by name, that have one more, so that the parts
        are the whole. One at least: with more gateways than the cap, as many may run as there are gateways."""
        names = sorted(self.state.gateways)
        if not spec.max_concurrency:
            return 0, ()
        part, rest = divmod(spec.max_concurrency, max(1, len(names)))
        return (part, tuple(names[:rest])) if part else (1, ())

    def share_out(self) -> None:
        """There are more gateways, or fewer: tell all what their parts of the caps are now."""
        for app in self.ledger.state.apps.values():
            if app.active and app.versions[app.active].spec.max_concurrency:
                self.ledger.emit(PublishFunctions(app.name, self.routes(app), ()))

    # -- deployments that wait for their first instances -----------------------------------------------------

    def start_failed(self, target: Target, error: ErrorInfo) -> None:
        """An instance of the target did not start: if its version was to be deployed, it is not."""
        version = self.ledger.version(target.app, target.version)
        if version is not None and version.state == "warming" and not version.storing:
            self._fail(version, "failed", error)

    def check_warm(self, key: str) -> None:
        """Called after a target was reconciled: it may have been the last its version waited for."""
        record = self.state.targets.get(key) if self._under_way else None
        if record is not None:
            version = self.ledger.version(record.target.app, record.target.version)
            if version is not None and version.state == "warming":
                self._switch_when_warm(version)

    def _switch_when_warm(self, version: Version) -> None:
        """Ask for the switch once every function with `min_containers` has an instance that is ready."""
        if version.state != "warming" or version.storing:
            return
        for target in _kept(version):
            record = self.state.targets.get(key_of(target))
            if record is not None and record.error is not None and record.error.code == "no_capacity":
                self._fail(version, "failed", record.error)
                return
            if not any(instance.state == "ready" for instance in self.ledger.live(key_of(target))):
                return
        version.storing = True
        sizes = {digest: self.state.sizes.get(digest, 0) for digest in version.digests.values()}
        self.ledger.emit(Advance(version.app, version.number, "switch", "switching to it"))
        self.ledger.emit(StoreActivation(version.app, version.number, dict(version.digests), sizes))


def _check_of(version: Version) -> SendUncheck | None:
    """What ends its check; None: no node runs one."""
    return SendUncheck(version.check_node, Uncheck(version.app, version.number)) if version.check_node else None


def _kept(version: Version) -> list[Target]:
    """What is to have instances without being called. Parameters without a default cannot be guessed."""
    return [
        Target(version.app, spec.name, version.number)
        for spec in version.spec.functions
        if spec.scaling.min_containers and not any(parameter.required for parameter in spec.parameters)
    ]
