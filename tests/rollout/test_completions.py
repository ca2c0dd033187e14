"""The client of a completions server that fails, refuses, is slow or stands still: a real one on a port of its own."""

import contextlib
import http.server
import itertools
import json
import threading
import time

import pytest

from rltoken.errors import SamplerLost, UserError
from rltoken.rollout import completions
from rltoken.rollout.completions import complete

PAYLOADS = [{"prompt": [1, 2, number], "seed": number} for number in range(20)]


@contextlib.contextmanager
def server(answer, metrics=lambda: ""):
    """The URL of a server; answer(handler, payload, number) writes what the number-th request gets, from 0 on."""
    numbers = itertools.count()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer(self, payload, next(numbers))

        def do_GET(self):
            send(self, 200, metrics())

        def log_message(self, *_):
            pass

    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = 128
        daemon_threads = True
        handle_error = staticmethod(lambda *_: None)  # clients that give up close their connections

    made = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{made.server_port}"
    finally:
        made.shutdown()
        made.server_close()


def send(handler, status, text):
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(text.encode())))
    handler.end_headers()
    handler.wfile.write(text.encode())


def echo(handler, payload, number):
    send(handler, 200, json.dumps({"choices": [{"token_ids": payload["prompt"] + [payload["seed"]]}]}))


EXPECTED = [{"token_ids": payload["prompt"] + [payload["seed"]]} for payload in PAYLOADS]


@pytest.fixture
def quick(monkeypatch):
    """Pauses of hundredths of seconds."""
    stock = completions.asyncio.sleep
    monkeypatch.setattr(completions.asyncio, "sleep", lambda seconds: stock(min(seconds, 0.05)))


def test_choices_come_in_the_order_of_the_payloads():
    def shuffled(handler, payload, number):
        time.sleep(0.02 * (payload["seed"] % 5))
        echo(handler, payload, number)

    with server(shuffled) as url:
        assert complete(url, PAYLOADS, patience=30) == (EXPECTED, False)
    with server(echo) as url:
        assert complete(url, [], patience=30) == ([], False)


def test_errors_of_the_server_and_lost_connections_are_repeated(quick):
    def fails_sometimes(handler, payload, number):
        if number % 3 == 0:
            send(handler, 503, "busy")
        elif number % 3 == 1 and number < 40:
            handler.connection.close()
        else:
            echo(handler, payload, number)

    with server(fails_sometimes) as url:
        assert complete(url, PAYLOADS, patience=30) == (EXPECTED, True)


def test_a_refused_request_ends_the_call_at_once():
    def refuses(handler, payload, number):
        send(handler, 400, "the prompt is longer than the model's limit")

    with server(refuses) as url, pytest.raises(UserError, match="longer than the model's limit") as refused:
        complete(url, PAYLOADS, patience=30)
    assert not isinstance(refused.value, SamplerLost), "a run that cannot go on has no reason to be resumed"


def test_nobody_there():
    with server(echo) as url:
        pass
    with pytest.raises(SamplerLost, match=r"no progress for 1 s \(rollout.patience\): 0 of 20 .* last error: Client"):
        complete(url, PAYLOADS, patience=1)


def test_a_server_that_stands_still_is_given_up_and_the_last_progress_is_named():
    over = threading.Event()

    def stalls(handler, payload, number):
        if payload["seed"] >= 5:
            over.wait(20)
        echo(handler, payload, number)

    started = time.monotonic()
    try:
        with (
            server(stalls) as url,
            pytest.raises(SamplerLost, match=r"5 of 20 completions had come, something last moved at \d\d:\d\d:\d\d"),
        ):
            try:
                complete(url, PAYLOADS, patience=2)
            finally:
                over.set()
    finally:
        over.set()
    assert 2 <= time.monotonic() - started < 10


def test_long_completions_may_take_longer_than_the_patience_while_tokens_are_counted():
    tokens = itertools.count(100, 7)

    def slow(handler, payload, number):
        time.sleep(3)
        echo(handler, payload, number)

    def metrics():
        return f'# TYPE x counter\nvllm:generation_tokens_total{{engine="0",model_name="m"}} {next(tokens)}.0\n'

    with server(slow, metrics) as url:
        assert complete(url, PAYLOADS, patience=1) == (EXPECTED, False)
    with server(slow, lambda: 'vllm:generation_tokens_total{engine="0"} 100.0\n') as url, pytest.raises(SamplerLost):
        complete(url, PAYLOADS, patience=1)
