"""A vLLM server that a trainer samples from: the same completions as an engine of its own, clear refusals, failures."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import requests
import torch
from omegaconf import OmegaConf
from torch.distributed.elastic.utils.distributed import get_free_port

from rltoken import trl_vllm_client
from rltoken.errors import SamplerLost, UserError
from rltoken.evals.during import generating
from rltoken.evals.generators import ServerGenerator, TransformersGenerator
from rltoken.evaluate import server_of
from rltoken.methods.hapo_entropy import AdaptiveTemperature
from tests.cli.conftest import TINY
from tests.vllm.conftest import logged
from tests.vllm.servers import ROOT, Served
from tests.vllm.test_evaluation import assert_alike

PATIENCE = 8
CLEAN_STOP = (
    r"stopped by trainer\.vllm_server_base_url: the server at http\S+ .*saved in \S+checkpoint-2; .*resume=auto"
)


def rollouts(trainer):
    """The token ids that every call gave."""
    calls, stock = [], trainer.sample

    def sample(*args, **options):
        calls.append(stock(*args, **options)[0])
        return calls[-1], None

    trainer.sample = sample
    prompts = trainer.tokenize([trainer.train_dataset[i] for i in (0, 0, 1, 1)])
    sample(prompts, num_generations=2)
    trainer.extend(prompts, max_new_tokens=3)
    sample(prompts)
    return calls


def test_an_engine_and_a_server_sample_the_same(make, server):
    ours, theirs = rollouts(make()), rollouts(make(server=server))
    assert ours == theirs and len({tuple(ids) for call in ours for ids in call}) == 8, "and every row its own"


def test_the_dtype_and_the_weights_that_are_served_are_known(make, server):
    client = make(server=server).vllm_generation.vllm_client
    assert str(client.served_dtype()) == "torch.float32"
    assert {"layer 0", "layer 1"} <= client.served_weights().keys()


def test_a_server_that_cannot_tell_is_used_with_a_warning(make, server, monkeypatch, caplog):
    monkeypatch.setattr(trl_vllm_client.vllm_worker, "METHOD", "unknown_method")
    trainer = make(server=server, max_steps=1)
    trainer.train()
    assert "cannot be compared" in caplog.text and max(logged(trainer, "sampling/sampling_logp_difference/max")) < 1e-3


def test_no_server(make, monkeypatch):
    nobody = type("Nobody", (), {"url": f"http://127.0.0.1:{get_free_port()}"})
    with pytest.raises(UserError, match=r"trainer\.vllm_server_base_url: no vLLM server answers .*rltoken\.serve"):
        make(server=nobody)


def test_a_server_for_a_gpu(make, server, monkeypatch):
    monkeypatch.setattr(
        trl_vllm_client.Client, "get_server_info", lambda self: {"weight_transfer_config": {"backend": "nccl"}}
    )
    with pytest.raises(UserError, match="not started to take weights from a trainer on a CPU"):
        make(server=server)


def test_a_prompt_that_does_not_fit_ends_the_run_at_once(make, server):
    with pytest.raises(UserError, match="refuses a request") as refused:
        make(server=server, max_completion_length=100_000).train()
    assert not isinstance(refused.value, SamplerLost)


def test_a_server_that_was_started_anew_in_a_window(make, server, tiny, monkeypatch):
    trainer = make(server=server)
    client, stock = trainer.vllm_generation.vllm_client, trl_vllm_client.complete
    first_weights = {"update_info": {"path": f"{tiny[0]}/model.safetensors"}}

    def restarted(*args, **options):
        choices, _ = stock(*args, **options)
        with client.weight_update():
            client.session.post(f"{client.base_url}/update_weights", json=first_weights).raise_for_status()
        return choices, True

    monkeypatch.setattr(trl_vllm_client, "complete", restarted)
    with pytest.raises(SamplerLost, match="started anew in a window"):
        trainer.train()
    assert trainer.state.global_step == 1, "the first window's weights are those that a server begins with"


def test_a_server_that_is_lost_while_it_takes_weights(make, server, monkeypatch):
    trainer = make(server=server)
    stock = trl_vllm_client.Client._send_file

    def lost(self, named_params):
        if trainer.state.global_step == 1:
            next(named_params)
            raise requests.ConnectionError("reset by peer")
        stock(self, named_params)

    monkeypatch.setattr(trl_vllm_client.Client, "_send_file", lost)
    with pytest.raises(SamplerLost, match=r"do not reach the server .*\(ConnectionError: reset by peer\)"):
        trainer.train()


def test_an_evaluation_through_a_server_gives_what_transformers_gives(make, server):
    trainer = make(server=server, max_steps=2)
    trainer.train()
    prompts = trainer.tokenize([trainer.train_dataset[i] for i in range(16)])
    with generating(trainer, SimpleNamespace(temperature=0.0, top_p=1.0, batch_size=16)) as theirs:
        assert isinstance(theirs, ServerGenerator)
        ours = TransformersGenerator(trainer.model, trainer.processing_class, temperature=0.0, batch_size=16)
        assert theirs.ends == ours.ends
        found, expected = (one.complete(prompts, 24, (), range(16)) for one in (theirs, ours))
        rows = [[*ids, 2] for ids in expected]
        scored, known = (one.logps(prompts, rows, 1.0) for one in (theirs, ours))
    assert_alike(trainer.model, prompts, expected, found)
    for ids, one, other in zip(rows, scored, known, strict=True):
        assert len(one) == len(ids) and one == pytest.approx(other, abs=1e-4)


def test_a_server_of_another_model_is_no_back_end_of_an_evaluation(server, tmp_path):
    trainer = OmegaConf.create({"vllm_server_base_url": server.url})
    with pytest.raises(UserError, match=rf"at {server.url} serves .*tiny-random.*, and not {tmp_path}; start"):
        server_of(trainer, str(tmp_path))
    nobody = OmegaConf.create({"vllm_server_base_url": f"http://127.0.0.1:{get_free_port()}"})
    with pytest.raises(UserError, match=r"no vLLM server answers .*rltoken\.serve model=hf model\.path="):
        server_of(nobody, str(tmp_path))


def test_a_server_for_another_method_changes_no_logits(make, server):
    with pytest.raises(UserError, match="started for a method that changes no logits"):
        make({"controls": {"hapo": AdaptiveTemperature()}}, server=server)


@pytest.mark.slow
def test_a_server_changes_logits_as_an_engine_does(make, tiny, tmp_path):
    model = ["model=hf", f"model.path={tiny[0]}", "model.dtype=float32", "+exp=hapo_entropy"]
    served = Served(tmp_path / "log.txt", *model).wait()
    found = []
    try:
        for server in (served, None):
            trainer = make({"controls": {"hapo": AdaptiveTemperature()}}, server=server, max_steps=3)
            trainer.train()
            found.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
            assert max(logged(trainer, "sampling/sampling_logp_difference/max")) < 1e-3
            assert logged(trainer, "control/logits/below")[-1] != 0
            trainer.close()
    finally:
        served.kill()
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-4) for name in found[0])


def run(cwd, cache, *arguments):
    """`rltoken.train` in a process of its own that can be asked for its output."""
    return subprocess.Popen(
        [sys.executable, "-m", "rltoken.train", "+exp=brpo", *itertools.chain(*TINY.values()), "trainer.max_steps=4",
         "name=run", f"rollout.patience={PATIENCE}", *arguments],
        cwd=cwd, env=os.environ | {"RLTOKEN_CACHE": str(cache), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("number", "save_steps"),
    [
        pytest.param(signal.SIGKILL, 100, id="killed"),
        pytest.param(signal.SIGSTOP, 1, id="stalled", marks=pytest.mark.slow),
    ],
)
def test_a_server_lost_in_the_middle_of_a_window(cache, tmp_path, number, save_steps):
    """The stage of tests/vllm/killing.py loses it in the third window, between thinking and more tokens."""
    served = Served(tmp_path / "log.txt", *TINY["model="], RLTOKEN_CACHE=str(cache)).wait()
    settings = [
        *served.overrides, f"trainer.save_steps={save_steps}",
        "+method.rows.killing._target_=tests.vllm.killing.Killing",
        f"+method.rows.killing.group={served.process.pid}", f"+method.rows.killing.number={int(number)}",
    ]  # fmt: skip
    try:
        left = run(tmp_path, cache, *settings)
        _, err = left.communicate(timeout=500)
        lost = float((tmp_path / "killed_at").read_text())
        assert left.returncode == 75 and "Traceback" not in err, err
        assert re.search(CLEAN_STOP, err.replace("\n", " ")), err
        assert PATIENCE <= time.time() - lost < 3 * PATIENCE + 30, "the stop, with what it takes to end a process"
        if number == signal.SIGSTOP:
            served.send(signal.SIGCONT)
        else:
            served.kill()
            served = Served(tmp_path / "log.txt", *TINY["model="], port=served.port, RLTOKEN_CACHE=str(cache)).wait()
        again = run(tmp_path, cache, *settings, "resume=auto")
        _, err = again.communicate(timeout=500)
        assert again.returncode == 0, err
    finally:
        served.kill()
    lines = [json.loads(line) for line in (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert max(line["sampling/sampling_logp_difference/max"] for line in lines) < 1e-3
