"""rltoken/accelerate_configs as accelerate itself reads them, and what it would hand to the processes."""

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from rltoken.errors import UserError
from rltoken.launching import refuse_apart, refuse_unsharded

CONFIGS = Path(__file__).resolve().parents[2] / "rltoken" / "accelerate_configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
KINDS = {
    "one_gpu": "NO",
    "ddp": "MULTI_GPU",
    "fsdp2": "FSDP",
    "zero2": "DEEPSPEED",
    "zero3": "DEEPSPEED",
    "nodes": "FSDP",
}


def environment(name, *options):
    """What `accelerate launch` adds to the environment of a process, and has in it, for a shipped configuration."""
    command = ["--config_file", str(CONFIGS / f"{name}.yaml"), *options, "-m", "rltoken.train", "+exp=brpo"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        return prepare_deepspeed_cmd_env(args)[1]
    if args.use_fsdp or args.multi_gpu:
        return prepare_multi_gpu_env(args)
    return prepare_simple_launcher_cmd_env(args)[1]


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_reads_it(name):
    """An unknown key is refused by the loader; the precision is left to the run."""
    found = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert isinstance(found, ClusterConfig) and found.distributed_type.value == KINDS[name]
    assert found.mixed_precision == "no" and not found.use_cpu
    known = {action.dest for action in launch_command_parser()._actions}
    for part in ("fsdp_config", "deepspeed_config"):
        assert set(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()).get(part, {})) <= known


@pytest.mark.parametrize("name", ["one_gpu", "ddp", "fsdp2", "nodes"])
def test_what_the_processes_are_told(name):
    options = ["--machine_rank", "1", "--main_process_ip", "host"] if name == "nodes" else ["--main_process_port", "0"]
    found = environment(name, *options)
    refuse_unsharded(found, on_cpu=False)
    assert (found.get("ACCELERATE_USE_FSDP") == "true") == (KINDS[name] == "FSDP")
    if KINDS[name] == "FSDP":
        assert (found["FSDP_VERSION"], found["FSDP_STATE_DICT_TYPE"]) == ("2", "FULL_STATE_DICT")


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_what_deepspeed_is_told(name):
    found = environment(name, "--main_process_port", "0")
    refuse_unsharded(found, on_cpu=False)
    assert found["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert found["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == name[-1]
    assert found["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "auto"
    assert found["ACCELERATE_GRADIENT_CLIPPING"] == "auto"


def test_sharding_on_cpus_is_refused_since_accelerate_would_not_shard():
    for name in ("fsdp2", "zero3"):
        with pytest.raises(UserError, match=r"^trainer\.use_cpu: accelerate splits no model over CPUs"):
            refuse_unsharded(environment(name, "--main_process_port", "0"), on_cpu=True)
    refuse_unsharded(environment("ddp", "--main_process_port", "0"), on_cpu=True)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"FSDP_VERSION": "1"}, "set fsdp_version: 2"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "only the first process loads weights"),
    ],
)
def test_other_forms_of_fsdp_are_refused(changed, told):
    with pytest.raises(UserError, match=told):
        refuse_unsharded(environment("fsdp2", "--main_process_port", "0") | changed, on_cpu=False)


def test_processes_that_would_train_apart_are_refused():
    refuse_apart({}, 1)
    refuse_apart({"WORLD_SIZE": "2"}, 2)
    with pytest.raises(UserError, match="2 processes were launched"):
        refuse_apart({"WORLD_SIZE": "2"}, 1)
