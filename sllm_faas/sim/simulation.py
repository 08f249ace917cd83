"""One run: a scenario, a policy, a seed. Wires the production controller to modelled nodes and a modelled gateway."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from random import Random

from sllm_faas.controller import commands as cmd
from sllm_faas.controller import events as ev
from sllm_faas.controller.state import Machine
from sllm_faas.errors import BadRequest
from sllm_faas.sim.clock import Clock
from sllm_faas.sim.gateway import NAME, SimGateway
from sllm_faas.sim.node import Host, Running, SimNode
from sllm_faas.sim.policies import ANEW, MOVING, POLICIES, SEES_BUSY
from sllm_faas.sim.results import Result, Samples, summary
from sllm_faas.sim.scenario import GB, FunctionModel, NodeModel, Scenario, check
from sllm_faas.sim.workload import Request, expand, random_of, requests
from sllm_faas.spec import AppSpec, CheckpointSpec, FunctionSpec, MethodSpec, Scaling, Target, digest

TAIL = 600.0
"""Seconds after the last arrival in which what waits and runs may still end."""
BUNDLE = digest(b"simulated")
APP = "app"
"""Of functions that name none."""


class Simulation:
    def __init__(
        self, scenario: Scenario, policy: str = "ours", seed: int = 0, arrivals: Iterable[Request] | None = None
    ) -> None:
        """`arrivals`, in order, instead of those that the scenario and the seed would give. Raises BadRequest for a
        scenario or a policy that cannot be."""
        if policy not in POLICIES:
            raise BadRequest(f"policy {policy!r} is unknown; allowed: {', '.join(POLICIES)}")
        check(scenario)
        self.scenario, self.policy, self.seed = scenario, policy, seed
        rng = Random(seed)  # noqa: S311 - a model of chance, not a secret
        drawn = requests(scenario, random_of(rng))
        self._arrivals: Iterator[Request] = drawn if arrivals is None else iter(arrivals)
        self.clock, self.samples = Clock(), Samples()
        migrate = scenario.migrate
        chosen = POLICIES[policy](random_of(rng))
        self.machine = Machine("sim", policy=chosen, migrate=migrate and policy in SEES_BUSY)
        self._models = expand(scenario.functions)
        self._delay = max(node.delay for node in scenario.nodes)
        self._alarm: float | None = None
        try:
            targets, restored = self._deployed()
        except ValueError as error:  # of the spec types
            raise BadRequest(f"scenario {scenario.name!r}: {error}") from None
        self.nodes = self._joined(random_of(rng), dict(restored.sizes))
        self.gateway = SimGateway(
            targets,
            self._models,
            self.nodes,
            self.clock,
            self.samples,
            self._tell,
            tokens=migrate and policy in SEES_BUSY,
            moves=policy in MOVING,
            resumes=policy not in ANEW,
        )
        self._feed(restored)
        self._feed(ev.GatewayUp(NAME, "1"))
        for node in self.nodes.values():
            self._feed(node.hello())

    def run(self) -> Result:
        self._next_arrival()
        self.clock.run(self.scenario.seconds)
        end = self.scenario.seconds + TAIL
        while self.clock.now < end and self.gateway.unfinished():
            self.clock.run(min(end, self.clock.now + 1.0))
        for node in self.nodes.values():
            node.settle()
        return self._result()

    # -- set up ----------------------------------------------------------------------------------------------

    def _deployed(self) -> tuple[list[Target], ev.Restored]:
        """Every function deployed, as after a restart of the controller."""
        targets: list[Target] = []
        apps: dict[str, list[FunctionSpec]] = {}
        sizes: dict[str, int] = {}
        weights: dict[str, float] = {}
        for number, model in enumerate(self._models):
            spec = _spec(model, number)
            name = model.app or APP
            apps.setdefault(name, []).append(spec)
            weights[name] = model.weight
            targets.append(Target(name, spec.name, 1))
            if spec.checkpoint is not None:
                sizes[spec.checkpoint.digest] = int(model.checkpoint_gb * GB)
        versions = tuple(
            ev.StoredVersion(
                name,
                1,
                AppSpec(name, tuple(specs), bundle=BUNDLE, weight=weights[name]),
                ready=True,
                created=0.0,
                active=True,
                digests={spec.name: spec.checkpoint.digest for spec in specs if spec.checkpoint},
            )
            for name, specs in apps.items()
        )
        return targets, ev.Restored(versions, sizes=sizes)

    def _joined(self, rng: Random, sizes: dict[str, int]) -> dict[str, SimNode]:
        scenario, nodes = self.scenario, {}
        models: list[NodeModel] = []
        hosts: list[Host] = []
        for group, model in enumerate(scenario.nodes):
            shared = Host(model.at_once, f"machine-{group}") if model.one_machine else None
            models += [model] * model.count
            hosts += [shared or Host(model.at_once) for _ in range(model.count)]
        held: list[list[str]] = [[] for _ in models]
        for number, name in enumerate(sizes):
            if scenario.placement == "everywhere":
                where = range(len(models))
            elif scenario.placement == "spread":
                first = number * scenario.copies
                where = range(first, first + min(scenario.copies, len(models)))
            else:
                where = range(0)
            for index in where:
                held[index % len(models)].append(name)
        for number, model in enumerate(models):
            name = f"node-{number:05d}"
            nodes[name] = SimNode(
                name,
                model,
                tuple(held[number]),
                sizes,
                self.clock,
                random_of(rng),
                self.samples,
                self._tell,
                self._granted,
                hosts[number],
            )
        return nodes

    # -- running ---------------------------------------------------------------------------------------------

    def _next_arrival(self) -> None:
        request = next(self._arrivals, None)
        if request is not None:
            self.clock.at(request.at, lambda: self._arrive(request))

    def _arrive(self, request: Request) -> None:
        self._next_arrival()
        self.gateway.arrive(request)

    def _granted(self, node: SimNode, instance: Running) -> None:
        """What an invoker grants the gateway. That nothing more may come holds at once: the invoker would refuse it."""
        if instance.state != "ready":
            self.gateway.instance_changed(node, instance)
            return

        def arrives() -> None:
            if instance.state == "ready":
                self.gateway.instance_changed(node, instance)

        self.clock.after(self._delay, arrives)

    def _tell(self, event: ev.Event) -> None:
        self.clock.after(self._delay, lambda: self._feed(event))

    def _feed(self, event: ev.Event) -> None:
        for command in self.machine.handle(event, self.clock.now):
            if isinstance(command, cmd.SendStart):
                node, start = self.nodes[command.node], command.body
                self.clock.after(self._delay, lambda node=node, start=start: node.start(start))  # type: ignore[misc]
            elif isinstance(command, cmd.SendStop):
                node, stop = self.nodes[command.node], command.body
                if stop.reason.startswith("evicted"):
                    self.samples.counts["evictions"] += stop.drain is None
                self.clock.after(self._delay, lambda node=node, stop=stop: node.stop(stop))  # type: ignore[misc]
            elif isinstance(command, cmd.SendMigrate):
                source, migrate = self.nodes[command.node], command.body
                self.clock.after(
                    self._delay,
                    lambda source=source, migrate=migrate: self.gateway.migrate(source, migrate),  # type: ignore[misc]
                )
            elif isinstance(command, cmd.FailTarget):
                self.gateway.fail(command.body.target)
        deadline = self.machine.next_deadline()
        if deadline is not None and (self._alarm is None or deadline < self._alarm):
            self._alarm = deadline
            self.clock.at(deadline, lambda: self._tick(deadline))

    def _tick(self, when: float) -> None:
        if self._alarm == when:
            self._alarm = None
            self._feed(ev.Tick())

    def _result(self) -> Result:
        samples, counts = self.samples, self.samples.counts
        return Result(
            scenario=self.scenario.name,
            policy=self.policy,
            rate=self.scenario.load.rate,
            seed=self.seed,
            seconds=self.clock.now,
            requests=counts["requests"],
            answered=counts["answered"],
            refused=counts["refused"],
            unfinished=self.gateway.unfinished(),
            startup=summary(samples.startup),
            ttft=summary(samples.ttft),
            starts=summary(samples.starts),
            estimate_error=summary(samples.error),
            slo=counts["kept"] / counts["promised"] if counts["promised"] else None,
            cold=counts["starts"],
            migrations=counts["migrations"],
            preemptions=counts["preemptions"],
            evictions=counts["evictions"],
            moved_gb={tier: counts[f"bytes {tier}"] / GB for tier in ("remote", "disk", "dram")},
            gpu_seconds=round(samples.gpu_seconds, 3),
            instance_seconds=round(samples.instance_seconds, 3),
            events=self.clock.happened,
            assumptions=self.scenario.assumptions,
            apps={name: summary(values) for name, values in sorted(samples.apps.items())},
        )


def _spec(model: FunctionModel, number: int) -> FunctionSpec:
    scaling = Scaling(max_containers=model.max_containers, scaledown_window=model.scaledown_window)
    name = f"{model.name}-{number}"
    plain = FunctionSpec(
        name,
        module="m",
        qualname="f",
        methods=(MethodSpec(name),),
        scaling=scaling,
        concurrency=model.concurrency,
        memory_mb=model.memory_mb,
        gpus=model.gpus,
    )
    if not model.checkpoint_gb:
        return plain
    point = CheckpointSpec(f"sim/{name}", digest=digest(name.encode()))
    return replace(plain, kind="llm", module="", qualname="", methods=(), checkpoint=point)
