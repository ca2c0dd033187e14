"""Changes of logits by request, in a real engine: each request has its own, the others are as if there were none."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from rltoken.errors import UserError
from rltoken.methods.hapo_entropy import AdaptiveTemperature, tempered
from rltoken.rollout import logits as changes
from rltoken.rollout import vllm_cpu
from tests.vllm.conftest import logged
from tests.vllm.test_sampling import recorded


def tempering(below):
    """A change that makes the tokens of a random model, of nearly 4 nats each, colder or, with below < 0, hotter."""
    settings = {"temperature": 1.0, "tau": 0.3, "pivot": math.log(4.5), "above": 0.05, "limit": None}
    return functools.partial(tempered, below=below, **settings)


CHANGES = (None, tempering(0.05), tempering(-0.05))


@pytest.fixture(scope="module")
def engine(tiny):
    """An engine of four places that gives the log-probabilities of the changed distribution, and its model."""
    folder, tokenizer, dataset = tiny
    options = {"max_num_seqs": 4, "max_model_len": 256, "gpu_memory_utilization": 0.3, "seed": 0}
    llm = vllm_cpu.engine(
        torch.float32, model=folder, **options | changes.ENGINE | {"logprobs_mode": "processed_logprobs"}
    )
    prompts = [tokenizer.apply_chat_template(dataset[i]["prompt"], add_generation_prompt=True) for i in range(12)]
    prompts = [prompt if isinstance(prompt, list) else prompt["input_ids"] for prompt in prompts]
    yield llm, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), prompts
    llm.llm_engine.engine_core.shutdown()


def generate(llm, prompts, asked, lengths):
    """(tokens, log-probabilities) of each prompt, sampled with its own seed, change (or None) and number of tokens."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            max_tokens=length,
            ignore_eos=True,
            logprobs=0,
            seed=i,
            extra_args=None if change is None else {changes.REQUEST_KEY: changes.told(change)},
        )
        for i, (change, length) in enumerate(zip(asked, lengths, strict=True))
    ]
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    found = [output.outputs[0] for output in outputs]
    return [
        (list(one.token_ids), [step[token].logprob for step, token in zip(one.logprobs, one.token_ids, strict=True)])
        for one in found
    ]


def expected(model, prompt, ids, change):
    """Log-probabilities of a completion by transformers, each under the changed distribution."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].float()
    logits = logits if change is None else change(logits)
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


def test_each_request_is_sampled_as_it_asks_though_requests_come_go_and_move(engine):
    """Twelve requests of different lengths on four places, as transformers would sample them."""
    llm, model, prompts = engine
    asked = [CHANGES[i % 3] for i in range(12)]
    lengths = [3 + 5 * i % 17 for i in range(12)]
    for prompt, change, length, (ids, logps) in zip(
        prompts, asked, lengths, generate(llm, prompts, asked, lengths), strict=True
    ):
        assert len(ids) == length
        own = expected(model, prompt, ids, change)
        torch.testing.assert_close(torch.tensor(logps), own, atol=1e-4, rtol=0)
        for other in CHANGES:
            if other is not change:
                assert (own - expected(model, prompt, ids, other)).abs().max() > 2e-3


def test_requests_that_ask_for_nothing_are_untouched_bit_for_bit(engine):
    llm, _, prompts = engine
    lengths = [6, 6, 9, 9]
    plain = generate(llm, prompts[:4], [None] * 4, lengths)
    mixed = generate(llm, prompts[:4], [None, CHANGES[1], None, CHANGES[2]], lengths)
    assert [mixed[i] for i in (0, 2)] == [plain[i] for i in (0, 2)]
    assert all(mixed[i][1] != plain[i][1] for i in (1, 3))


@pytest.mark.parametrize("text", ['{"function": "os:getcwd", "settings": {}}', "tau=0.5"])
def test_a_request_that_asks_for_what_is_not_there_is_refused(engine, text):
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    llm, _, prompts = engine
    params = SamplingParams(max_tokens=2, extra_args={changes.REQUEST_KEY: text})
    with pytest.raises(VLLMValidationError, match="rltoken_logits: "):
        llm.generate([{"prompt_token_ids": prompts[0]}], params, use_tqdm=False)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 5), st.integers(0, 2)),
        st.tuples(st.just("remove"), st.integers(0, 5), st.just(0)),
        st.tuples(st.just("move"), st.integers(0, 5), st.integers(0, 5)),
        st.tuples(st.just("swap"), st.integers(0, 5), st.integers(0, 5)),
    ),
    max_size=12,
)


@given(steps=OPERATIONS)
@settings(max_examples=100, deadline=None)
def test_changes_follow_their_requests_through_the_batch(steps):
    """Against a plain list of places, one update per operation as the engine sends them."""
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

    from rltoken.rollout.processors import ChangedLogits

    processor, places = ChangedLogits(None, torch.device("cpu"), False), [None] * 6
    logits = torch.randn(6, 7, generator=torch.Generator().manual_seed(0))
    for what, a, b in steps:
        update = {"batch_size": 6, "removed": [], "added": [], "moved": []}
        if what == "add":
            change = CHANGES[b]
            extra = {"other": 1} if change is None else {changes.REQUEST_KEY: changes.told(change)}
            update["added"], places[a] = [(a, SamplingParams(extra_args=extra), [], [])], change
        elif what == "remove":
            update["removed"], places[a] = [a], None
        elif a != b:
            way = MoveDirectionality.SWAP if what == "swap" else MoveDirectionality.UNIDIRECTIONAL
            update["moved"] = [(a, b, way)]
            places[a], places[b] = places[b] if what == "swap" else None, places[a]
        processor.update_state(BatchUpdate(**update))
        processor.update_state(None)
        found = processor.apply(logits.clone())
        for row, change in enumerate(places):
            if change is None:
                assert torch.equal(found[row], logits[row])
            else:
                torch.testing.assert_close(found[row], change(logits[row : row + 1])[0])


def hapo(tau=0.5):
    return {"controls": {"hapo": AdaptiveTemperature(tau=tau, form="scaled")}}


def test_the_sampler_is_still_compared_with_the_trainer(make):
    """Log-probabilities come back as the policy's own, whatever temperature a token was sampled at."""
    trainer = make(hapo(), max_steps=4)
    calls = []
    generate_with, stock = trainer.vllm_generation.llm, trainer.vllm_generation.llm.generate

    def recording(prompts, **options):
        calls.append(options["sampling_params"].extra_args)
        return stock(prompts, **options)

    generate_with.generate = recording
    trainer.train()
    assert [bool(extra) for extra in calls] == [False, True, True, True], "the first window has no window before it"
    pivots = [changes.found(extra[changes.REQUEST_KEY]).keywords["pivot"] for extra in calls[1:]]
    assert logged(trainer, "control/logits/pivot") == pytest.approx(pivots) and len(set(pivots)) == 3
    differences = logged(trainer, "sampling/sampling_logp_difference/max")
    assert len(differences) == 4 and max(differences) < 1e-3
    assert all(share == 1 for share in logged(trainer, "sampling/kept/shorter_half"))
    assert not trainer.vllm_generation.generation_kwargs, "what is sampled outside of a window asks for nothing"


def test_the_comparison_would_see_the_changed_distribution(make, monkeypatch):
    """With TRL's processed log-probabilities the first changed window stops the run: the change is that large."""
    monkeypatch.setitem(changes.ENGINE, "logprobs_mode", "processed_logprobs")
    with pytest.raises(UserError, match=r"rollout\.max_logp_difference: after step 1 "):
        make(hapo()).train()


def test_a_run_without_such_a_method_has_a_stock_engine(make):
    trainer = make(max_steps=1)
    settings = trainer.vllm_generation.llm.llm_engine.vllm_config.model_config
    assert not settings.logits_processors and settings.logprobs_mode == "processed_logprobs"
    calls = recorded(trainer)
    trainer.train()
    assert len(calls) == 1


@pytest.mark.parametrize("stopped_at", [1, 2])
def test_a_resumed_run_samples_at_the_same_temperatures(make, tmp_path, stopped_at):
    def done(name, resume=None):
        trainer = make(hapo(), output_dir=tmp_path / name, max_steps=3, save_strategy="steps", save_steps=1)
        trainer.train(resume_from_checkpoint=resume)
        trainer.close()
        return trainer.model.state_dict(), logged(trainer, "control/logits/pivot")[-1]

    straight, pivot = done("run")
    resumed, again = done("resumed", str(tmp_path / "run" / f"checkpoint-{stopped_at}"))
    assert pivot == again and all(torch.equal(straight[name], resumed[name]) for name in straight)
