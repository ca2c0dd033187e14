"""ARM's three ways to answer: the tag that is put in the mouth, the consensus, and what each of them costs."""

import copy
import json

import pandas as pd
import pytest
from omegaconf import OmegaConf

from rltoken.errors import UserError
from rltoken.evals.formats import Consensus, Instructed, check, guided
from rltoken.tiny import World, build_tokenizer, classes
from rltoken.tiny.world import TAGS
from tests.cli.conftest import cache, cli
from tests.methods.test_ada_grpo import composed

__all__ = ["cache", "cli"]

TOKENIZER = build_tokenizer(World(tagged=True))
ENDS = frozenset([TOKENIZER.eos_token_id])


def ids(text):
    return TOKENIZER.encode(text, add_special_tokens=False)


class Told:
    """Continues a context by what is told for its last token; remembers how it was called."""

    together, besides, ends = None, None, ENDS

    def __init__(self, told):
        self.told, self.calls, self.prefilled = told, [], None

    def complete(self, contexts, max_new_tokens, stops, seeds, begun=()):
        self.calls.append((contexts, max_new_tokens, begun))
        self.prefilled = [len(context) for context in contexts]
        return [ids(self.told[context[0]][TOKENIZER.decode(context[-1])]) for context in contexts]


def asked(*answers, long="6"):
    """What a model says to a problem in the three short formats, None being no answer, and in the long one."""
    said = dict(zip(TAGS.values(), (*answers, long), strict=True))
    return {tag: f"so </think> {value} <eos>" if value else "so so" for tag, value in said.items()}


def consensus_of(*problems):
    """Texts, tokens besides them, prefilled tokens, and the model, of problems 5, 6, ... as single tokens."""
    model = Told({5 + i: problem for i, problem in enumerate(problems)})
    generator = guided(model, "consensus", TAGS, TOKENIZER, classes)
    found = generator.complete([[5 + i] for i in range(len(problems))], 50, (), range(len(problems)))
    return TOKENIZER.batch_decode(found), generator, model


@pytest.mark.parametrize(
    ("short", "expected"),
    [
        (("4", "4", "4"), "<DIRECT> so </think> 4 <eos>"),
        (("4", "5", "4"), "<LONG_COT> so </think> 6 <eos>"),
        ((None, None, None), "<LONG_COT> so </think> 6 <eos>"),
        (("4", None, "4"), "<LONG_COT> so </think> 6 <eos>"),
    ],
)
def test_the_consensus_of_the_specification(short, expected):
    (text,), _, model = consensus_of(asked(*short))
    assert text == expected
    assert len(model.calls) == (3 if "DIRECT" in expected else 4)


def test_every_call_of_a_consensus_is_counted():
    """5 tokens an answer, its tag included; only the second problem is answered at length."""
    texts, generator, model = consensus_of(asked("4", "4", "4"), asked("4", "5", "4"))
    assert [text.split()[0] for text in texts] == ["<DIRECT>", "<LONG_COT>"]
    assert generator.besides == [10, 15]
    assert generator.prefilled == [3 * 2, 4 * 2], "a problem and a tag in each call"
    assert model.calls[3][0] == [[6, *ids("<LONG_COT>")]]


def test_an_instructed_completion_opens_with_its_tag_and_is_no_longer_for_it():
    model = Told({5: asked("4", "4", "4")})
    generator = guided(model, "code", TAGS, TOKENIZER, classes)
    assert isinstance(generator, Instructed) and generator.ends == ENDS
    (found,) = generator.complete([[5]], 50, (), [0])
    assert TOKENIZER.decode(found) == "<CODE> so </think> 4 <eos>"
    assert model.calls == [([[5, *ids("<CODE>")]], 49, ())]
    assert guided(model, None, TAGS, TOKENIZER, classes) is model


def test_what_goes_on_from_a_completion_is_handed_on_as_it_is():
    model = Told({5: {"so": "</think> 4 <eos>"}})
    generator = Instructed(model, ids("<CODE>"))
    (found,) = generator.complete([[5, *ids("<CODE> so")]], 4, (), [0], [(0, 3)])
    assert TOKENIZER.decode(found) == "</think> 4 <eos>"
    assert model.calls == [([[5, *ids("<CODE> so")]], 4, [(0, 3)])]


def test_the_consensus_asks_in_the_order_of_its_formats():
    _, generator, model = consensus_of(asked("4", "4", "4"))
    assert isinstance(generator, Consensus)
    assert [contexts[0][-1] for contexts, *_ in model.calls] == [ids(TAGS[f])[0] for f in ("direct", "short", "code")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval.format": "brief"}, r"eval\.format: there is no 'brief'; set null, direct"),
        ({"eval.format": "consensus"}, r"eval\.budgets: .*set eval\.budgets=null"),
        ({"eval.format": "consensus", "eval.budgets": None, "reward.classes": None}, r"reward\.classes: "),
        (
            {"eval.format": "consensus", "model.formats": {"short": "<COT>"}},
            r"model\.formats: .*needs the format direct",
        ),
        ({"eval.format": "short", "model.formats": None}, r"eval\.format: there is no 'short'"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    cfg = copy.deepcopy(composed("+exp=grpo"))
    for key, value in settings.items():
        OmegaConf.update(cfg, key, value, merge=False)
    with pytest.raises(UserError, match=message):
        check(cfg)


def test_one_run_in_each_way_from_the_command_line(cli):
    short = ("sft.trainer.max_steps=2", "data.traces.n=64", "eval.before=false", "eval.after=false", "name=x")
    trained = cli("+exp=ada_grpo", *short)
    assert trained.status == 0, trained.err
    for way, tag in (("short", "<COT>"), ("consensus", None)):
        found = cli.evaluate("runs=[runs/x]", f"eval.format={way}", "eval.budgets=null", f"out={way}", "eval.samples=2")
        assert found.status == 0, found.err
        table = pd.read_parquet(found.cwd / way / "x.parquet")
        assert tag is None or all(text.startswith(tag) for text in table["text"])
        assert (table["sampled_tokens"] > table["completion_tokens"]).all() == (way == "consensus")
        results = json.loads((found.cwd / way / "metrics.json").read_text())
        assert results["settings"]["x"]["eval"]["format"] == way
    refused = cli.evaluate("models=[m]", "server=http://localhost:1/v1", "eval.format=short")
    assert refused.status == 2 and refused.err.startswith("error: eval.format: ")
