"""The embedded world from configuration: one place for its knobs."""

from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from rltoken.tiny import World

CONF = Path(__file__).resolve().parents[2] / "conf"


@pytest.fixture
def config():
    return OmegaConf.create(
        {group: OmegaConf.load(CONF / group / "tiny.yaml") for group in ("world", "model", "data", "reward")}
    )


def test_the_default_configuration_is_the_default_world(config):
    assert instantiate(config.world) == World()


@pytest.mark.parametrize("name", ["shortcut", "formats", "label_free", "tagged"])
def test_variants_only_change_knobs_of_the_world(config, name):
    variant = OmegaConf.load(CONF / "world" / f"{name}.yaml")
    assert variant.pop("defaults") == ["tiny", "_self_"]
    assert instantiate(OmegaConf.merge(config.world, variant)) != World()


def test_a_knob_reaches_model_and_data_from_one_place(config, tmp_path):
    config.world.max_operations = 3
    config.world.styles = [0.1, 0.2]
    config.model.source.steps = 0
    config.model.source.cache_dir = str(tmp_path)
    folder = Path(instantiate(config.model.source))
    recipe = OmegaConf.load(folder / "recipe.json")
    assert recipe.world.max_operations == 3
    assert list(recipe.world.styles) == [0.1, 0.2]
    assert set(instantiate(config.data.train)["level"]) == {2, 3}
    assert len(instantiate(config.data.eval)) == config.data.eval.n


def test_the_reward_configuration_gives_reward_functions(config):
    reward = instantiate(config.reward)
    text = "so 3 </think> 3"
    assert reward.funcs.accuracy(completions=[text], answer=["3"]) == [1.0]
    assert reward.classes([text, "3", "so 4 </think> 4", "</think> 3"], [0, 0, 0, 1]) == [0, -1, 1, 0]
