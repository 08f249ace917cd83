"""Scenarios that come with the simulator. What a publication does not say, or we could not check, is an assumption."""

from __future__ import annotations

from dataclasses import replace

from sllm_faas.sim.scenario import FunctionModel, LoadModel, NodeModel, Scenario

_PAPER_CLUSTER = NodeModel(
    count=4, memory_gb=512.0, gpus=4, dram_gb=160.0, remote=1.25, disk=5.0, dram=20.0, container=0.1, jitter=0.03
)
_PAPER_NOTES = (
    "4 servers x 4 A40, 512 GB, 10 Gbit/s, one PCIe 4.0 NVMe each: as published for the scheduler's test bed",
    "assumed: 5 GB/s from NVMe, 20 GB/s from pinned DRAM to a GPU, 160 GB of DRAM cache per server, 0.1 s to a process",
    "assumed: every checkpoint is on every server's NVMe at first; one instance per GPU set, one request at a time",
    "one stream of Gamma arrivals with CV 8, models drawn with Zipf popularity 0.5 (assumed)",
    "assumed: lengths like GSM8K (in 100, out 130 tokens) and decode rates of an A40 (28, 50, 75 ms per token)",
    "instances are kept 60 s after their last request unless their room is needed (assumed)",
)
_PAPER_GRID = (
    "assumed: {rates} requests/s, that is {parts} % of the {full:.1f} that its GPUs could serve were every model"
    " loaded, about what 0.2, 0.8, 1.4 and 2.0 are for OPT-6.7B; the disks can load {cold:.1f} models a second"
)


_MEAN_OUTPUT = 130


def _opt(name: str, count: int, gb: float, gpus: int, per_output: float) -> FunctionModel:
    return FunctionModel(
        name,
        count=count,
        checkpoint_gb=gb,
        memory_mb=1024,
        gpus=gpus,
        max_containers=4,
        per_input=per_output / 60,
        per_output=per_output,
        input="lognormal:100:250",
        output=f"lognormal:{_MEAN_OUTPUT}:320",
    )


def _paper(name: str, functions: tuple[FunctionModel, ...], rates: tuple[float, ...]) -> Scenario:
    """`rates` go up to saturation: the last is past what the disks could load were every request cold."""
    cluster, models = _PAPER_CLUSTER, sum(each.count for each in functions)
    seconds = sum(each.count * each.gpus * _MEAN_OUTPUT * each.per_output for each in functions) / models
    full = cluster.count * cluster.gpus / seconds
    grid = _PAPER_GRID.format(
        rates=", ".join(f"{rate:g}" for rate in rates),
        parts=", ".join(f"{100 * rate / full:.0f}" for rate in rates),
        full=full,
        cold=cluster.count * cluster.disk / (sum(each.count * each.checkpoint_gb for each in functions) / models),
    )
    return Scenario(
        name,
        nodes=(cluster,),
        functions=functions,
        load=LoadModel("gamma", rate=rates[2], cv=8.0, popularity=0.5),
        seconds=1800.0,
        rates=rates,
        assumptions=(*_PAPER_NOTES, grid),
    )


_OPT_6 = _opt("opt-6b", 32, 13.3, 1, 0.028)
_OPT_13 = _opt("opt-13b", 16, 26.0, 1, 0.05)
_OPT_30 = _opt("opt-30b", 8, 60.0, 2, 0.075)


_HYDRA_NODE = NodeModel(remote=2.0, disk=1.0, dram=8.0, container=3.0, jitter=0.05)


def _hydra(cv: float) -> Scenario:
    def llama(
        task: str, gb: float, slo: float, per_input: float, per_output: float, tin: str, tout: str
    ) -> FunctionModel:
        return FunctionModel(
            f"{task}-{round(gb)}gb",
            count=64,
            checkpoint_gb=gb,
            memory_mb=1,
            gpus=1,
            concurrency=8,
            max_containers=2,
            scaledown_window=30.0,
            per_input=per_input,
            per_output=per_output,
            input=tin,
            output=tout,
            slo_ttft=slo,
        )

    tasks = (
        ("chat", 1.0, "lognormal:200:1000", "lognormal:220:700"),
        ("code", 1.0, "lognormal:150:400", "lognormal:70:250"),
        ("summary", 5.0, "lognormal:2500:4000", "lognormal:90:300"),
    )
    functions = tuple(
        llama(task, gb, slo * factor, prefill, decode, tin, tout)
        for task, factor, tin, tout in tasks
        for gb, slo, prefill, decode in ((13.0, 7.5, 0.0003, 0.042), (25.0, 12.0, 0.00055, 0.058))
    )
    return Scenario(
        f"hydraserve-cv{cv:g}",
        nodes=(
            replace(_HYDRA_NODE, count=8, memory_gb=22.0, gpus=1, dram_gb=142.0),
            replace(_HYDRA_NODE, count=4, memory_gb=128.0, gpus=4, dram_gb=182.0),
        ),
        functions=functions,
        load=LoadModel("gamma", rate=0.7, cv=cv, popularity=1.0, per_function=True),
        seconds=3600.0,
        placement="remote",
        rates=(0.6, 0.7, 0.8),
        assumptions=(
            "from HydraServe's public artifact: 6 x 64 models of 13 and 25 GB, time-to-first-token promises of 7.5 and"
            " 12 s (five times that for summaries), 42 and 58 ms per token, 8 requests at once, kept 30 s after the"
            " last; 2 servers with four 22 GB GPUs and 64 Gbit/s, 4 with four 32 GB GPUs and 16 Gbit/s; DRAM cache"
            " 0.9 x memory - 4 x (GPU memory + 4) - 5 GB; nothing cached at first; storage is never the bottleneck",
            "assumed: a server with 22 GB GPUs is four nodes with a quarter of its network and cache each, because"
            " `memory_gb` is the GPUs' memory and 25 GB models only go to 32 GB GPUs",
            "assumed: 3 s to a ready runtime (the artifact's planner takes 2 s for HydraServe's own, none is given for"
            " ServerlessLLM's), 8 GB/s from DRAM to a GPU, 0.3 and 0.55 ms per prompt token, at most 2 instances of a"
            " model, a batch slows nobody down",
            "assumed: Zipf popularity 1.0, lengths like ShareGPT, HumanEval and LongBench; its arrivals are the Azure"
            " functions of two weeks in 2021, one or two to a model, squeezed into an hour and redrawn with a CV;"
            " ours are Gamma with that CV for each model",
            "its promises count the first token alone, as ours do",
        ),
    )


def _scale() -> Scenario:
    return Scenario(
        "scale",
        nodes=(NodeModel(1000, memory_gb=64.0, dram_gb=24.0, remote=1.0, disk=2.0, dram=20.0, container=0.2),),
        functions=(
            FunctionModel("plain", count=3000, memory_mb=512, concurrency=1, max_containers=512, seconds=0.2),
            FunctionModel(
                "model",
                count=2000,
                checkpoint_gb=4.0,
                memory_mb=1024,
                concurrency=4,
                max_containers=512,
                per_input=0.0002,
                per_output=0.01,
                input="lognormal:1155:4142",
                output="lognormal:211:601",
                slo_ttft=5.0,
            ),
        ),
        load=LoadModel("minutes", rate=500.0, popularity=1.0),
        seconds=3600.0,
        placement="spread",
        copies=3,
        migrate=False,
        assumptions=(
            "invented: a cluster and a load of the size that is asked about, not a system that was measured",
            "a function may have 512 instances, so that the most popular one, a tenth of the load, is not what is seen",
        ),
    )


def _small() -> Scenario:
    return Scenario(
        "small",
        nodes=(NodeModel(4, memory_gb=64.0, gpus=2, dram_gb=40.0, disk=2.0, dram=20.0, container=0.1),),
        functions=(
            FunctionModel(
                "chat",
                count=12,
                checkpoint_gb=13.0,
                memory_mb=512,
                gpus=1,
                concurrency=4,
                per_input=0.0002,
                per_output=0.02,
                input="lognormal:1155:4142",
                output="lognormal:211:601",
                slo_ttft=5.0,
            ),
        ),
        load=LoadModel("bursts", rate=0.7, popularity=1.0),
        seconds=600.0,
        assumptions=("invented: an example to start from",),
    )


PRESETS: dict[str, Scenario] = {
    scenario.name: scenario
    for scenario in (
        _small(),
        _paper("paper", (_OPT_6,), (0.2, 0.8, 1.4, 2.0)),
        _paper("paper-13b", (_OPT_13,), (0.1, 0.4, 0.8, 1.1)),
        _paper("paper-30b", (_OPT_30,), (0.05, 0.15, 0.25, 0.35)),
        _paper("paper-mixed", (_OPT_6, _OPT_13, _OPT_30), (0.1, 0.4, 0.8, 1.1)),
        _hydra(2.0),
        _hydra(4.0),
        _hydra(8.0),
        _scale(),
    )
}
