"""rltoken/accelerate_configs as accelerate itself reads them, and what it would hand to the processes."""

import contextlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from rltoken.errors import UserError
from rltoken.launching import asked, refuse_apart, refuse_split, refuse_unsharded
from rltoken.methods.thr import thr
from rltoken.pipeline import build

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
    assert found.get("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL", "true") == "true", "the final model is written"


def test_several_machines_split_weights_as_one_does():
    one, many = (yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) for name in ("fsdp2", "nodes"))
    assert one["fsdp_config"] == many["fsdp_config"]


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


def test_what_the_trainer_asks_for_counts_as_what_a_launcher_does(tmp_path):
    assert asked({"RANK": "1"}, {"fsdp": None, "deepspeed": None}) == {"RANK": "1"}
    file = tmp_path / "fsdp.json"
    file.write_text('{"fsdp_version": 1}')
    for trainer, on_cpu, told in (
        ({"fsdp": "full_shard"}, True, "accelerate splits no model over CPUs"),
        ({"deepspeed": "zero.json"}, True, "where DeepSpeed was asked for"),
        ({"fsdp": "full_shard", "fsdp_config": {"version": 1}}, False, "set fsdp_version: 2"),
        ({"fsdp": "full_shard", "fsdp_config": str(file)}, False, "set fsdp_version: 2"),
        ({"fsdp": "full_shard", "fsdp_config": {"cpu_ram_efficient_loading": True}}, False, "only the first process"),
    ):
        with pytest.raises(UserError, match=told):
            refuse_unsharded(asked({}, trainer), on_cpu=on_cpu)
    refuse_unsharded(asked({}, {"fsdp": "full_shard"}), on_cpu=False)


def test_processes_that_would_train_apart_are_refused():
    refuse_apart({}, 1)
    refuse_apart({"WORLD_SIZE": "2"}, 2)
    with pytest.raises(UserError, match="2 processes were launched"):
        refuse_apart({"WORLD_SIZE": "2"}, 1)


PORT = ("--main_process_port", "0")


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("zero2", {"pack_tokens": 9216}, r"^rollout\.pack_tokens: DeepSpeed steps after every backward"),
        ("zero3", {"sync_ref_model": True}, r"^trainer\.sync_ref_model: a checkpoint would hold one process's part"),
        ("fsdp2", {"sync_ref_model": True}, r"^trainer\.sync_ref_model: a checkpoint would hold one process's part"),
        ("zero3", {"weights": {"thr": thr}}, r"^method\.weights\.thr: it names 'head', which ZeRO-3 splits"),
        ("zero2", {"weights": {"thr": thr}}, None),
        ("fsdp2", {"weights": {"thr": thr}, "pack_tokens": 9216}, None),
        ("ddp", {"weights": {"thr": thr}, "pack_tokens": 9216, "sync_ref_model": True}, None),
        ("zero3", {"pack_tokens": "auto"}, None),
    ],
)
def test_what_split_weights_cannot_do_is_refused_before_any_are_loaded(name, settings, told):
    args, stages = SimpleNamespace(sync_ref_model=settings.get("sync_ref_model", False)), settings.get("weights", {})
    given = (environment(name, *PORT), args, build({"weights": stages}), settings.get("pack_tokens"))
    with pytest.raises(UserError, match=told) if told else contextlib.nullcontext():
        refuse_split(*given)
