"""Evaluation through a server with OpenAI's chat completions: what is asked, what is made of the answers, refusals."""

import json

import pandas as pd
import pytest

from rltoken.tiny import warm_start
from tests.cli.conftest import cache, cli  # noqa: F401  (fixtures)
from tests.rollout.test_completions import quick, send, server  # noqa: F401  (fixtures)

SHORT = ("models=[some-model]", "data.eval.n=3", "eval.samples=2", "eval.budgets=null", "out=results")


def answering(asked, reply):
    """A server's answer that notes what it was asked."""

    def answer(handler, payload, number):
        asked.append((handler.path, payload, handler.headers["Authorization"]))
        send(handler, 200, json.dumps(reply(payload, number)))

    return answer


def thinking(payload, number):
    message = {"role": "assistant", "reasoning_content": "1 + 2", "content": f"{payload['seed'] % 2}"}
    usage = {"prompt_tokens": 9, "completion_tokens": 7, "completion_tokens_details": {"reasoning_tokens": 5}}
    return {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}


def test_messages_go_out_and_texts_come_back(cli, monkeypatch):  # noqa: F811
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    asked = []
    with server(answering(asked, thinking)) as url:
        found = cli.evaluate(*SHORT, f"server={url}/v1/", "eval.temperature=0.6", "eval.top_p=0.95")
    assert found.status == 0, found.err
    assert len(asked) == 6 and {path for path, _, _ in asked} == {"/v1/chat/completions"}
    assert {key for _, _, key in asked} == {"Bearer secret"}
    payloads = [payload for _, payload, _ in asked]
    for payload in payloads:
        (message,) = payload.pop("messages")
        assert message["role"] == "user" and message["content"]
    assert len({payload.pop("seed") for payload in payloads}) == 6
    common = {"model": "some-model", "temperature": 0.6, "top_p": 0.95, "max_tokens": 112}
    assert all(payload == common for payload in payloads)
    table = pd.read_parquet(found.cwd / "results/some-model.parquet")
    assert table["text"].isin(["1 + 2</think>0", "1 + 2</think>1"]).all() and not table["truncated"].any()
    assert (table["thinking_tokens"] == 5).all() and (table["completion_tokens"] == 7).all()
    results = json.loads((found.cwd / "results/metrics.json").read_text())
    assert results["tokens"]["some-model"] == {"sampled": 42, "prefilled": 54}
    assert results["settings"]["some-model"]["sampled_by"] == "chat"
    assert results["settings"]["some-model"]["server"] == f"{url}/v1/" and "secret" not in json.dumps(results)


def test_lengths_by_a_tokenizer(cli, cache):  # noqa: F811
    def cut(payload, number):
        message = {"content": "three plus four is seven </think> seven", "reasoning_content": None}
        return {"choices": [{"message": message, "finish_reason": "length"}]}

    folder = warm_start(steps=2, cache_dir=cache)
    with server(answering([], cut)) as url:
        found = cli.evaluate(*SHORT, f"server={url}/v1", f"tokenizer={folder}")
    assert found.status == 0, found.err
    table = pd.read_parquet(found.cwd / "results/some-model.parquet")
    assert table["truncated"].all() and (table["completion_tokens"] > table["thinking_tokens"] + 1).all()
    assert (table["thinking_tokens"] > 0).all()


def test_a_busy_server_is_asked_again(cli, quick):  # noqa: F811
    def busy(handler, payload, number):
        if number < 3:
            return send(handler, 429, "later")
        send(handler, 200, json.dumps(thinking(payload, number)))

    with server(busy) as url:
        found = cli.evaluate(*SHORT, f"server={url}/v1")
    assert found.status == 0, found.err


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (("eval.budgets=[8]",), "eval.budgets: chat completions cannot be cut and continued"),
        (("models=[]",), "models: name what the server at http://127.0.0.1:9/v1 serves"),
        (("server=127.0.0.1:9",), "server: 127.0.0.1:9 is no URL"),
        (("+data.max_prompt_tokens=5",), "tokenizer: data.max_prompt_tokens counts by one"),
    ],
)
def test_refusals(cli, asked, told):  # noqa: F811
    found = cli.evaluate(*SHORT, "server=http://127.0.0.1:9/v1", *asked)
    assert found.status == 2 and told in found.err and found.err.count("\n") == 1, found.err


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ('{"choices": []}', "answers with no completion"),
        ("<html>welcome</html>", "answers with no completion: <html>"),
        ("[]", "answers with no completion"),
        ('{"choices": [{"text": "4"}]}', "answers with no message"),
        ('{"choices": [null]}', "answers with no message: None"),
        ('{"choices": [{"message": "4"}]}', "answers with no message"),
        ('{"choices": [{"message": {"content": [{"type": "text", "text": "4"}]}}]}', "a message that is no text"),
    ],
)
def test_an_answer_that_is_none_is_told(cli, body, told):  # noqa: F811
    with server(lambda handler, payload, number: send(handler, 200, body)) as url:
        found = cli.evaluate(*SHORT, f"server={url}/v1")
    assert found.status == 2 and found.err.startswith(f"error: server: {url}/v1"), found.err
    assert told in found.err and found.err.count("\n") == 1


@pytest.mark.parametrize("usage", ["null", '{"completion_tokens": null, "prompt_tokens": null}'])
def test_a_server_that_counts_no_tokens_needs_a_tokenizer(cli, usage):  # noqa: F811
    body = f'{{"choices": [{{"message": {{"content": "4"}}}}], "usage": {usage}}}'
    with server(lambda handler, payload, number: send(handler, 200, body)) as url:
        found = cli.evaluate(*SHORT, f"server={url}/v1")
    assert found.status == 2 and found.err.count("\n") == 1, found.err
    assert found.err.startswith(f"error: tokenizer: the server at {url}/v1 counts no tokens"), found.err


def test_what_the_server_refuses_is_told_under_its_key(cli):  # noqa: F811
    with server(lambda handler, payload, number: send(handler, 404, "no such model")) as url:
        found = cli.evaluate(*SHORT, f"server={url}/v1")
    assert found.status == 2 and f"server: {url}/v1/chat/completions refuses a request: no such model" in found.err
