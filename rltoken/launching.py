"""What launchers hand to the processes of a run: `accelerate launch`, `torchrun`, and submitit in a SLURM job.

They speak through the environment. accelerate falls back in silence where it cannot do what that asks for: sharded
training on CPUs becomes DDP, and processes without a GPU that are not told to use the CPU train each for itself.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rltoken import runs
from rltoken.errors import UserError
from rltoken.preemption import Preempted, submitit_signal

FSDP, DEEPSPEED = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"
"""Set to 'true' by `accelerate launch` for a configuration of that kind."""
ZERO_STAGE = "ACCELERATE_DEEPSPEED_ZERO_STAGE"
NO_PACKS = "rollout.pack_tokens: DeepSpeed steps after every backward, so packs cannot be; set it to null."
NO_FOLLOWING = (
    "trainer.sync_ref_model: a checkpoint would hold one process's part of a reference that follows the policy; set it "
    "to false, or launch with ddp.yaml or zero2.yaml."
)


def asked(environment: Mapping[str, str], trainer: Mapping[str, Any]) -> dict[str, str]:
    """The environment as a launcher would leave it that asks for what `trainer.fsdp` and `trainer.deepspeed` do.

    Args:
        environment: of the process.
        trainer: the section of the configuration.
    """
    found = dict(environment)
    if trainer.get("deepspeed"):
        found[DEEPSPEED] = "true"
    if trainer.get("fsdp"):
        given = trainer.get("fsdp_config") or {}
        if isinstance(given, str):
            with contextlib.suppress(OSError, ValueError):  # told by transformers, which reads it too
                given = json.loads(Path(given).read_text(encoding="utf-8"))
        given = {key.removeprefix("fsdp_"): value for key, value in given.items()} if isinstance(given, Mapping) else {}
        loading = str(given.get("cpu_ram_efficient_loading", False)).lower()
        found |= {FSDP: "true", "FSDP_VERSION": str(given.get("version", 2)), "FSDP_CPU_RAM_EFFICIENT_LOADING": loading}
    return found


def refuse_unsharded(environment: Mapping[str, str], *, on_cpu: bool) -> None:
    """Refuse sharding that would not come about, or not as rltoken needs it.

    Args:
        environment: of the process.
        on_cpu: whether `trainer.use_cpu` is set.

    Raises:
        UserError: FSDP or DeepSpeed on CPUs, FSDP of the first version, or weights that one rank alone would load.
    """
    kind = next((name for name in (FSDP, DEEPSPEED) if environment.get(name) == "true"), None)
    if kind is None:
        return
    if on_cpu:
        raise UserError(
            f"trainer.use_cpu: accelerate splits no model over CPUs, and would train by DDP where "
            f"{'FSDP' if kind == FSDP else 'DeepSpeed'} was asked for; launch with ddp.yaml, or set hardware=gpu."
        )
    if kind == FSDP and environment.get("FSDP_VERSION", "1") != "2":
        raise UserError("accelerate: FSDP of version 1 is not supported; set fsdp_version: 2, as fsdp2.yaml does.")
    if kind == FSDP and environment.get("FSDP_CPU_RAM_EFFICIENT_LOADING") == "true":
        raise UserError(
            "accelerate: with fsdp_cpu_ram_efficient_loading only the first process loads weights, so that the others "
            "would have none for a reference, a teacher and the evaluation before training; set it to false."
        )


def refuse_split(environment: Mapping[str, str], args: Any, pipeline: Any, pack_tokens: int | str | None) -> None:
    """Refuse what cannot be done with weights in parts, or under DeepSpeed, before they are loaded.

    The trainer looks again: a DeepSpeed file of the user's own says its stage to DeepSpeed alone.

    Args:
        environment: of the process.
        args: TRL's arguments.
        pipeline: the stages.
        pack_tokens: `rollout.pack_tokens`.

    Raises:
        UserError: names the key, the reason and the fix.
    """
    deepspeed = environment.get(DEEPSPEED) == "true"
    zero3 = deepspeed and environment.get(ZERO_STAGE) == "3"
    if deepspeed and pack_tokens not in (None, "auto"):
        raise UserError(NO_PACKS)
    if args.sync_ref_model and (zero3 or environment.get(FSDP) == "true"):
        raise UserError(NO_FOLLOWING)
    if zero3 and (reading := pipeline.naming("head")):
        raise UserError(
            f"{reading[0].key}: it names 'head', which ZeRO-3 splits over ranks; leave the stage out, or launch with "
            "fsdp2.yaml or zero2.yaml."
        )


def refuse_apart(environment: Mapping[str, str], processes: int) -> None:
    """Refuse processes that were launched together and would train apart, in one run directory.

    Args:
        environment: of the process.
        processes: how many train together.

    Raises:
        UserError: they are fewer than were launched.
    """
    launched = int(environment.get("WORLD_SIZE", "1"))
    if processes != launched:
        raise UserError(
            f"trainer.use_cpu: {launched} processes were launched, and without a GPU for each of them they would train "
            f"in groups of {processes}; set hardware=cpu, or launch as many as there are GPUs."
        )


@contextlib.contextmanager
def slurm_job() -> Iterator[bool]:
    """One job of submitit inside the context: its tasks are the ranks of one run; told to leave, it is queued again.

    Yields:
        Whether it is such a job, which may have begun before; anywhere else nothing happens.
    """
    number = submitit_signal()
    if number is None:
        yield False
        return
    _join_tasks()
    try:
        yield True
    except Preempted as told:
        if runs.is_main_process():
            print(told, file=sys.stderr)
        signal.raise_signal(number)  # submitit queues the job again at this signal, which was the run's until now


def _join_tasks() -> None:
    """Tell torch which rank this task is, as torchrun would."""
    from submitit import JobEnvironment
    from submitit.helpers import TorchDistributedEnvironment

    if JobEnvironment().num_tasks > 1:
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
