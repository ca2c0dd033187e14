"""With a vocabulary of 150 000 no exp makes the logits of all tokens, and THR needs hardly more memory than GRPO."""

import functools
import weakref
from pathlib import Path

import pytest
import torch
import trl.trainer.utils
from hydra import compose, initialize_config_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

from rltoken import config
from rltoken.tiny.model import model_config
from rltoken.train import checked
from rltoken.types import Template
from tests.trl.teachers import a_teacher
from tests.trl.two_ranks import APPENDED, ReplayedWithEnds, reward

CONF = Path(__file__).resolve().parents[2] / "conf/exp"
EXPS = sorted(str(path.relative_to(CONF))[:-5] for path in CONF.glob("**/*.yaml") if path.parent.name != "paper")
VOCABULARY, ROWS, LONGEST = 150_000, 16, 8
TILE = trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE
"""Columns of the vocabulary that TRL's head takes at a time, on a CPU of all tokens of a forward, prompts too."""
FAST = ("gtpo_entropy", "kdrl", "kl_cov", "laser_self_reward", "spine/reference_band", "thr")
"""Together they name every signal that a forward makes; all others are slow."""
SETTINGS = (
    f"trainer.per_device_train_batch_size={ROWS}",
    "trainer.num_generations=4",
    f"trainer.max_completion_length={LONGEST}",
    f"rollout.max_thinking_tokens={LONGEST}",
    "trainer.num_iterations=2",  # the old-log-prob pass is made by TRL
    "trainer.max_steps=1",
    "trainer.optim=sgd",
    "trainer.save_strategy=no",
)


class Allocated(TorchDispatchMode):
    """Keeps the elements of the largest tensor other than TRL's tiles, and the most bytes that lived at once."""

    def __init__(self):
        super().__init__()
        self.largest, self.peak, self._living, self._seen = 0, 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                if TILE not in value.shape:
                    self.largest = max(self.largest, value.numel())
                self._lives(value.untyped_storage())
        return result

    def _lives(self, storage):
        if storage not in self._seen:
            size = storage.nbytes()
            self._seen.add(storage)
            self._living += size
            self.peak = max(self.peak, self._living)
            weakref.finalize(storage, self._dies, size)

    def _dies(self, size):
        self._living -= size


@pytest.fixture(scope="module")
def wide(tiny, tmp_path_factory):
    """The folder of a random model with a large vocabulary and hardly anything else."""
    folder, shape = tmp_path_factory.mktemp("wide"), model_config(tiny[1])
    shape.update({"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16})
    Qwen3ForCausalLM(shape).save_pretrained(folder)
    return str(folder)


def method(overrides, folder):
    """The pipeline and TRL's arguments."""
    config.register_schemas()
    with initialize_config_module("rltoken.conf", version_base="1.3"):
        cfg = compose("config", overrides=[*overrides, *SETTINGS])
    return checked(cfg, folder)[:2]


@pytest.fixture(scope="module")
def allocated(tiny, wide, tmp_path_factory):
    """allocated(*overrides) -> what a window of replayed rollouts and one step on it allocate."""

    @functools.cache
    def train(*overrides):
        pipeline, args = method(overrides, tmp_path_factory.mktemp("run"))
        trainer = ReplayedWithEnds(
            model=AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float32),
            reward_funcs=reward,
            args=args,
            train_dataset=tiny[2],
            processing_class=tiny[1],
            pipeline=pipeline,
            template=Template(think_end_id=7, cut=(7,)),
            classes=lambda texts, group: [len(text.split()) % 4 - 1 for text in texts],
            pack_tokens="auto",  # as configured: the rows that BRPO adds come in packs
            appended_id=APPENDED,
            teacher=a_teacher(wide),
        )
        with Allocated() as found:
            trainer.train()
        return found

    return train


@pytest.fixture(scope="module")
def plain(allocated):
    """What plain GRPO allocates."""
    return allocated("+exp=grpo")


@pytest.mark.parametrize("exp", [exp if exp in FAST else pytest.param(exp, marks=pytest.mark.slow) for exp in EXPS])
def test_no_method_makes_the_logits_of_all_tokens(allocated, plain, exp):
    assert allocated(f"+exp={exp}").largest <= most(plain)


def most(plain):
    """The elements that the largest tensor may have: those of plain GRPO's, or of THR's default."""
    limit = max(plain.largest, 2**24)
    assert limit < ROWS * LONGEST * VOCABULARY
    return limit


def of_all_tokens(old_hidden, head):
    """A weight that makes all logits, which the tests are to notice."""
    logits = head.logits(old_hidden.flatten(0, 1), torch.arange(VOCABULARY))
    return logits.exp().sum(1).view(old_hidden.shape[:2]) * 0 + 1


def test_the_logits_of_all_tokens_would_be_noticed(allocated, plain):
    stage = "{_target_: tests.trl.test_allocation.of_all_tokens, _partial_: true}"
    assert allocated("+exp=grpo", f"+method.weights.mine={stage}").largest > most(plain)


@pytest.mark.parametrize("exp", ["thr", "nthr"])
def test_thr_needs_hardly_more_memory_than_grpo(allocated, plain, exp):
    assert allocated(f"+exp={exp}").peak <= 1.10 * plain.peak
