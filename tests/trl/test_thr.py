"""THR on real models: what its theory predicts is measured, and the trainer hands it what the theory needs."""

import functools

import pytest
import torch
from transformers import AutoModelForCausalLM

from rltoken.errors import UserError
from rltoken.methods.brpo import brpo, budget_answers, thinking_only
from rltoken.methods.forking_tokens import forks
from rltoken.methods.gspo_token import gspo_token
from rltoken.methods.thr import influence, nthr, thr
from rltoken.tiny import warm_start
from rltoken.types import Head

TEMPERATURE = 0.7
SCORED = {
    "length_norm": True,
    "exclude_self": False,
    "vocabulary": "full",
    "max_tokens": None,
    "elements": 2**24,
}


def even_first(completion_ids, **_):
    """1 for completions whose first token is even, so that most groups have both."""
    return [float(ids[0] % 2 == 0) for ids in completion_ids]


def moved(parameters, gradients, step):
    """Add to each parameter its gradient, times `step`."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.add_(gradient, alpha=step)


class Group:
    """Four completions of one prompt, every second one called correct, under a model in double precision."""

    def __init__(self, model, tokenizer, prompt, seed):
        self.model = model
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids = ids["input_ids"]
        torch.manual_seed(seed)
        self.prompt = ids.size(1)
        self.sequences = model.generate(
            ids.repeat(4, 1), do_sample=True, max_new_tokens=10, temperature=TEMPERATURE, top_k=0
        )
        self.ids = self.sequences[:, self.prompt :]
        ended = (self.ids == tokenizer.eos_token_id).long()
        self.mask = (ended.cumsum(1) - ended == 0).long()
        self.correct = torch.tensor([True, False, True, False])

    def hidden(self):
        states = self.model.base_model(self.sequences).last_hidden_state
        return states[:, self.prompt - 1 : -1]

    def logps(self, hidden, weight):
        logps = (hidden @ weight.T / TEMPERATURE).log_softmax(-1)
        return logps.gather(-1, self.ids.unsqueeze(-1)).squeeze(-1)

    def likelihood(self, hidden, weight):
        """The summed mean log-likelihood of the correct responses."""
        means = (self.logps(hidden, weight) * self.mask).sum(1) / self.mask.sum(1)
        return means[self.correct].sum()

    def predicted(self):
        """[n] the scores of the trained tokens."""
        hidden, weight = self.hidden(), self.model.get_output_embeddings().weight
        rewards, group = self.correct.double(), torch.zeros(4, dtype=torch.long)
        signals = hidden, self.logps(hidden, weight), self.ids, self.mask
        head = Head(weight.detach(), None, TEMPERATURE)
        scores = influence(*signals, head, self.correct, rewards, group, **SCORED)
        return scores[self.mask > 0]

    @torch.no_grad()
    def measured_head(self, step=1e-4):
        """[n] change of the likelihood per step size, for a step of the head alone on each token's log-probability."""
        hidden, weight = self.hidden(), self.model.get_output_embeddings().weight.detach()
        before, changes = self.likelihood(hidden, weight), []
        for row, column in self.mask.nonzero().tolist():
            with torch.enable_grad():
                free = weight.clone().requires_grad_()
                (gradient,) = torch.autograd.grad(self.logps(hidden, free)[row, column], free)
            changes.append((self.likelihood(hidden, weight + step * gradient) - before) / step)
        return torch.stack(changes)

    @torch.no_grad()
    def measured_model(self, every=3, step=1e-5):
        """The same for a step of all parameters, of every third token."""
        parameters = list(self.model.parameters())
        weight = self.model.get_output_embeddings().weight
        before, changes = self.likelihood(self.hidden(), weight), []
        for row, column in self.mask.nonzero().tolist()[::every]:
            with torch.enable_grad():
                gradients = torch.autograd.grad(self.logps(self.hidden(), weight)[row, column], parameters)
            moved(parameters, gradients, step)
            changes.append((self.likelihood(self.hidden(), weight) - before) / step)
            moved(parameters, gradients, -step)
        return torch.stack(changes)


@pytest.fixture(scope="module")
def groups(tiny):
    """Ten groups of a random tiny model."""
    folder, tokenizer, dataset = tiny
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    return [Group(model, tokenizer, dataset[number]["prompt"], number) for number in range(10)]


def correlation(one, two):
    return torch.corrcoef(torch.stack([one, two]))[0, 1].item()


def test_a_step_of_the_head_does_what_the_score_says(groups):
    """Hidden states are free variables in the theory, so a step of the head alone is what it predicts."""
    for group in groups:
        predicted, measured = group.predicted(), group.measured_head()
        assert correlation(predicted, measured) > 0.999
        # the score leaves out the step size and 1 / T^2
        torch.testing.assert_close(measured * TEMPERATURE**2, predicted, rtol=0.01, atol=0.01 * predicted.abs().max())


def test_a_step_of_all_parameters_mostly_follows_the_score(groups):
    """Beyond the theory: the states move too, and the head is the embedding."""
    found = [correlation(group.predicted()[::3], group.measured_model()) for group in groups]
    assert min(found) > 0.1 and sorted(found)[4] > 0.7


@pytest.mark.slow
def test_a_step_of_all_parameters_of_a_trained_model_follows_the_score(tiny):
    """Where few tokens are undecided; without the two of the largest influence the rest follows less closely."""
    model = AutoModelForCausalLM.from_pretrained(warm_start(), dtype=torch.float64).eval()
    found, rest = [], []
    for number in range(10):
        group = Group(model, tiny[1], tiny[2][number]["prompt"], number)
        predicted, measured = group.predicted()[::3], group.measured_model()
        small = measured.abs().argsort()[:-2]
        found.append(correlation(predicted, measured))
        rest.append(correlation(predicted[small], measured[small]))
    for name, values in {"all tokens": found, "without two": rest}.items():
        print(f"{name}: {min(values):.3f} to {max(values):.3f}, median {sorted(values)[5]:.3f}")
    assert min(found) > 0.9 and sorted(rest)[5] > 0.7


LORA = pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
EVERY = [{}, {"num_iterations": 2}]


@LORA
@pytest.mark.parametrize("passes", EVERY, ids=["on-policy", "two iterations"])
def test_states_log_probs_and_head_are_those_of_one_policy(run, passes, lora):
    """Whether TRL makes the old-log-prob pass or the frame does; after steps, so that an adapter counts."""
    differences = []

    def look(old_hidden, old_logps, ids, mask, head):
        assert not head.weight.requires_grad and head.temperature == 0.7
        logits = head.logits(old_hidden.flatten(0, 1), torch.arange(head.weight.size(0)))
        made = logits.log_softmax(-1).gather(1, ids.view(-1, 1)).view_as(old_logps)
        differences.append(((made - old_logps) * mask).abs().max().item())
        return mask.float()

    run({"weights": {"look": look}}, temperature=0.7, lora=lora, **passes)
    assert len(differences) == 4 // passes.get("num_iterations", 1) and max(differences) < 1e-4


@LORA
def test_gradient_checkpointing_changes_nothing(run, lora):
    stages = {"weights": {"thr": functools.partial(thr, p=0.5)}}
    settings = {"reward": even_first, "lora": lora, "max_steps": 2}
    plain = run(stages, **settings)
    assert plain.distance(run(stages, gradient_checkpointing=True, **settings)) < 1e-6
    assert plain.distance(run({}, **settings)) > 1e-5


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_accumulation_equals_one_batch(run, loss_type):
    stages = {"weights": {"thr": thr, "nthr": nthr}}
    settings = {"reward": even_first, "loss_type": loss_type, "optim": "sgd", "num_iterations": 2}
    one = run(stages, per_device_train_batch_size=8, **settings)
    four = run(stages, per_device_train_batch_size=2, gradient_accumulation_steps=4, **settings)
    assert one.distance(four) < 5e-7


def test_p_of_zero_without_a_threshold_is_plain_grpo(run):
    stages = {"weights": {"thr": functools.partial(thr, p=0.0, tau_mode="none")}}
    settings = {"reward": even_first, "num_iterations": 2}
    assert run(**settings).distance(run(stages, **settings)) == 0.0


def test_packs_and_padding_change_nothing(run):
    stages = {"weights": {"thr": thr}}
    settings = {"reward": even_first, "optim": "sgd", "max_steps": 2}
    whole = run(stages, **settings)
    assert whole.distance(run(stages, pack_tokens=40, **settings)) < 5e-7
    assert whole.distance(run(stages, pad_to_multiple_of=32, **settings)) < 5e-7


def test_beside_brpo_it_weighs_the_thinking_rows(run):
    """With answers that are added rows, forking tokens and GSPO-token, off-policy."""
    kept = []

    def look(old_hidden, old_logps, ids, mask, head, correct, rewards, group):
        weights, _ = thr(old_hidden, old_logps, ids, mask, head, correct, rewards, group)
        kept.append((weights, mask.clone(), rewards.clone(), group.tolist()))
        return weights

    budgets = {"budgets": [3, 6], "longest": 6}
    stages = {
        "controls": {"brpo": functools.partial(thinking_only, **budgets)},
        "rows": {"brpo": functools.partial(budget_answers, **budgets, n_summaries=2, max_new_tokens=3)},
        "credits": {"brpo": brpo},
        "weights": {"forks": functools.partial(forks, rho=0.5), "thr": look, "nthr": nthr},
        "ratios": {"gspo": gspo_token},
    }
    result = run(stages, reward=even_first, num_iterations=2, loss_type="dr_grpo")
    assert all(value.isfinite().all() for value in result.weights.values())
    assert len(kept) == 2 and any((weights != 1).any() for weights, *_ in kept)
    for weights, mask, rewards, group in kept:
        assert group == [0] * 4 + [1] * 4 and mask.sum(1).max() <= 6 and not rewards.isnan().any()
        assert weights.shape == mask.shape and weights.isfinite().all() and weights.min() >= 0


def test_a_live_stage_has_the_head_too(run):
    compared = []

    def look(hidden, logps, ids, mask, head):
        logits = head.logits(hidden.detach().flatten(0, 1), torch.arange(head.weight.size(0)))
        made = logits.log_softmax(-1).gather(1, ids.view(-1, 1)).view_as(logps)
        compared.append(((made - logps).detach() * mask).abs().max().item())
        return mask.float()

    run({"weights": {"look": look}}, temperature=0.7, num_iterations=2)
    assert len(compared) == 4 and max(compared) < 1e-4


def test_a_model_that_caps_its_logits_is_refused(run, tiny, monkeypatch):
    load = AutoModelForCausalLM.from_pretrained

    def capped(folder, **options):
        model = load(folder, **options)
        model.config.final_logit_softcapping = 30.0
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", capped)
    with pytest.raises(UserError, match=r"model\.path: a stage names 'head'"):
        run({"weights": {"thr": thr}}, reward=even_first)
