"""What holds of the configuration of every shape, and of two forms of one reward."""

from pathlib import Path

import pytest
from trl import GRPOConfig

from rltoken.combinations import check
from rltoken.errors import UserError
from rltoken.pipeline import build
from tests.methods.configured import built

CONF = Path(__file__).resolve().parents[2] / "conf"
SHAPES = sorted(path.stem for path in CONF.glob("shape/*.yaml"))
BLOCKS = [("shape", "shapes", name) for name in SHAPES] + [("prompt", "prompts", name) for name in ("l1", "tldr_style")]


@pytest.mark.parametrize(("group", "slot", "name"), BLOCKS)
def test_every_configuration_builds(group, slot, name):
    (stage,) = built(f"+{group}={name}")[slot]
    assert stage.key == f"method.{slot}.{name}" and not stage.live
    first, second, *_ = (CONF / group / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert first == f"# @package method.{slot}.{name}" and second.startswith("# ")


FORMS = [("laser_d", "laser_de"), ("laser_de", "laser_d"), ("laser", "laser_d"), ("l1_exact", "l1_max")]


@pytest.mark.parametrize(("first", "second"), FORMS)
def test_two_forms_of_one_length_reward_are_refused_by_name(first, second):
    args = GRPOConfig(output_dir="unused", bf16=False, use_cpu=True, report_to="none")
    pipeline = built(f"+shape=[{first},{second}]")
    message = rf"method\.shapes\.{second}: it is another form of method\.shapes\.{first}, .*leave one of them out"
    with pytest.raises(UserError, match=message):
        check(pipeline, args)
    check(built(f"+shape=[{first},kimi_length]"), args)


def test_two_shapes_of_a_users_own_file_are_not_forms_of_one_reward():
    args = GRPOConfig(output_dir="unused", bf16=False, use_cpu=True, report_to="none")
    pipeline = build({"shapes": {"one": lambda rewards: rewards, "two": lambda rewards: rewards}})
    check(pipeline, args)
    assert [stage.key for stage in pipeline["shapes"]] == ["method.shapes.one", "method.shapes.two"]
