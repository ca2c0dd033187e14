"""A control differs from what it controls in the one thing that it says."""

from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from rltoken.config import check_keys, register_schemas


def composed(exp):
    """The sections of an exp that a method may set, as plain values."""
    register_schemas()
    with initialize_config_module("rltoken.conf", version_base="1.3"):
        cfg = compose("config", overrides=[f"+exp={exp}"])
    check_keys(cfg)
    return {name: OmegaConf.to_container(cfg[name]) for name in ("method", "trainer", "teacher", "reward")}


def test_random_tokens_are_as_many_as_forks_and_divided_alike():
    forks, control = composed("forking_tokens"), composed("forking_tokens/random_tokens")
    stage = control["method"]["weights"].pop("random_tokens")
    assert stage["rho"] == forks["method"]["weights"].pop("forks")["rho"] and stage["normaliser"] == "all"
    assert control == forks


def test_explore_is_thr_with_the_other_sign():
    thr, explore = composed("thr"), composed("thr/explore")
    assert explore["method"]["weights"]["thr"].pop("p") == -thr["method"]["weights"]["thr"].pop("p") == -0.1
    assert explore == thr


def test_asymmetric_has_the_factors_that_thr_gives_where_its_sign_is_that_of_the_response():
    thr, control = composed("thr"), composed("thr/asymmetric")
    p, stage = thr["method"]["weights"].pop("thr")["p"], control["method"]["credits"].pop("signed_advantage")
    assert (stage["positive"], stage["negative"]) == (1 + p, 1 - p)
    assert control == thr


def test_distillation_is_kdrl_without_rewards():
    kdrl, control = composed("kdrl"), composed("kdrl/distillation")
    assert control["trainer"].pop("reward_weights") == [0.0] and kdrl["trainer"].pop("reward_weights") is None
    assert control == kdrl


def test_dapo_is_hapo_without_its_stages():
    hapo, dapo = composed("hapo_entropy"), composed("hapo_entropy/dapo")
    assert not any(dapo.pop("method").values()) and len(hapo.pop("method")["weights"]) == 1
    # HAPO's advantages are standardised by its own stage
    assert (dapo["trainer"].pop("scale_rewards"), hapo["trainer"].pop("scale_rewards")) == ("group", "none")
    assert dapo == hapo
