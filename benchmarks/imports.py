"""What `import sllm` costs, from an installed wheel.

Builds the wheel, installs it with the base dependencies into an environment of its own, and runs
`python -X importtime -c 'import sllm'`: the cumulative time of `sllm`, its median and maximum over the runs, and which
heavy packages it pulled in.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from benchmarks.common import ROOT, Report, arguments, table

HEAVY = ("torch", "zmq", "starlette", "msgspec", "httpx", "numpy", "pydantic")


def installed(folder: Path) -> Path:
    """The interpreter of a new environment with the wheel in it."""
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)],
        check=True,
    )
    venv.create(folder / "env", with_pip=True)
    python = folder / "env/bin/python"
    wheel = next(folder.glob("*.whl"))
    command = [str(python), "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt"), str(wheel)]
    subprocess.run(command, check=True)
    return python


def import_ms(python: Path) -> tuple[float, set[str]]:
    done = subprocess.run(
        [str(python), "-X", "importtime", "-c", "import sllm"], capture_output=True, text=True, check=True, cwd="/"
    )
    lines = re.findall(r"import time:\s+\d+ \|\s+(\d+) \|(\s+)([\w.]+)", done.stderr)
    names = {name for _, _, name in lines}
    total = next(int(cumulative) for cumulative, _, name in lines if name == "sllm")
    return total / 1000, names


def main() -> int:
    args = arguments(__doc__).parse_args()
    report = Report("imports")
    with tempfile.TemporaryDirectory() as name:
        python = installed(Path(name))
        import_ms(python)
        runs = [import_ms(python) for _ in range(5 if args.quick else 15)]
    times = [ms for ms, _ in runs]
    heavy = sorted(set(HEAVY) & runs[0][1])
    table(["what", "ms"], [["median", f"{statistics.median(times):.1f}"], ["maximum", f"{max(times):.1f}"]])
    report.figure("median_ms", statistics.median(times))
    report.figure("max_ms", max(times))
    report.at_most("import sllm, median ms", statistics.median(times), 60)
    report.at_most("heavy packages imported", len(heavy), 0)
    return report.finish(args.json)


if __name__ == "__main__":
    sys.exit(main())
