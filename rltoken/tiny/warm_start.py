"""The warm start of the embedded world: supervised training on noisy traces, cached on disk.

Reinforcement learning needs a model that is right often but not always. It comes from training to the end on traces
that are themselves wrong now and then: stopping early instead gives a model that has not understood the world, because
accuracy jumps from chance to its final value within a few hundred steps.

The first steps see single facts only, problems of one operation in one pass. They are a fifth as long, and without them
whether a model of this size gets past chance in the time depends on the seed.
"""

import contextlib
import hashlib
import json
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from filelock import FileLock
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM

from rltoken.errors import UserError
from rltoken.tiny.model import build_model, model_config
from rltoken.tiny.tokenizer import build_tokenizer
from rltoken.tiny.world import Trace, World, problem, split_of, trace

STEPS = 1100

_FACTS_SHARE = 0.2  # of the steps
_BATCH = 32
_BUCKETS = 20  # batches that are drawn, sorted by length and shuffled together
_LEARNING_RATE = 3e-3
_BETAS = (0.9, 0.98)
_WARMUP = 30
_FINAL_SHARE = 0.05
_CLIP = 1.0


def warm_start(
    *, world: World | None = None, seed: int = 0, steps: int = STEPS, cache_dir: str | os.PathLike | None = None
) -> str:
    """Train the tiny model on a world's traces, or find it in the cache.

    Training uses one thread, problems of the train split only, and generators of its own: the global ones and the
    number of torch threads are left as they were. Two processes may ask for the same model at once: one trains, the
    other waits.

    Args:
        world: The knobs; the default world where None.
        seed: Of the weights and of the traces. On one machine the same arguments give the same weights.
        steps: Optimizer steps of 32 traces.
        cache_dir: Where the folder `tiny` is kept, which holds one folder a model, named by a hash of everything that
            shapes it; by default the environment variable `RLTOKEN_CACHE`, or `~/.cache/rltoken`.

    Returns:
        A folder that `AutoModelForCausalLM` and `AutoTokenizer` load.

    Raises:
        UserError: `steps` is negative.
    """
    if steps < 0:
        raise UserError(f"model.source.steps: {steps} is negative. Set it to {STEPS}, the full warm start.")
    world = world or World()
    tokenizer = build_tokenizer(world)
    recipe = describe(world, tokenizer, seed=seed, steps=steps)
    folder = _cache_root(cache_dir) / cache_key(recipe)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            with _one_thread():
                model = train(world, tokenizer, seed=seed, steps=steps)
            _publish(folder, model, tokenizer, recipe)
    return str(folder)


def describe(world: World, tokenizer: PreTrainedTokenizerBase, *, seed: int, steps: int) -> dict:
    """Everything that shapes a warm start, as JSON values: knobs, model, tokenizer, this package's source, versions."""
    source = {path.name: path.read_text() for path in sorted(Path(__file__).parent.glob("*.py"))}
    return {
        "world": asdict(world),
        "seed": seed,
        "steps": steps,
        "model": model_config(tokenizer).to_dict(),
        "tokenizer": json.loads(tokenizer.backend_tokenizer.to_str()),
        "chat_template": tokenizer.chat_template,
        "source": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in source.items()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def cache_key(recipe: dict) -> str:
    """A short hash of a recipe of `describe`."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def train(world: World, tokenizer: PreTrainedTokenizerBase, *, seed: int, steps: int) -> Qwen3ForCausalLM:
    """Supervised training of a fresh model, without cache and on as many threads as torch has.

    Args:
        world: Where problems and traces come from.
        tokenizer: Of that world.
        seed: Of the weights and of the traces.
        steps: Optimizer steps.

    Returns:
        The model, in evaluation mode.
    """
    model = build_model(tokenizer, seed=seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, betas=_BETAS, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    facts = batches(random.Random(f"{seed}/facts"), single_facts(world), tokenizer)
    rows = batches(random.Random(f"{seed}/warm start"), world, tokenizer)
    # Into a log file a bar goes as one line every ten seconds.
    interval = 0.1 if sys.stderr.isatty() else 10.0
    bar = tqdm(range(steps), desc="warm start of the tiny model", unit="step", mininterval=interval)
    for step in bar:
        ids, mask = next(facts if step < _FACTS_SHARE * steps else rows)
        loss = _loss(model, ids, mask)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval()


def single_facts(world: World) -> World:
    """The same world with one operation and one pass, nothing around them, and a quarter of its noise."""
    noise = {"noise": world.noise / 4, "styles": tuple(style / 4 for style in world.styles)}
    plain = dict.fromkeys(("plan", "hesitation", "verbosity", "cut", "last", "shortcut"), 0.0)
    return replace(world, min_operations=1, max_operations=1, single=1.0, **plain, **noise)


def batches(
    rng: random.Random, world: World, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of similar lengths: ids and loss mask, [B,T], padded on the right."""
    ids = tokenizer.get_vocab()
    while True:
        traces = [_training_trace(rng, world) for _ in range(_BATCH * _BUCKETS)]
        traces.sort(key=lambda row: len(row.tokens))
        starts = list(range(0, len(traces), _BATCH))
        rng.shuffle(starts)
        for start in starts:
            rows = traces[start : start + _BATCH]
            tokens = [torch.tensor([ids[word] for word in row.tokens]) for row in rows]
            masks = [torch.tensor(row.loss_mask) for row in rows]
            yield _pad(tokens, tokenizer.pad_token_id), _pad(masks, 0)


def _training_trace(rng: random.Random, world: World) -> Trace:
    while True:
        drawn = problem(rng, world)
        if split_of(drawn.prompt) == "train":
            return trace(rng, drawn, world)


def _pad(rows: list[torch.Tensor], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def _loss(model: Qwen3ForCausalLM, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean negative log-probability of the tokens of `mask`, [B,T]. Padding is on the right, so causality hides it."""
    logits = model(ids[:, :-1], use_cache=False).logits
    chosen = mask[:, 1:].bool()
    return F.cross_entropy(logits[chosen], ids[:, 1:][chosen])


def _rate(step: int, steps: int) -> float:
    """Linear warm-up, constant to the middle, then linear decay."""
    decay = max(0.0, 2 * step / max(steps, 1) - 1)
    return min(1.0, (step + 1) / _WARMUP) * (1 - (1 - _FINAL_SHARE) * decay)


def _publish(folder: Path, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, recipe: dict) -> None:
    """Write beside the folder, then rename: a folder that exists is complete, whatever kills this process."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        staged = Path(scratch) / folder.name
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        (staged / "recipe.json").write_text(json.dumps(recipe, indent=2))
        staged.rename(folder)


def _cache_root(cache_dir: str | os.PathLike | None) -> Path:
    chosen = cache_dir or os.environ.get("RLTOKEN_CACHE") or "~/.cache/rltoken"
    return Path(chosen).expanduser().resolve() / "tiny"


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """One thread: reductions in a fixed order, and no fight with a neighbour, which can cost a factor of ten."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
