#!/usr/bin/env python
"""What the grader pool costs and gains: math-verify on completions in a plain loop, in the pool, and in its cache.

    python scripts/bench_grader.py                                    # expressions made here, one worker per usable CPU
    python scripts/bench_grader.py --data ../shared/data/traces_qwen_math.jsonl --workers 2 --repeats 30

One item is a completion and its gold answer; its work is math-verify's `parse` of both and `verify`, with nothing kept
between items but in the last arm. The loop runs in this process; the pool's workers have been started and have judged
one pair before the first run. The arms take turns within one process, so that a busy machine slows all of them, and
what is printed are ratios of the medians of their times, with the quartiles of the ratios of each turn. Verdicts of the
arms are compared too. Absolute times depend on the machine and its neighbours; do not quote them.
"""

import argparse
import importlib
import json
import statistics
import time
from pathlib import Path

from math_verify import parse, verify

from rltoken.rewards.grader import Pool, shared


def judge(pair):
    """Whether math-verify finds a completion's answer equal to the gold answer."""
    completion, gold = pair
    return verify(parse(f"${gold}$"), parse(completion))


def made_up(count):
    """Completions of one or two formulas and their gold answers, right and wrong ones, all different."""
    return [
        (rf"We get $x = \frac{{{n}}}{{7}}$, so the answer is $\boxed{{\frac{{{n}}}{{{7 + n % 2}}}}}$.", f"{n}/7")
        for n in range(1, count + 1)
    ]


def read(path):
    """The distinct pairs (completion, answer) of a file of JSON lines, in order."""
    rows = map(json.loads, Path(path).read_text().splitlines())
    return list(dict.fromkeys((row["completion"], row["answer"]) for row in rows))


def seconds_of(run):
    """Seconds that a call took, and what it returned."""
    started = time.perf_counter()
    value = run()
    return time.perf_counter() - started, value


def ratios(base, seconds):
    """How many times faster than `base`: the ratio of medians, and the quartiles of the ratios turn by turn."""
    low, _, high = statistics.quantiles([one / other for one, other in zip(base, seconds, strict=True)], n=4)
    return f"{statistics.median(base) / statistics.median(seconds):8.2f}  ({low:.2f} to {high:.2f})"


def measure(items, workers, repeats):
    """Run the arms in turns: seconds of each by name, and the number of items whose verdict was not the loop's."""
    # The workers cannot import the main module, but this file is one that they find, beside the script that runs.
    function = importlib.import_module(Path(__file__).stem).judge
    pool = Pool(workers=workers, seconds=60)
    # One slow item per worker: otherwise a first worker does all of them before the last one is ready.
    pool.map(time.sleep, [0.5] * workers)
    pool.map(function, items[: 8 * workers])
    pool.map(function, items, cache=True)
    arms = {
        "loop": lambda: [function(item) for item in items],
        "pool": lambda: [result.value for result in pool.map(function, items)],
        "pool, all cached": lambda: [result.value for result in pool.map(function, items, cache=True)],
    }
    seconds, different = {name: [] for name in arms}, 0
    for _ in range(repeats):
        verdicts = {}
        for name, arm in arms.items():
            taken, verdicts[name] = seconds_of(arm)
            seconds[name].append(taken)
        different += sum(len(set(row)) > 1 for row in zip(*verdicts.values(), strict=True))
    pool.close()
    return seconds, different


def main() -> None:
    """Measure, and print one line per arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="JSON lines with `completion` and `answer`; by default 400 pairs are made up")
    parser.add_argument("--workers", type=int, default=shared().workers, help="processes of the pool")
    parser.add_argument("--repeats", type=int, default=15, help="turns of each arm, at least 2")
    options = parser.parse_args()

    items = read(options.data) if options.data else made_up(400)
    seconds, different = measure(items, options.workers, options.repeats)
    print(f"{len(items)} items, {options.workers} workers, {options.repeats} turns; times faster than the loop:")
    for name, own in seconds.items():
        each = statistics.median(own) / len(items)
        print(f"  {name:18}{ratios(seconds['loop'], own)}   median {each * 1e3:.3f} ms an item")
    print(f"verdicts that differ from the loop's: {different}")


if __name__ == "__main__":
    main()
