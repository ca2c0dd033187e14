#!/usr/bin/env python
"""What grading costs and gains against math-verify in a plain loop, in one process, by turns.

    python scripts/bench_grader.py                                    # expressions made here, one worker per usable CPU
    python scripts/bench_grader.py --data ../shared/data/traces_qwen_math.jsonl --workers 2 --repeats 15

The loop calls math-verify's `parse` and `verify` on each completion and its gold answer. The arms: the same calls in
the pool of `rltoken.rewards.grader`, and once more when all results are known; `rltoken.rewards.math.outcomes`, which
decides bare numbers without math-verify, and once more when all are known, of copies of the same texts. sympy remembers
what it did, so the loop and the pool's workers both do everything twice before the first turn; otherwise the loop would
be warm and each new worker cold. For `outcomes` each turn has new workers and texts of its own. What is printed are
ratios of the medians, with the quartiles of the ratios of each turn. Absolute times depend on the machine and its
neighbours; do not quote them.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import bench_grader
from math_verify import parse, verify

from rltoken.rewards.grader import shared
from rltoken.rewards.math import outcomes


def judge(pair):
    """Whether math-verify finds a completion's answer equal to the gold answer."""
    completion, gold = pair
    return verify(parse(f"${gold}$"), parse(completion))


FUNCTION = bench_grader.judge
"""By the name under which workers can import it: not that of the main module."""


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


def turn(items, pool, number):
    """Each arm once: its seconds, and its verdicts. `pool` is warm; turns of different numbers share nothing else."""
    settings = {"workers": pool.workers, "seconds": pool.seconds + number}
    fresh = shared(**settings)
    fresh.map(
        time.sleep, [0.5] * pool.workers
    )  # otherwise one worker does all that follows before the others are ready
    graded(made_up(16 * pool.workers), **settings)
    pool.map(FUNCTION, items, cache=True)
    new = [(f"Turn {number}. {completion}", gold) for completion, gold in items]
    copies = [(completion.encode().decode(), gold) for completion, gold in new]
    arms = {
        "loop": lambda: [judge(item) for item in items],
        "the same in the pool": lambda: [result.value for result in pool.map(FUNCTION, items)],
        "again, all known": lambda: [result.value for result in pool.map(FUNCTION, items, cache=True)],
        "rltoken.rewards.math": lambda: graded(new, **settings),
        "the same, all known": lambda: graded(copies, **settings),
    }
    found = {name: seconds_of(arm) for name, arm in arms.items()}
    fresh.close()
    return found


def graded(items, workers, seconds):
    """Whether each item is correct, as training would have it."""
    completions, answers = zip(*items, strict=True)
    return [outcome == "correct" for outcome in outcomes(completions, answers, workers=workers, seconds=seconds)]


def main(arguments=None) -> None:
    """Measure, and print one line per arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="JSON lines with `completion` and `answer`; by default pairs are made up")
    parser.add_argument("--items", type=int, default=400, help="how many pairs are made up")
    parser.add_argument("--workers", type=int, default=shared().workers, help="processes of the pool, at least 1")
    parser.add_argument("--repeats", type=int, default=15, help="turns of each arm, at least 2")
    options = parser.parse_args(arguments)

    items = read(options.data) if options.data else made_up(options.items)
    pool = shared(workers=options.workers, seconds=60.0)
    for _ in range(2):
        pool.map(FUNCTION, items)
        for item in items:
            judge(item)
    turns = [turn(items, pool, number) for number in range(1, options.repeats + 1)]
    pool.close()
    seconds = {name: [found[name][0] for found in turns] for name in turns[0]}
    print(f"{len(items)} items, {options.workers} workers, {options.repeats} turns; times faster than the loop:")
    for name, own in seconds.items():
        different = sum(a != b for a, b in zip(turns[0][name][1], turns[0]["loop"][1], strict=True))
        each = statistics.median(own) / len(items)
        told = f"median {each * 1e3:.4f} ms an item, {different} verdicts unlike the loop's"
        print(f"  {name:22}{ratios(seconds['loop'], own)}   {told}")


if __name__ == "__main__":
    main()
