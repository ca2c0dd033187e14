"""What a forward and backward of BRPO's rows costs against plain GRPO's: added rows whole, trimmed, and packed.

    python scripts/bench_packing.py --thinking 128 512 1024 --answer 8 32 --turns 5
    python scripts/bench_packing.py --model wide               two layers as wide as those of a 1.5B model
    python scripts/bench_packing.py --clock cpu                seconds that this process had of the CPU, not of the wall
    python scripts/bench_packing.py --device cuda --model wide --thinking 2000 4000 8000 --answer 32 118

A trace of T thinking tokens is cut at T/4, T/2, 3T/4 and T, and four answers of S tokens follow each cut. The arms take
turns in one process: `grpo` (the thinking rows alone), `rows` (all rows at the length of the longest), `trimmed` (each
row at its own length), `tree` (`rltoken.rollout.tree`) and on a GPU `flex`, the same by FlexAttention. A ratio is that
of the medians. Peak memory is above what was there before the forward: on a GPU what was allocated, on a CPU the
resident size of a forked process of its own for each arm, measured first. `tokens` is the ratio of token counts, which
a forward without any attention would have. Lines are printed as they are measured. Models are float32 on a CPU and
bfloat16 on a GPU. On a CPU memory that goes back to the system with each free costs up to a fifth of the tree's time:
docs/packing.md has two variables of the environment that keep it.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Iterable

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from rltoken.rollout import tree
from rltoken.trl_compat import add_fused_lm_head

PROMPT, CUTS, ANSWERS, VOCABULARY = 64, 4, 4, 8192
ARMS = ("grpo", "rows", "trimmed", "tree", "flex")
SHAPES = {
    "10M": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 10, "num_attention_heads": 4},
    "wide": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 2, "num_attention_heads": 12},
}
"""A small model, and two of the 28 layers of Qwen2.5-1.5B, in which attention has the share that it has there."""
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}


def build_model(shape: str, device: str) -> PreTrainedModel:
    """A Llama with random weights, in one of `SHAPES`, on a device."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        num_key_value_heads=2,
        max_position_embeddings=16384,
        tie_word_embeddings=True,
        **SHAPES[shape],
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=DTYPES[device])
    add_fused_lm_head(model, 1.0, outputs=("log_probs", "entropy"))
    tree.use(model)
    return model.to(device).train()


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
    ids, mask, family = (values.to(model.device) for values in rows_of(thinking, answer, families))
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

    def packed(*, flex: bool = False) -> None:
        """One packed row a family."""
        grown = tree.plant(ids, mask, columns, family, model.dtype, flex=flex)
        found = model(**grown.inputs, shift_labels=grown.labels, fused_lm_head=True)
        (grown.rows_of(found.log_probs) * mask[:, -columns:]).sum().backward()

    return dict(zip(ARMS, (grpo, rows, trimmed, packed, functools.partial(packed, flex=True)), strict=True))


def seconds(
    steps: dict[str, Callable[[], None]], model: PreTrainedModel, turns: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Medians over `turns` turns in which every arm comes once, after one turn that does not count."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(turns + 1):
        for name, step in steps.items():
            model.zero_grad()
            wait(model)
            begin = clock()
            step()
            wait(model)
            if turn:
                found[name].append(clock() - begin)
    return {name: statistics.median(values) for name, values in found.items()}


def wait(model: PreTrainedModel) -> None:
    """Until a GPU has done what it was told."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def peak_megabytes(shape: str, device: str, arm: str, thinking: int, answer: int, families: int) -> float:
    """What one forward and backward needs above the model: allocated on a GPU, else the rise of the resident size."""
    step = steps_of(build_model(shape, device), thinking, answer, families)[arm]
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def peaks(
    shape: str, device: str, sizes: Iterable[tuple[int, int]], families: int, rows_up_to: int
) -> dict[tuple[int, int, str], float]:
    """(T, S, arm) -> megabytes. To be called before this process has trained, which would leave memory to its forks."""
    asked = [(shape, device, arm, *size, families) for size in sizes for arm in measured(size[0], rows_up_to, device)]
    console = Console(stderr=True)
    if device == "cuda":  # which no fork can use
        found = [peak_megabytes(*arguments) for arguments in track(asked, "memory", console=console)]
    else:
        with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as processes:
            results = [processes.apply_async(peak_megabytes, arguments) for arguments in asked]
            found = [result.get() for result in track(results, "memory", console=console)]
    return {(thinking, answer, arm): peak for (_, _, arm, thinking, answer, _), peak in zip(asked, found, strict=True)}


def measured(thinking: int, rows_up_to: int, device: str) -> tuple[str, ...]:
    """The arms that are measured at this length: FlexAttention has no backward on a CPU."""
    left_out = {*(() if device == "cuda" else ("flex",)), *(() if thinking <= rows_up_to else ("rows", "trimmed"))}
    return tuple(arm for arm in ARMS if arm not in left_out)


def main() -> None:
    """Print one line per combination of lengths, in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--thinking", type=int, nargs="+", default=[128, 512, 1024], help="T, tokens")
    parser.add_argument("--answer", type=int, nargs="+", default=[8, 32], help="S, tokens of an answer")
    parser.add_argument("--model", choices=SHAPES, default="10M", help="what is measured")
    parser.add_argument("--device", choices=DTYPES, default="cpu", help="where it is measured")
    parser.add_argument("--families", type=int, default=1, help="thinking rows")
    parser.add_argument("--turns", type=int, default=5, help="turns that count")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="what seconds are: of the wall, or of the CPU")
    parser.add_argument(
        "--rows-up-to", type=int, default=1024, help="longest T for which rows without packing are measured"
    )
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here; leave it out")
    sizes = [(thinking, answer) for thinking in options.thinking for answer in options.answer]
    megabytes = peaks(options.model, options.device, sizes, options.families, options.rows_up_to)
    model = build_model(options.model, options.device)
    shown = measured(0, 0, options.device)
    columns = ["T", "S", "grpo, s", *shown[1:], "tokens", "tree / tokens", *(f"MB {arm}" for arm in shown)]
    columns.append("MB tree / grpo")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for thinking, answer in track(sizes, "time", console=Console(stderr=True)):
        arms = measured(thinking, options.rows_up_to, options.device)
        steps = {arm: step for arm, step in steps_of(model, thinking, answer, options.families).items() if arm in arms}
        medians = seconds(steps, model, options.turns, CLOCKS[options.clock])
        ratios = {arm: medians[arm] / medians["grpo"] for arm in arms}
        peak = {arm: megabytes[thinking, answer, arm] for arm in arms}
        counted = 1 + CUTS * ANSWERS * (answer + 1) / (PROMPT + thinking)
        cells = [str(thinking), str(answer), f"{medians['grpo']:.2f}"]
        cells += [f"{ratios[arm]:.2f}" if arm in arms else "" for arm in shown[1:]]
        cells += [f"{counted:.2f}", f"{ratios['tree'] / counted:.2f}"]
        cells += [f"{peak[arm]:.0f}" if arm in arms else "" for arm in shown]
        cells += [f"{peak['tree'] / peak['grpo']:.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
