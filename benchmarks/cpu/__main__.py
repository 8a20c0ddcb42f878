"""Measure this product's CPU runner and its peers in one run; print a table, write JSON. See README.md."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path

from benchmarks.cpu import limits, machine, report, roofline
from benchmarks.cpu.engines import Engine, EngineFailed
from benchmarks.cpu.install import Installer
from benchmarks.cpu.load import Turns, wait_until_idle
from benchmarks.cpu.models import MODELS, make_model
from benchmarks.cpu.peers import ENGINES, ROWS, Context, start
from benchmarks.cpu.workloads import WORKLOADS

_ROOT = Path(__file__).parents[2]


def _names(known: tuple[str, ...] | list[str]) -> type:
    """An argparse type: names from a fixed list, separated by commas."""

    def parse(text: str) -> list[str]:
        wanted = [name.strip() for name in text.split(",") if name.strip()]
        unknown = [name for name in wanted if name not in known]
        if unknown or not wanted:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown) or 'nothing'}: known are {', '.join(known)}")
        return wanted

    return parse  # type: ignore[return-value]


def arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    parser.add_argument("--only", type=_names(ENGINES), metavar="ENGINES", help=f"some of: {', '.join(ENGINES)}")
    parser.add_argument("--bits", type=_names(["int8", "int4", "fp32"]), help="some of: int8, int4, fp32")
    parser.add_argument(
        "--models", type=_names(list(MODELS)), default=list(MODELS), help=f"some of: {', '.join(MODELS)}"
    )
    parser.add_argument("--workloads", type=_names(list(WORKLOADS)), default=list(WORKLOADS), help=", ".join(WORKLOADS))
    parser.add_argument(
        "--repeats", type=int, default=5, help="samples a figure is the median of (default %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="one short sample each: does everything run?")
    parser.add_argument("--roofline", action="store_true", help="only print what each kernel of a step needs and takes")
    parser.add_argument("--threads", type=int, default=2, help="threads of every engine (default %(default)s)")
    parser.add_argument("--limit", type=float, default=1800, help="seconds that one engine may take in all, a model")
    parser.add_argument(
        "--retakes", type=int, default=0, help="samples taken anew when others used the machine meanwhile"
    )
    parser.add_argument(
        "--wait-idle", type=float, default=5, help="seconds to wait for a quiet machine before a sample"
    )
    parser.add_argument(
        "--lock",
        type=Path,
        help="file to lock while measuring, half a minute at a time, to take turns with other programs",
    )
    parser.add_argument("--cache", type=Path, default=_ROOT / "build" / "bench", help="where engines and models lie")
    parser.add_argument("--out", type=Path, help="the JSON file (default: results/ in the cache)")
    return parser.parse_args(words)


class Run:
    """All engines of one model, measured in turn: a sample of each, then the next sample of each."""

    def __init__(self, options: argparse.Namespace, installer: Installer, turns: Turns) -> None:
        self._options = options
        self._turns = turns
        self._installer = installer
        self._spent: dict[int, float] = {}

    def measure(self, name: str, results: list[report.Result]) -> None:
        """Adds the model's rows to ``results``, where they also are when the run is broken off."""
        options = self._options
        model = MODELS[name]
        folder = make_model(model, options.cache / "models" / name)
        engines: list[tuple[report.Result, Engine]] = []
        try:
            for row in ROWS:
                if (options.only and row.engine not in options.only) or (options.bits and row.bits not in options.bits):
                    continue
                result = report.Result(name, row.engine, row.bits, row.mode)
                results.append(result)
                sample_s = 0.05 if options.quick else 0.7
                context = Context(self._installer, model, folder, options.threads, sample_s, min(options.limit, 300))
                engine = start(row, context)
                if isinstance(engine, str):
                    result.error = engine
                    _say(f"{name} {row.name}: {engine}")
                else:
                    result.about = engine.about
                    engines.append((result, engine))
            self._rounds(engines)
        finally:
            self._turns.give_up()
            for _, engine in engines:
                engine.close()

    def _rounds(self, engines: list[tuple[report.Result, Engine]]) -> None:
        repeats = 1 if self._options.quick else self._options.repeats
        for number in range(repeats + self._options.retakes):
            for workload in self._options.workloads:
                # Another engine is first each time, so that none always runs after the same one.
                first = number % max(1, len(engines))
                for result, engine in engines[first:] + engines[:first]:
                    quiet = sum(not sample.disturbed for sample in result.samples.get(workload, ()))
                    if not result.error and (number < repeats or quiet < repeats):
                        self._sample(result, engine, workload, number)

    def _sample(self, result: report.Result, engine: Engine, workload: str, number: int) -> None:
        options = self._options
        try:
            if self._spent.get(id(engine), 0.0) > options.limit:
                raise EngineFailed(f"took more than {options.limit:.0f} s in all")
            with self._turns:
                wait_until_idle(0 if options.quick else options.wait_idle)
                before = time.perf_counter()
                sample = engine.sample(WORKLOADS[workload], 100 * (number + 1))
                self._spent[id(engine)] = self._spent.get(id(engine), 0.0) + time.perf_counter() - before
        except EngineFailed as failure:
            result.error = f"{workload}: {failure}"
            _say(f"{result.model} {result.engine} {result.mode}: {result.error}")
            engine.close()
            return
        result.samples.setdefault(workload, []).append(sample)
        mark = f" (others used {sample.foreign:.0%})" if sample.disturbed else ""
        _say(f"{result.model} {result.engine} {result.mode} {workload}: {sample.tokens_per_s:,.0f}{mark}")


def main(words: list[str]) -> int:
    options = arguments(words)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if options.roofline:
        options.cache.mkdir(parents=True, exist_ok=True)
        found = limits.measure(options.cache, options.threads)
        for name in options.models:
            for bits in options.bits or ("int8", "int4"):
                steps = roofline.Steps(make_model(MODELS[name], options.cache / "models" / name), bits, options.threads)
                print(roofline.table(MODELS[name], bits, found, steps))
                steps.close()
        print(f"limits: {json.dumps(found)}")
        return 0
    installer = Installer(options.cache, limit_s=3600)
    about = machine.describe(options.threads)
    about["time"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    turns = Turns(options.lock)
    with turns:
        found_limits = limits.measure(options.cache, options.threads)
    turns.give_up()
    repeats = 1 if options.quick else options.repeats
    kept = {key: value for key, value in vars(options).items() if key not in ("cache", "out", "lock")}
    results: list[report.Result] = []
    out = options.out or options.cache / "results" / f"cpu-{about['time'].replace(':', '')}.json"
    try:
        for name in options.models:
            Run(options, installer, turns).measure(name, results)
            with turns:
                wait_until_idle(0 if options.quick else options.wait_idle)
                again = limits.measure(options.cache, options.threads)
            turns.give_up()
            found_limits = limits.highest(found_limits, again)
    except KeyboardInterrupt:
        _say("interrupted: what was measured so far follows")
    document = report.as_json(results, options.workloads, repeats, about, found_limits, kept)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n")
    print(report.table(results, options.workloads, repeats, found_limits))
    print(f"CPU: {about['cpu'].get('model name', '?')}, {options.threads} threads; limits: {json.dumps(found_limits)}")
    print(f"Written: {out}")
    return 0 if any(result.samples for result in results) else 1


def _say(message: str) -> None:
    print(f"# {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
