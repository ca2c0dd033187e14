#!/usr/bin/env python
"""Which tokens of the embedded world a method's weights keep, by what a token is: style, result, operation, quick ...

    python scripts/token_kinds.py +exp=forking_tokens world=label_free model.seed=5
    python scripts/token_kinds.py +exp=thr world=label_free --windows 3 --words style
    python scripts/token_kinds.py +exp=ada_grpo/grpo '~model.seed' '~model.source' \\
        '+model.source={_target_:rltoken.models.existing,path:runs/formats/sft/final}'

The overrides are those of rltoken.train. Windows are sampled from the warm start, or from the model that is named, and
the whole pipeline runs on each, but nothing is learned: the learning rate is 0, and a window is used once, so that what
acts off-policy only does not act. Printed as Markdown, of all responses, of the correct and of the wrong ones: each
kind's share of their tokens, its share of those whose weight is not 0, and how the weights of its own tokens lie.

In a world with tags a second table has the responses by the word that opens them and the operations of their problem.
"""

import argparse
import tempfile
from collections import Counter, defaultdict
from statistics import fmean

from bench import make, prepared
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback, set_seed

from rltoken.pipeline import Pipeline, build
from rltoken.tiny import world as tiny
from rltoken.trainer import TokenGRPOTrainer

FIXED = (
    "trainer.learning_rate=0", "trainer.num_iterations=1", "trainer.save_strategy=no", "trainer.log_completions=false",
)  # fmt: skip
KINDS = {
    **dict.fromkeys(tiny.STYLES, "style"),
    **dict.fromkeys(tiny.LETTERS, "letter"),
    **dict.fromkeys(tiny.FILLERS, "filler"),
    **dict.fromkeys(tiny.RECHECK, "re-check"),
    **dict.fromkeys(tiny.TAGS.values(), "tag"),
    **dict.fromkeys((tiny.START, tiny.SO, tiny.THINK, tiny.THINK_END, tiny.EOS), "frame"),
    tiny.QUICK: "quick",
    tiny.HESITATION: "hesitation",
    tiny.PLAN: "plan",
}
AFTER = {tiny.START: "start value", tiny.SO: "conclusion"}
"""What a digit is that follows one of these words; after an operation it is the result of a step."""
GROUPS = {"all": (True, False), "correct": (True,), "wrong": (False,)}


class Look:
    """An auxiliary loss of 0 that keeps what it sees: a row of (words, weights, correct, level) per response."""

    def __init__(self, tokenizer):
        self.words, self.rows = tokenizer.convert_ids_to_tokens, []

    def __call__(self, logps, ids, mask, weight, correct, inputs):
        for i, kept in enumerate(mask.bool()):
            words, weights = self.words(ids[i][kept].tolist()), weight[i][kept].tolist()
            self.rows.append((words, weights, bool(correct[i]), inputs[i]["level"]))
        return 0.0 * logps


def kinds_of(words, apart=()):
    """What each word of a completion is; of the kinds `apart` with the word itself."""
    found, answered = [], False
    for before, word in zip([None, *words], words, strict=False):
        if word.isdigit():
            kind = "answer" if answered else AFTER.get(before, "result")
        elif word == tiny.LAST or word[0] in "+-*":
            kind = "operation"
        else:
            kind = KINDS.get(word, "other")
        answered = answered or word == tiny.THINK_END
        found.append(f"{kind} {word}" if kind in apart else kind)
    return found


def by_kind(rows, apart):
    """One line per group of responses and kind of token, the most frequent kind first."""
    table = Table(box=box.MARKDOWN)
    for column in ("responses", "tokens", "share", "of those kept", "0", "below 1", "1", "above 1", "mean weight"):
        table.add_column(column, justify="left" if column in ("responses", "tokens") else "right")
    for group, outcomes in GROUPS.items():
        weights = defaultdict(list)
        for words, own, correct, _ in rows:
            if correct in outcomes:
                for kind, weight in zip(kinds_of(words, apart), own, strict=True):
                    weights[kind].append(weight)
        count = sum(map(len, weights.values()))
        kept = sum(weight > 0 for own in weights.values() for weight in own)
        whole = {"all of them": [weight for own in weights.values() for weight in own]} if weights else {}
        for kind, own in [*sorted(weights.items(), key=lambda item: -len(item[1])), *whole.items()]:
            parts = Counter("0" if w == 0 else "1" if w == 1 else "<" if w < 1 else ">" for w in own)
            shares = [len(own) / count, (len(own) - parts["0"]) / max(1, kept), *(parts[p] / len(own) for p in "0<1>")]
            table.add_row(group, kind, *(f"{share:.3f}" for share in shares), f"{fmean(own):.3f}")
    return table


def by_opening(rows):
    """One line per word that opens a response, and number of operations: responses, how many are right, tokens."""
    table = Table(box=box.MARKDOWN)
    for column in ("opening", "operations", "responses", "right", "tokens"):
        table.add_column(column, justify="left" if column == "opening" else "right")
    found = defaultdict(list)
    for words, _, correct, level in rows:
        for key in ("all", str(level)):
            found[words[0] if words[0] in tiny.TAGS.values() else "none", key].append((correct, len(words)))
    for (opening, level), own in sorted(found.items()):
        right, lengths = zip(*own, strict=True)
        table.add_row(opening, level, str(len(own)), f"{sum(right)} ({fmean(right):.3f})", f"{fmean(lengths):.1f}")
    return table


def sampled(cfg):
    """What `Look` keeps of the windows of a configuration."""
    with tempfile.TemporaryDirectory() as scratch:
        trainer = make(TokenGRPOTrainer, cfg, scratch, TrainerCallback())
        look = Look(trainer.processing_class)
        slots = trainer.pipeline.slots
        trainer.pipeline = Pipeline({**slots, "aux": (*slots["aux"], *build({"aux": {"look": look}})["aux"])})
        set_seed(cfg.seed)
        trainer.train()
    return look.rows


def main() -> None:
    """Sample, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, as of rltoken.train")
    parser.add_argument("--windows", type=int, default=1, help="generation windows to sample")
    parser.add_argument(
        "--words", action="append", default=[], metavar="KIND", help="tell its words apart, as of style"
    )
    options = parser.parse_args()
    steps = "trainer.steps_per_generation=1", "trainer.gradient_accumulation_steps=1"
    (cfg,) = prepared([*options.overrides, *FIXED, *steps, f"trainer.max_steps={options.windows}"])
    rows = sampled(cfg)
    console = Console(width=160)
    console.print(f"{len(rows)} responses, {sum(correct for _, _, correct, _ in rows)} of them correct")
    console.print(by_kind(rows, options.words))
    if cfg.world.tagged:
        console.print(by_opening(rows))


if __name__ == "__main__":
    main()
