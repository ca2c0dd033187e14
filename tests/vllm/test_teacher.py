"""A teacher behind a vLLM server: its prompt log-probabilities are those of transformers, and so is what they teach."""

import copy

import pytest
import torch
from transformers import AutoTokenizer

from rltoken.errors import SamplerLost, UserError
from rltoken.methods.kdrl import Distillation
from rltoken.teachers import Server, Teacher, refuse_other_server
from tests.trl.teachers import a_teacher


@pytest.fixture
def teacher(make, server):
    """The server, serving the tiny random model with larger weights."""
    trainer = make(server=server)
    trainer.model.load_state_dict(a_teacher(trainer.model.config._name_or_path).model.state_dict())
    trainer.hand_over()
    return Server(server.url, patience=30)


def test_it_gives_what_transformers_gives(teacher, tiny):
    model = a_teacher(tiny[0]).model
    sequences = torch.randint(4, 40, (6, 20), generator=torch.Generator().manual_seed(0))
    cuts = (1, 3, 5, 9, 15, 19)
    rows = [(ids[:cut].tolist(), ids[cut:].tolist()) for ids, cut in zip(sequences, cuts, strict=True)]
    with torch.no_grad():
        logps = model(sequences).logits[:, :-1].log_softmax(-1).gather(-1, sequences[:, 1:, None]).squeeze(-1)
    found = teacher.logps(*zip(*rows, strict=True))
    for (_, completion), values, cut, expected in zip(rows, found, cuts, logps, strict=True):
        assert len(values) == len(completion)
        torch.testing.assert_close(torch.tensor(values), expected[cut - 1 :], rtol=0, atol=1e-4)
    assert teacher.logps([], []) == []


def test_a_run_learns_from_it_what_it_learns_from_the_model(run, teacher, tiny):
    settings = {"optim": "sgd", "learning_rate": 1e-2}
    stages = {"aux": {"kdrl": Distillation(beta=0.5)}}
    own = run(stages, teacher=a_teacher(tiny[0]), **settings)
    assert own.distance(run(stages, teacher=Teacher(teacher), **settings)) < 1e-5
    assert own.distance(run(**settings)) > 1e-4


def test_another_tokenizer_is_refused(teacher, tiny):
    refuse_other_server(tiny[1], teacher)
    other = AutoTokenizer.from_pretrained(tiny[0])
    other.add_tokens(["eleven"])
    with pytest.raises(UserError, match=r"teacher\.url: http\S+ has another tokenizer .*stand for another text"):
        refuse_other_server(other, teacher)
    splitting = copy.copy(tiny[1])
    splitting.encode = lambda text, **options: [5, *tiny[1].encode(text, **options)]
    with pytest.raises(UserError, match=r"teacher\.url: http\S+ has another tokenizer .* tokens here and"):
        refuse_other_server(splitting, teacher)


def test_what_it_refuses_ends_the_run_at_once(teacher):
    with pytest.raises(UserError, match=r"teacher\.url: http\S+ refuses a request") as refused:
        teacher.logps([[5] * 600], [[6] * 600])
    assert not isinstance(refused.value, SamplerLost)
