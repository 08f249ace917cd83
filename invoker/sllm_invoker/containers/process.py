"""The process runtime: instances forked from warm zygotes.

    start(spec) ─► layers(spec) ─► zygote of each layer (made once, by whoever needs it first) ─► fork ─► handle
                └► a GPU, where one is asked for, and the worker that waits on it (`gpu_workers`), which becomes it

It owns the zygotes' control sockets and watches every process by its pidfd. Invariant: `Exited` is told once per
instance, after everything below it is dead and its output was read to the end. A zygote's death touches no
instance; it is made again when it is needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from sllm_faas import layers, logging
from sllm_faas.errors import ErrorInfo, SllmError, from_info
from sllm_faas.layers import Layer
from sllm_faas.spec import FunctionSpec, Warmth
from sllm_invoker.containers import gpu_worker, tree, zygote
from sllm_invoker.containers.base import ContainerSpec, Exited, ForkFailed, Made, OnEvent, Output, Stats
from sllm_invoker.containers.cgroup import Cgroups
from sllm_invoker.containers.gpu_workers import GpuWorkers, Taken
from sllm_invoker.containers.gpus import Probe
from sllm_invoker.containers.keepalive import Cost
from sllm_invoker.containers.nvml import NoGpus
from sllm_invoker.containers.pool import Pool
from sllm_invoker.containers.zygote_link import ZygoteDied, ZygoteLink

READ = 64 * 1024
TRIES = 4
AHEAD_MB = 1024
"""The memory limit of a process that was forked ahead, until it is an instance."""
STATUS_WAIT = 0.5
"""Seconds a dead instance's zygote has to tell the exit status."""
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Threads that spin while they wait starve each other as soon as two instances share the cores.
    "OMP_WAIT_POLICY": "PASSIVE",
}
"""Environment of zygotes: a process with threads cannot be forked safely."""

PRIVATE = ("SLLM_SECRET_", "SLLM_JOIN")
"""Beginnings of the environment variables that no function may inherit."""


Reached = Awaitable[tuple[ZygoteLink, tuple[Made, ...]]]


class ProcessHandle:
    """One instance. See `base.Handle`."""

    def __init__(self, runtime: ProcessRuntime, spec: ContainerSpec, warmth: Warmth, on_event: OnEvent) -> None:
        self._runtime = runtime
        self.spec = spec
        self.warmth: Warmth = warmth
        self.made: tuple[Made, ...] = ()
        self.pid = 0
        self.exited: Exited | None = None
        self.status: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.gpu = ""
        """The device it holds."""
        self.group = ""
        """The name of its control group."""
        self._pidfd = -1
        self._on_event = on_event
        self._pipes: dict[int, Literal["stdout", "stderr"]] = {}
        self._watch: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<instance {self.spec.name} pid {self.pid} {self.exited or 'alive'}>"

    def attach(self, pid: int, pidfd: int, out: int, err: int) -> None:
        self.pid, self._pidfd = pid, pidfd
        loop = asyncio.get_running_loop()
        self._pipes = {out: "stdout", err: "stderr"}
        for fd in self._pipes:
            loop.add_reader(fd, self._read, fd)
        self._watch = loop.create_task(self._watching())

    def _read(self, fd: int) -> bool:
        try:
            data = os.read(fd, READ)
        except BlockingIOError:
            return False
        if not data:
            self._close_pipe(fd)
            return False
        self._on_event(Output(self._pipes[fd], data))
        return True

    def _close_pipe(self, fd: int) -> None:
        if self._pipes.pop(fd, None) is not None:
            asyncio.get_running_loop().remove_reader(fd)
            os.close(fd)

    async def _watching(self) -> None:
        await tree.gone(self._pidfd)
        status = await self._runtime.ended(self)
        os.close(self._pidfd)
        self._pidfd = -1
        for fd in list(self._pipes):
            while fd in self._pipes and self._read(fd):
                pass
            self._close_pipe(fd)
        self.exited = Exited(status)
        self._on_event(self.exited)

    def signal(self, number: int) -> None:
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    async def stop(self, grace: float) -> Exited:
        assert self._watch is not None
        if grace > 0:
            self.signal(signal.SIGTERM)
            await asyncio.wait([self._watch], timeout=grace)
        self.signal(signal.SIGKILL)
        await asyncio.shield(self._watch)
        assert self.exited is not None
        return self.exited

    def stats(self) -> Stats | None:
        if self.exited is not None:
            return None
        pids = [self.pid, *tree.descendants(self.pid)]
        page, tick = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")
        memory, cpu = 0, 0.0
        for pid in pids:
            with contextlib.suppress(OSError):
                resident, shared = map(int, Path(f"/proc/{pid}/statm").read_text().split()[1:3])
                memory += (resident - shared) * page
                fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
                cpu += (int(fields[11]) + int(fields[12])) / tick
        return Stats(memory / 2**20, cpu, len(pids))


class ProcessRuntime:
    """See `base.Runtime`. `entry` is what an instance runs, `warm` what a worker of a GPU does before it waits; tests
    put their own there."""

    def __init__(
        self,
        node: str,
        processes: tree.Tree,
        *,
        env: Mapping[str, str] | None = None,
        entry: str = zygote.ENTRY,
        policy: Pool | None = None,
        probe: Probe | None = None,
        warm: str = gpu_worker.WARM,
    ) -> None:
        self._tree = processes
        self._entry = entry
        given = os.environ if env is None else env
        kept = {name: value for name, value in given.items() if not name.startswith(PRIVATE)}
        # Who asked for no GPU sees none; besides, what is forked must not have touched one.
        self._env = {**kept, **ONE_THREAD, tree.MARK: processes.mark, "CUDA_VISIBLE_DEVICES": ""}
        self._log = logging.get("invoker").bind(node=node)
        self._loop = asyncio.get_running_loop()
        self._lifeline_r, self._lifeline_w = os.pipe2(os.O_CLOEXEC)
        self.pool = policy or Pool()
        self._warm = warm
        self.gpus = GpuWorkers(probe or NoGpus(), self._make_worker, self._worker_gone)
        self._zygotes: dict[str, ZygoteLink] = {}
        self._making: dict[str, asyncio.Task[ZygoteLink]] = {}
        self._recipes: dict[str, tuple[Sequence[Layer], ContainerSpec | None]] = {}
        """By layer that exists or is to be made again: its path, and what it is made of."""
        self._handles: dict[int, ProcessHandle] = {}
        self._cgroups = Cgroups(node)
        self._cgroups.clean()
        self._groups: dict[int, str] = {}
        """By process that was forked ahead and is no instance yet."""
        self._said_short: dict[str, float] = {}
        """By kind of layer whose budget is too small, "" for the whole: the MiB that were said to be needed."""
        self._closed = False
        self._sweeper: asyncio.Task[int] | None = None
        self._refilling: set[asyncio.Task[None]] = set()

    # -- instances -------------------------------------------------------------------------------------------

    async def start(self, spec: ContainerSpec, on_event: OnEvent) -> ProcessHandle:
        if spec.spec is not None and spec.spec.gpus:
            return await self._start_on_gpu(spec, on_event)
        path = _path(spec.spec, spec.object_dir)
        return await self._forked(spec, on_event, path, lambda: self._zygote(path, spec))

    async def run(self, spec: ContainerSpec, on_event: OnEvent) -> ProcessHandle:
        path = _path(spec.spec, spec.object_dir)
        return await self._forked(spec, on_event, path, lambda: self._reach(self._living(path), spec))

    async def _forked(
        self, spec: ContainerSpec, on_event: OnEvent, path: Sequence[Layer], parent_of: Callable[[], Reached]
    ) -> ProcessHandle:
        warmest = self.pool.warmest(path)
        handle = ProcessHandle(self, spec, warmest.warmth if warmest else "cold", on_event)
        last: ZygoteDied | None = None
        for _ in range(TRIES):
            try:
                parent, handle.made = await parent_of()
                return await self._fork(handle, parent)
            except ZygoteDied as died:
                last = died
        assert last is not None
        raise ForkFailed(f"{last.message}, {TRIES} times", hint="The invoker's log shows why.")

    async def _start_on_gpu(self, spec: ContainerSpec, on_event: OnEvent) -> ProcessHandle:
        handle = ProcessHandle(self, spec, "libs" if self.gpus.ready else "cold", on_event)
        code = spec.spec is None or spec.spec.kind != "llm"
        taken = await self.gpus.take("" if code else Path(spec.object_dir).name)
        handle.gpu, handle.made = taken.uuid, taken.made
        try:
            return await self._fork(handle, taken.worker, taken.kept)
        except BaseException:
            await self._drop(taken)
            raise
        finally:
            if taken.kept >= 0:
                os.close(taken.kept)

    async def _drop(self, taken: Taken) -> None:
        """A worker that was taken and did not become an instance."""
        taken.worker.close()
        tree.kill(taken.worker.pid)
        self._worker_gone(taken.worker)
        await self._tree.sweep()
        await self.gpus.give_back(taken.uuid)

    async def _fork(self, handle: ProcessHandle, parent: ZygoteLink, kept: int = -1) -> ProcessHandle:
        spec = handle.spec
        ahead, groups = parent.claim(), list[str]()
        handle.group = self._groups.pop(ahead, spec.name)
        if ahead:
            self._cgroups.limit(handle.group, spec.memory_limit_mb)
        else:
            groups = self._cgroups.make(handle.group, spec.memory_limit_mb)
        config = _memfd(spec.config)
        out_r, out_w = os.pipe2(os.O_CLOEXEC)
        err_r, err_w = os.pipe2(os.O_CLOEXEC)
        try:
            ends = {"link": spec.link, "weights": spec.weights, "kept": kept}
            given = {name: fd for name, fd in ends.items() if fd >= 0}
            message = {"op": "instance", "entry": spec.entry or self._entry, "cgroups": groups, "fds": list(given)}
            fds = [config, out_w, err_w, *given.values()]
            pid, pidfd = await parent.request(message, fds)
            if ahead not in (0, pid):
                tree.kill(pid)
                os.close(pidfd)
                raise ZygoteDied(f"the process that {parent.layer.key} had forked ahead died")
        except BaseException:
            os.close(out_r)
            os.close(err_r)
            if ahead:
                self._groups[ahead] = handle.group  # removed when that process is gone
            else:
                self._cgroups.remove(handle.group)
            raise
        finally:
            for fd in (config, out_w, err_w):
                os.close(fd)
        for fd in (out_r, err_r):
            os.set_blocking(fd, False)
        self.pool.served(parent.layer.key)
        self._tree.add(pid)
        self._handles[pid] = handle
        handle.attach(pid, pidfd, out_r, err_r)
        return handle

    async def ended(self, handle: ProcessHandle) -> int | None:
        """An instance's process is dead: what is its status? Kills what it left; called by the handle alone."""
        pid = handle.pid
        status: int | None = None
        try:
            status = tree.wait(pid)  # its zygote may have died before it; then it is our child
        except ChildProcessError:
            with contextlib.suppress(TimeoutError):
                status = await asyncio.wait_for(asyncio.shield(handle.status), STATUS_WAIT)
        self._handles.pop(pid, None)
        self._tree.remove(pid)
        left = await self._tree.sweep()
        if left:
            self._log.warning("processes_left_behind", instance=handle.spec.name, killed=left)
        if self._cgroups.killed_for_memory(handle.group):
            self._log.warning("memory_limit_reached", instance=handle.spec.name, limit_mb=handle.spec.memory_limit_mb)
        self._cgroups.remove(handle.group)
        if handle.gpu:
            await self.gpus.give_back(handle.gpu)
        return status

    def _child_exited(self, pid: int, status: int) -> None:
        handle = self._handles.get(pid)
        if handle is not None and not handle.status.done():
            handle.status.set_result(status)

    # -- zygotes ---------------------------------------------------------------------------------------------

    async def warm(self) -> None:
        """Make the base zygote now, so that the first instance does not wait for it."""
        await self._zygote(_path(None, ""), None)

    def on_gpu(self) -> tuple[str, ...]:
        return self.gpus.resident

    async def prepare(self, spec: FunctionSpec, object_dir: str) -> None:
        if spec.gpus:
            return  # a worker waits already
        await self._zygote(_path(spec, object_dir), ContainerSpec("", b"", spec, object_dir))

    def tidy(self) -> None:
        """End the zygotes that are not worth their memory any more, and make those again that died and are; workers of
        GPUs too."""
        self.gpus.tidy()
        for pid in [pid for pid in self._groups if not tree.alive(pid)]:
            self._cgroups.remove(self._groups.pop(pid))
            self._tree.remove(pid)
        now = self._loop.time()
        for key in self.pool.surplus(now):
            self._warn_if_short(key)
            self.pool.leave(key)
            self._recipes.pop(key, None)
            found = self._zygotes.pop(key, None)
            if found is not None:
                self._log.info("zygote_ended", layer=key, pid=found.pid)
                found.close()
                self._disown(found)
        missing = self.pool.missing(now)
        for key in [key for key in self._recipes if key not in self._making and not self.pool.knows(key)]:
            del self._recipes[key]
        for layer in missing:
            if layer.key not in self._making:
                task = self._loop.create_task(self._refill(*self._recipes[layer.key]))
                self._refilling.add(task)
                task.add_done_callback(self._refilling.discard)

    def _warn_if_short(self, key: str) -> None:
        """Say once which budget would hold a layer that is ended; again where that would have to be larger still."""
        short = self.pool.short(key)
        if short is None or short.needed_mb <= self._said_short.get(short.kind, 0.0):
            return
        self._said_short[short.kind] = short.needed_mb
        needed = math.ceil(short.needed_mb)
        held, setting = (
            (self.pool.budgets[short.kind], f"{short.kind}_mb") if short.kind else (self.pool.budget_mb, "layers_mb")
        )
        self._log.warning(
            "layer_not_kept", layer=key, needs_mb=needed, budget_mb=round(held), setting=setting,
            hint=f"Starts go without it. Give {setting} at least {needed} MiB for each invoker of this machine.",
        )  # fmt: skip

    async def _refill(self, path: Sequence[Layer], spec: ContainerSpec | None) -> None:
        with contextlib.suppress(SllmError):  # told to whoever needs it next
            await self._reach(path, spec)

    async def _zygote(self, path: Sequence[Layer], spec: ContainerSpec | None) -> tuple[ZygoteLink, tuple[Made, ...]]:
        """`_reach`, for an instance or a deployment, as far as layers are worth it: a use of all of `path`."""
        found = await self._reach(self.pool.wanted(path, self._loop.time(), self._making), spec)
        self.pool.use(path, self._loop.time())
        return found

    async def _reach(self, path: Sequence[Layer], spec: ContainerSpec | None) -> tuple[ZygoteLink, tuple[Made, ...]]:
        """The zygote of the last of `path`, made through those before it from the warmest one that lives."""
        parent: ZygoteLink | None = None
        waited: list[Made] = []
        for layer in path[len(self._living(path)) - 1 :]:
            found = self._zygotes.get(layer.key)
            if found is not None and found.ended.done():  # its callback is still to come
                self._zygote_ended(found)
                found = None
            if found is None:
                task, at = self._making.get(layer.key), self._loop.time()
                ours = task is None
                if task is None:
                    self._recipes[layer.key] = (path[: path.index(layer) + 1], spec and spec.bare())
                    task = self._loop.create_task(self._make(layer, parent, spec))
                    self._making[layer.key] = task
                    task.add_done_callback(functools.partial(self._made, layer.key))
                found = await asyncio.shield(task)
                waited.append(Made(layer.warmth, self._loop.time() - at, ours))
            parent = found
        assert parent is not None
        return parent, tuple(waited)

    def _living(self, path: Sequence[Layer]) -> Sequence[Layer]:
        """Up to the warmest that there is; the base in any case."""
        return path[: 1 + max((number for number, layer in enumerate(path) if self._lives(layer)), default=0)]

    def _lives(self, layer: Layer) -> bool:
        found = self._zygotes.get(layer.key)
        return found is not None and not found.ended.done()

    def _made(self, key: str, _: asyncio.Task[ZygoteLink]) -> None:
        self._making.pop(key, None)

    async def _make(self, layer: Layer, parent: ZygoteLink | None, spec: ContainerSpec | None) -> ZygoteLink:
        wait = self.pool.wait(layer.key, self._loop.time())
        if wait:
            await asyncio.sleep(wait)
        with self._link(layer) as (made, theirs):
            made.pid = await self._spawn(layer, parent, spec, theirs)
        answer = await made.ready
        if answer["op"] != "ready":
            made.close()
            self._tree.remove(made.pid)
            if answer["op"] == "error":
                raise from_info(msgspec.convert(answer["info"], ErrorInfo))
            self.pool.died(layer.key, self._loop.time())
            raise ZygoteDied(f"zygote {layer.key} died while it was made")
        if answer["threads"] != 1:
            self._log.warning("zygote_has_threads", layer=layer.key, threads=answer["threads"])
        made.memory_mb = await asyncio.to_thread(tree.private_mb, made.pid)
        cost = Cost(answer["seconds"], made.memory_mb)
        self._log.info(
            "zygote_ready",
            layer=layer.key,
            pid=made.pid,
            seconds=round(cost.seconds, 3),
            memory_mb=round(cost.memory_mb),
        )
        self._zygotes[layer.key] = made
        self.pool.admit(layer, cost, self._loop.time())
        made.ended.add_done_callback(lambda _: self._zygote_ended(made))
        return made

    async def _make_worker(self, uuid: str) -> ZygoteLink:
        """See `gpu_workers.Make`."""
        with self._link(Layer(f"gpu:{uuid}", "libs")) as (made, theirs):
            made.pid = self._execute("gpu_worker", theirs, self._warm, CUDA_VISIBLE_DEVICES=uuid)
        try:
            answer = await made.ready
            if answer["op"] == "error":
                raise from_info(msgspec.convert(answer["info"], ErrorInfo))
            if answer["op"] != "ready":
                raise ZygoteDied(f"the worker of GPU {uuid} died while it was made")
        except BaseException:
            made.close()
            self._worker_gone(made)
            raise
        self._log.info("gpu_worker_ready", gpu=uuid, pid=made.pid, seconds=round(answer["seconds"], 3))
        return made

    def _worker_gone(self, worker: ZygoteLink) -> None:
        """It ends, or has ended: nobody's any more."""
        self._tree.remove(worker.pid)
        self._sweeper = self._loop.create_task(self._tree.sweep())

    @contextlib.contextmanager
    def _link(self, layer: Layer) -> Iterator[tuple[ZygoteLink, socket.socket]]:
        """A link, and the end of it for the process that is started within the block; ours from then on."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        made = ZygoteLink(layer, ours, self._child_exited, self._forked_ahead)
        try:
            yield made, theirs
        except BaseException:
            made.close()
            raise
        finally:
            theirs.close()
        self._tree.add(made.pid)

    def _execute(self, module: str, control: socket.socket, *arguments: str, **env: str) -> int:
        """Run a process that talks over `control` and dies with this one."""
        command = [sys.executable, "-P", "-m", f"sllm_invoker.containers.{module}"]
        process = subprocess.Popen(
            [*command, str(control.fileno()), str(self._lifeline_r), *arguments],
            pass_fds=(control.fileno(), self._lifeline_r),
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),
            env={**self._env, **env},
            start_new_session=True,
        )
        process.returncode = 0  # we reap it ourselves, as a child among others
        return process.pid

    async def _spawn(
        self, layer: Layer, parent: ZygoteLink | None, spec: ContainerSpec | None, control: socket.socket
    ) -> int:
        if parent is None:
            return self._execute("zygote", control)
        fds = [control.fileno()]
        payload = -1
        if layer.warmth == "template":
            assert spec is not None
            payload = _memfd(_template(spec.spec, spec.object_dir))
            fds.append(payload)
        try:
            pid, pidfd = await parent.request({"op": "layer", "key": layer.key, "libs": list(layer.libs)}, fds)
        finally:
            if payload >= 0:
                os.close(payload)
        os.close(pidfd)
        return pid

    def _forked_ahead(self, link: ZygoteLink, pid: int) -> None:
        task = self._loop.create_task(self._take_in(link, pid))
        self._refilling.add(task)
        task.add_done_callback(self._refilling.discard)

    async def _take_in(self, link: ZygoteLink, pid: int) -> None:
        """Its memory is its layer's, and it enters the group of the instance that it will be: the kernel takes its time
        for that."""
        if self._zygotes.get(link.layer.key) is link:
            self.pool.weigh(link.layer.key, link.memory_mb + await asyncio.to_thread(tree.private_mb, pid))
        name = f"ahead-{pid}"
        await asyncio.to_thread(zygote.enter, self._cgroups.make(name, AHEAD_MB), pid)
        self._groups[pid] = name
        self._tree.add(pid)
        link.agree(pid)

    def _disown(self, link: ZygoteLink) -> None:
        """What is left of it and of the process it had forked ahead is nobody's: a sweep ends it."""
        self._tree.remove(link.pid)
        self._tree.remove(link.standby)

    def _zygote_ended(self, ended: ZygoteLink) -> None:
        key = ended.layer.key
        if self._closed or self._zygotes.get(key) is not ended:
            return
        del self._zygotes[key]
        self._disown(ended)
        wait = self.pool.died(key, self._loop.time())
        self._log.warning("zygote_died", layer=key, pid=ended.pid, retry_after=wait)
        self._sweeper = self._loop.create_task(self._tree.sweep())

    async def close(self) -> None:
        self._closed = True
        self.gpus.close()
        for task in [*self._making.values(), *self._refilling]:
            task.cancel()
        await asyncio.gather(*(handle.stop(0) for handle in list(self._handles.values())))
        for found in self._zygotes.values():
            found.close()
            self._disown(found)
        self._zygotes.clear()
        os.close(self._lifeline_w)
        os.close(self._lifeline_r)
        await self._tree.sweep()


def _path(spec: FunctionSpec | None, object_dir: str) -> Sequence[Layer]:
    return layers.path(spec, Path(object_dir).name)


def _memfd(data: bytes) -> int:
    fd = os.memfd_create("sllm", os.MFD_CLOEXEC)
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(data)
    return fd


def _template(spec: FunctionSpec | None, object_dir: str) -> bytes:
    assert spec is not None
    return json.dumps({"spec": dataclasses.asdict(spec), "object_dir": object_dir}).encode()
