"""With an empty pipeline, and with stages that change nothing, training is GRPOTrainer's bit for bit."""

import pytest

SETTINGS = {
    "default": {},
    "num_iterations": {"num_iterations": 2},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "beta": {"beta": 0.04},
    "steps_per_generation": {"steps_per_generation": 4, "per_device_train_batch_size": 4},
    "gradient_checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", SETTINGS)
def test_empty_pipeline_is_grpo(run, name, lora):
    stock, ours = run(lora=lora, **SETTINGS[name]), run({}, lora=lora, **SETTINGS[name])
    assert stock.distance(ours) == 0.0
    for expected, found in zip(stock.metrics, ours.metrics, strict=True):
        assert expected == {key: found[key] for key in expected}
    assert len(stock.metrics) >= 4


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", SETTINGS)
def test_stages_of_every_slot_that_change_nothing(run, name, lora):
    stages = {
        "prompts": {"same": lambda inputs: inputs},
        "controls": {"none": lambda progress: {}},
        "rows": {"same": lambda rollout, sampler: rollout},
        "shapes": {"same": lambda rewards: rewards},
        "credits": {"same": lambda advantages: advantages},
        "bounds": {"same": lambda eps_low, eps_high: (eps_low, eps_high)},
        "weights": {"one": lambda mask: mask * 0 + 1.0, "live": lambda entropy: entropy * 0 + 1.0},
        "ratios": {"same": lambda logps, old_logps: old_logps},
        "aux": {"zero": lambda logps: logps * 0},
    }
    stock, ours = run(lora=lora, **SETTINGS[name]), run(stages, lora=lora, **SETTINGS[name])
    assert stock.distance(ours) == 0.0
