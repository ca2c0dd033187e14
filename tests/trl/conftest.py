"""A random tiny model on disk, a reward with spread, and one way to run any trainer on them."""

import functools

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from rltoken.adapters import attached
from rltoken.pipeline import build
from rltoken.rollout.forced import encode_template
from rltoken.tiny.data import problems
from rltoken.tiny.model import build_model
from rltoken.tiny.tokenizer import build_tokenizer
from rltoken.tiny.world import World
from rltoken.trainer import TokenGRPOTrainer

OPTIONS = (
    "pack_tokens",
    "packing",
    "normaliser",
    "on_change",
    "classes",
    "appended_id",
    "teacher",
    "max_skipped_steps",
)
"""What `run` hands to TokenGRPOTrainer itself."""
WALL_CLOCK = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")


def token_parity(completion_ids, **_):
    """A reward that varies within every group: the share of even token ids."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """(folder of a random tiny model, its tokenizer, a data set)."""
    folder = tmp_path_factory.mktemp("tiny-random")
    tokenizer = build_tokenizer(World())
    build_model(tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder), tokenizer, problems(64, world=World(), seed=0)


def arguments(folder, **changes):
    """Four optimizer steps of 2 prompts x 4 generations."""
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 12,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "temperature": 1.0,
        "beta": 0.0,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
    }
    return GRPOConfig(**settings | changes)


class Run:
    """Weights after training, the logged metrics without wall-clock fields, and the trainer."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.weights = {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}
        self.metrics = [
            {key: value for key, value in entry.items() if key not in WALL_CLOCK} for entry in trainer.state.log_history
        ]

    def distance(self, other):
        """Largest absolute difference of any weight."""
        return max((self.weights[name] - other.weights[name]).abs().max().item() for name in self.weights)


@pytest.fixture
def run(tiny, tmp_path):
    """run(stages=None | {slot: {name: stage}}, lora=False, adapter=None, **GRPOConfig changes) -> Run.

    Without stages plain GRPOTrainer trains; `adapter` is the folder of one to train further, `model` another
    than the tiny one.
    """
    folder, tokenizer, dataset = tiny
    count = iter(range(100))

    def train(stages=None, *, lora=False, adapter=None, reward=token_parity, resume=None, **changes):
        options = {name: changes.pop(name) for name in OPTIONS if name in changes}
        if stages is not None:
            options |= {"pipeline": build(stages), "template": encode_template(tokenizer, think_end="</think>")}
        cls = GRPOTrainer if stages is None else functools.partial(TokenGRPOTrainer, **options)
        source = changes.pop("model", folder)
        eval_dataset, problems = changes.pop("eval_dataset", None), changes.pop("train_dataset", dataset)
        output_dir = changes.pop("output_dir", tmp_path / f"run{next(count)}")
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        trainer = cls(
            model=attached(model, adapter, folder, trainable=True) if adapter else model,
            reward_funcs=reward,
            args=arguments(output_dir, **changes),
            train_dataset=problems,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear") if lora else None,
        )
        forwards = []
        trainer.model.base_model.register_forward_hook(lambda module, args, output: forwards.append(module.training))
        trainer.train(resume_from_checkpoint=resume)
        result = Run(trainer)
        result.forwards = forwards.count(True)
        return result

    return train
