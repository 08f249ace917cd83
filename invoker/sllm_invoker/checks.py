"""Import checks: does a version's code import, are its functions there, are its checkpoints here?

The check runs in a container of its own that serves nothing and is thrown away. Single flight per version.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from dataclasses import replace

from sllm_faas import logging
from sllm_faas.errors import ErrorInfo, SllmError, StartFailed, to_info
from sllm_faas.spec import Target
from sllm_faas.wire.messages import Check, Checked, Progress, Uncheck
from sllm_invoker import secrets
from sllm_invoker.container import Container, NotReady, Place, code_of
from sllm_invoker.containers.base import ContainerSpec
from sllm_invoker.relay import Relay
from sllm_invoker.runner.config import InstanceConfig, dumps

LIMIT = 300.0
"""Seconds an import may take."""


class Checks:
    def __init__(
        self,
        place: Place,
        relay: Relay,
        done: Callable[[Checked], None],
        progress: Callable[[Progress], None],
        *,
        prefetch: bool = True,
    ) -> None:
        """`prefetch`: have the checkpoints of a version that passed in memory, where there is room."""
        self._place = place
        self._prefetch = prefetch
        self._relay = relay
        self._done = done
        self._progress = progress
        self._running: dict[str, asyncio.Task[None]] = {}
        self._ending: set[asyncio.Task[None]] = set()
        """Those that nobody waits for any more: they may take a moment."""
        self._containers: dict[bytes, Container] = {}
        self._count = 0

    def container(self, peer: bytes) -> Container | None:
        return self._containers.get(peer)

    def bundles(self) -> set[str]:
        return {key.partition(" ")[2] for key in self._running}

    def check(self, check: Check) -> None:
        """Asked again for one that runs: there will be one answer."""
        key = f"{check.app.name}@{check.version} {check.app.bundle}"
        if key not in self._running:
            task = asyncio.get_running_loop().create_task(self._run(check))
            self._running[key] = task
            task.add_done_callback(lambda task: self._over(key, task))

    def end(self, uncheck: Uncheck) -> None:
        """Nobody waits for that version's check any more: there will be no answer, and what it does ends. Asked for
        again from now on, it is another."""
        for key, task in list(self._running.items()):
            if key.partition(" ")[0] == f"{uncheck.app}@{uncheck.version}":
                del self._running[key]
                self._ending.add(task)
                task.cancel()

    def _over(self, key: str, task: asyncio.Task[None]) -> None:
        self._ending.discard(task)
        if self._running.get(key) is task:
            del self._running[key]

    async def _run(self, check: Check) -> None:
        digests: dict[str, str] = {}
        sizes: dict[str, int] = {}
        error: ErrorInfo | None = None
        leases = contextlib.ExitStack()
        try:
            await self._checkpoints(check, digests, sizes, leases)
            if code_of(check.app.functions):
                await self._import(check)
            self._promote(check, digests)
        except NotReady as failed:
            error = failed.error
        except SllmError as failure:
            error = to_info(failure)
        except asyncio.CancelledError:
            raise
        except Exception as failure:
            logging.get("invoker").exception("check_failed", app=check.app.name, version=check.version)
            error = to_info(failure)
        finally:
            leases.close()
        self._done(Checked(check.app.name, check.version, error, digests, sizes))

    async def _checkpoints(
        self, check: Check, digests: dict[str, str], sizes: dict[str, int], leases: contextlib.ExitStack
    ) -> None:
        """What it brings stays on the disk until `leases` is closed: none of them leaves for the next."""
        request = f"{check.app.name}@{check.version}"
        for spec in check.app.functions:
            if spec.checkpoint is not None:
                runtime = self._place.runtime
                # A deployment announces a first start: importing its libraries goes on beside bringing its weights …
                libs = asyncio.ensure_future(runtime.prepare(spec, "")) if spec.kind == "llm" else None
                try:
                    for key, checkpoint in spec.checkpoints().items():
                        found, size = await self._place.ingests.bring(
                            checkpoint,
                            "",
                            lambda *step: self._progress(Progress(request, *step)),
                            base=digests.get(spec.name, ""),
                            forward=self._prefetch,
                        )
                        leases.callback(self._place.ingests.store.use(found).close)
                        digests[key], sizes[found] = found, size
                        self._place.tier.expect(size)
                    if libs is not None:
                        # … and a model whose skeleton cannot be made is not one that can be served.
                        self._progress(Progress(request, "prepare"))
                        await libs
                        directory = self._place.ingests.store.path(digests[spec.name])
                        await runtime.prepare(spec.resolved(digests), str(directory))
                finally:
                    if libs is not None:
                        libs.cancel()
                        await asyncio.gather(libs, return_exceptions=True)

    def _promote(self, check: Check, digests: dict[str, str]) -> None:
        """A deployment announces a first start: its checkpoints are read ahead of it, where that costs nobody."""
        if self._prefetch:
            for digest in {digests[spec.name] for spec in check.app.functions if spec.checkpoint is not None}:
                self._read_ahead(digest)

    def _read_ahead(self, digest: str) -> None:
        """It stays on the disk until it has been read, or will not be."""
        store = self._place.ingests.store
        lease = store.use(digest)
        self._place.tier.promote(digest, store.path(digest)).loaded.add_done_callback(lambda _: lease.close())

    async def _import(self, check: Check) -> None:
        place, specs = self._place, code_of(check.app.functions)
        self._progress(Progress(f"{check.app.name}@{check.version}", "import"))
        self._count += 1
        name = f"check-{check.app.name}-{check.version}-{self._count}"
        target = Target(check.app.name, specs[0].name, check.version)
        container = self._containers[name.encode()] = Container(place, name, target)
        try:
            source = await place.bundles.get(check.app.bundle)
            names = {secret for spec in specs for secret in spec.secrets}
            config = InstanceConfig(
                name,
                target,
                specs,
                mode="check",
                source_dir=str(source),
                env=secrets.resolve(sorted(names), place.secrets_dir, os.environ),
                node=place.node,
                scratch=str(container.scratch),
            )
            libs = tuple(sorted({lib for spec in specs for lib in spec.libs}))
            layers = replace(specs[0], libs=libs, checkpoint=None)
            async with asyncio.timeout(LIMIT):
                with self._relay.link(name.encode()) as link:
                    await container.start(ContainerSpec(name, dumps(config), layers, link=link.fileno()))
                await asyncio.shield(container.ready)
        except TimeoutError:
            raise StartFailed(f"the import of app {check.app.name!r} did not end within {LIMIT:g} s.") from None
        finally:
            await container.stop()
            self._relay.unlink(name.encode())
            del self._containers[name.encode()]

    def close(self) -> None:
        for task in self._running.values():
            task.cancel()
