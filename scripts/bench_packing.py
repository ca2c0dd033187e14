"""What a forward and backward of BRPO's rows costs against plain GRPO's: added rows whole, trimmed, and packed.

    python scripts/bench_packing.py --thinking 128 512 1024 --answer 8 32 --turns 5

A trace of T thinking tokens is cut at T/4, T/2, 3T/4 and T, and four answers of S tokens follow each cut. The arms take
turns in one process: `grpo` (the thinking rows alone), `rows` (all rows at the length of the longest), `trimmed` (each
row at its own length) and `tree` (`rltoken.rollout.tree`). A ratio is that of the medians. Peak memory is that of a
process of its own for each arm, above what it had before the forward. `tokens` is the ratio of token counts, which a
forward without any attention would have.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from rltoken.rollout import tree
from rltoken.trl_compat import add_fused_lm_head

PROMPT, CUTS, ANSWERS, VOCABULARY = 64, 4, 4, 8192
ARMS = ("grpo", "rows", "trimmed", "tree")


def build_model() -> PreTrainedModel:
    """A Llama of about 10 million parameters."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=10,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16384,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    add_fused_lm_head(model, 1.0, outputs=("log_probs", "entropy"))
    tree.use(model)
    return model.train()


def rows_of(thinking: int, answer: int, families: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, P + T] ids and mask, and [B] family, the thinking rows first."""
    generator = torch.Generator().manual_seed(0)
    columns = PROMPT + thinking + answer
    ids, mask, family = [], [], []
    for number in range(families):
        trunk = torch.randint(VOCABULARY, (PROMPT + thinking,), generator=generator)
        cuts = [PROMPT + thinking * (cut + 1) // CUTS for cut in range(CUTS) for _ in range(ANSWERS)]
        answers = [torch.randint(VOCABULARY, (answer,), generator=generator) for _ in cuts]
        for row in (trunk, *(torch.cat([trunk[:cut], tail]) for cut, tail in zip(cuts, answers, strict=True))):
            padding = torch.zeros(columns - len(row), dtype=torch.long)
            ids.append(torch.cat([row, padding]))
            mask.append(torch.cat([torch.ones_like(row), padding]))
            family.append(number)
    first = sorted(range(len(ids)), key=lambda i: i % (1 + CUTS * ANSWERS) != 0)
    return torch.stack(ids)[first], torch.stack(mask)[first], torch.tensor(family)[first]


def plain(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """The sum of the log-probs of all completion tokens."""
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :PROMPT] = -100
    return model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs.sum()


def steps_of(model: PreTrainedModel, thinking: int, answer: int, families: int) -> dict[str, Callable[[], None]]:
    """A forward and backward by each arm."""
    ids, mask, family = rows_of(thinking, answer, families)
    columns = ids.size(1) - PROMPT

    def grpo() -> None:
        """The thinking rows."""
        plain(model, ids[:families, : PROMPT + thinking], mask[:families, : PROMPT + thinking]).backward()

    def rows() -> None:
        """All rows of a family at once, padded to the longest."""
        for number in range(families):
            plain(model, ids[family == number], mask[family == number]).backward()

    def trimmed() -> None:
        """Rows of one length at once."""
        lengths = mask.sum(1)
        for length in lengths.unique().tolist():
            chosen = lengths == length
            plain(model, ids[chosen, :length], mask[chosen, :length]).backward()

    def packed() -> None:
        """One packed row a family."""
        grown = tree.plant(ids, mask, columns, family, torch.float32)
        found = model(
            input_ids=grown.ids,
            attention_mask=grown.mask,
            position_ids=grown.positions,
            shift_labels=grown.labels,
            fused_lm_head=True,
        )
        (grown.rows_of(found.log_probs) * mask[:, -columns:]).sum().backward()

    return dict(zip(ARMS, (grpo, rows, trimmed, packed), strict=True))


def seconds(steps: dict[str, Callable[[], None]], model: PreTrainedModel, turns: int) -> dict[str, float]:
    """Medians over `turns` turns in which every arm comes once, after one turn that does not count."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(turns + 1):
        for name, step in steps.items():
            model.zero_grad()
            begin = time.perf_counter()
            step()
            if turn:
                found[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in found.items()}


def peak_megabytes(arm: str, thinking: int, answer: int, families: int) -> float:
    """What one forward and backward needs above the model, in a process of its own."""
    command = [sys.executable, __file__, "--peak", arm, "--families", str(families)]
    sizes = ["--thinking", str(thinking), "--answer", str(answer)]
    return float(subprocess.run([*command, *sizes], check=True, capture_output=True, text=True).stdout)


def print_peak(arm: str, thinking: int, answer: int, families: int) -> None:
    """Write what `peak_megabytes` reads: the rise of the process's largest resident size."""
    model = build_model()
    steps = steps_of(model, thinking, answer, families)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    steps[arm]()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def main() -> None:
    """Print one line per combination of lengths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--thinking", type=int, nargs="+", default=[128, 512, 1024], help="T, tokens")
    parser.add_argument("--answer", type=int, nargs="+", default=[8, 32], help="S, tokens of an answer")
    parser.add_argument("--families", type=int, default=1, help="thinking rows")
    parser.add_argument("--turns", type=int, default=5, help="turns that count")
    parser.add_argument(
        "--rows-up-to", type=int, default=1024, help="longest T for which rows without packing are measured"
    )
    parser.add_argument("--peak", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print_peak(options.peak, options.thinking[0], options.answer[0], options.families)
        return
    model = build_model()
    console, table = Console(), Table(title="forward and backward over plain GRPO's")
    for column in (
        "T",
        "S",
        "grpo, s",
        "rows",
        "trimmed",
        "tree",
        "tokens",
        "peak MB: grpo",
        "rows",
        "trimmed",
        "tree",
    ):
        table.add_column(column, justify="right")
    sizes = [(thinking, answer) for thinking in options.thinking for answer in options.answer]
    for thinking, answer in track(sizes, "measuring", console=Console(stderr=True)):
        steps = steps_of(model, thinking, answer, options.families)
        if thinking > options.rows_up_to:
            del steps["rows"], steps["trimmed"]
        medians = seconds(steps, model, options.turns)
        ratios = [f"{medians[arm] / medians['grpo']:.2f}" if arm in medians else "" for arm in ARMS[1:]]
        counted = 1 + CUTS * ANSWERS * (answer + 1) / (PROMPT + thinking)
        peaks = {arm: peak_megabytes(arm, thinking, answer, options.families) for arm in medians}
        shown = [f"{peaks[arm]:.0f}" if arm in peaks else "" for arm in ARMS]
        table.add_row(str(thinking), str(answer), f"{medians['grpo']:.2f}", *ratios, f"{counted:.2f}", *shown)
    console.print(table)


if __name__ == "__main__":
    main()
