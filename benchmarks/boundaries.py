"""Every party of a move killed at every message of it, with real processes: controller, source, destination, gateway.

    python -m benchmarks.boundaries [--quick] [--victim NAME …] [--json PATH]

The messages of an undisturbed move are recorded; then, for each of them and each party, a stream that counts is told to
move and that party is killed by SIGKILL when the message was received and not yet acted upon, or, its sender, when it
was about to be sent. The answer has to end migrated, not begun, or resumed; the client sees every number once (of a
killed gateway it attaches again); afterwards nothing runs, no slot is taken, no process is without an owner. How it is
done is in `tests/e2e/boundaries.py`. Full: about half an hour. With `--quick` every eighth case.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks.common import Report, arguments, table
from tests.e2e.boundaries import VICTIMS, Boundary, Ending, scene

OUTCOMES = ("migrated", "not begun", "resumed")
AGAIN = 3
"""Times that a case is played when its message does not come: the rounds of a move are not the same each time."""


def enumerated(folder: Path, victims: list[str], step: int) -> tuple[list[Boundary], list[Ending]]:
    with scene(folder) as here:
        boundaries = here.record()
        cases = [(victim, each) for each in boundaries for victim in each.victims if victim in victims]
        endings = []
        for number, (victim, boundary) in enumerate(cases[::step], 1):
            for _ in range(AGAIN):
                ending = here.play(victim, boundary)
                if ending.reached or ending.wrong:
                    break
            endings.append(ending)
            print(
                f"{number}/{len(cases[::step])} {victim} killed: {boundary}: {ending.outcome}"
                f"{'' if ending.reached else ' (the message did not come)'}, {ending.seconds:.1f} s",
                *ending.wrong,
                flush=True,
            )
    return boundaries, endings


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--victim", action="append", choices=VICTIMS, help="only this party is killed")
    args = parser.parse_args()
    report = Report("boundaries")
    with tempfile.TemporaryDirectory(prefix="sllm-boundaries-") as name:
        boundaries, endings = enumerated(Path(name), args.victim or list(VICTIMS), 8 if args.quick else 1)
    reached = [each for each in endings if each.reached]
    counts = Counter((each.victim, each.outcome) for each in reached)
    rows = [
        (
            victim,
            sum(each.victim == victim for each in reached),
            *(counts[victim, outcome] for outcome in OUTCOMES),
            sum(each.victim == victim and (each.outcome not in OUTCOMES or bool(each.wrong)) for each in reached),
        )
        for victim in VICTIMS
    ]
    print()
    table(("killed", "cases", *OUTCOMES, "wrong"), rows)
    for victim, cases, *ends, _ in rows:
        report.figure(f"{victim}_cases", cases)
        for outcome, count in zip(OUTCOMES, ends, strict=True):
            report.figure(f"{victim}_{outcome.replace(' ', '_')}", count)
    report.figure("messages", len(boundaries))
    report.figure("not_reached", len(endings) - len(reached))
    report.figure("longest_s", max(each.seconds for each in endings))
    report.at_most("answers that end in a fourth way", sum(each.outcome not in OUTCOMES for each in endings), 0)
    report.at_most("cases with a number lost or twice, or with something left", sum(bool(e.wrong) for e in endings), 0)
    return report.finish(args.json)


if __name__ == "__main__":
    sys.exit(main())
