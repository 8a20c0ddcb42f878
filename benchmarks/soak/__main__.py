"""Mixed load while engine, workers and Redis are killed and the checkpoint is reloaded; or overload. See README.md."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.soak.overload import overload
from benchmarks.soak.overload import report as report_overload
from benchmarks.soak.run import report, soak


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--fault-every", type=float, default=15.0, metavar="SECONDS")
    parser.add_argument("--checkpoint", default="", help="what is served first (default: the embedded model)")
    parser.add_argument("--overload", action="store_true", help="ten times the capacity, and no faults")
    parser.add_argument("--other", default="", help="what is reloaded to and rolled back from")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        if args.overload:
            return report_overload(overload(Path(folder), args.workers, args.checkpoint, args.seconds, args.seed))
        result = soak(
            Path(folder), seconds=args.seconds, workers=args.workers, clients=args.clients,
            fault_every_s=args.fault_every, checkpoint=args.checkpoint, other=args.other, seed=args.seed,
        )  # fmt: skip
    report(result)
    return 1 if result["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
