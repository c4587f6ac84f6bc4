"""Queue, patience and slow senders, before an engine that never answers."""

import json
import socket
import threading
import time
from contextlib import contextmanager

import openai
import pytest
import requests
from http_server import data_url, question, served
from openai import OpenAI

from vora.serve.answer import Answer
from vora.serve.api.service import Service
from vora.serve.limits import Limits

BODY = json.dumps({"model": "m", "messages": question()}).encode()


class Silent:
    """An engine whose answers begin and do not go on; `submitted` are those."""

    name = "silent"

    def __init__(self, first=""):
        self.first, self.submitted = first, []

    def submit(self, messages, **options):
        self.submitted.append(answer := Answer(3))
        answer.put(self.first)
        return answer

    def load(self):
        return sum(not answer.closed for answer in self.submitted), 0


@contextmanager
def silent(first="", **limits):
    """(engine, client, address)"""
    engine = Silent(first)
    with served(Service(engine, "m", Limits(**limits))) as url:
        yield engine, OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0), url


def eventually(true):
    end = time.monotonic() + 30
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


def test_images_that_take_long_hold_nobody_else_up(monkeypatch):
    """Two of them are opened at once; who waits too long for that hears so, in OpenAI's form."""
    let_go = threading.Event()
    monkeypatch.setattr("vora.serve.api.messages.fetch_image", lambda *given, **options: let_go.wait(30))
    with silent("yes", request_seconds=1.0) as (engine, client, url):
        with_image = json.dumps({"model": "m", "messages": question("what?", data_url())})
        headers = {"Content-Type": "application/json"}
        found = []

        def ask():
            found.append(requests.post(f"{url}/v1/chat/completions", data=with_image, headers=headers, timeout=60))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        assert eventually(lambda: found)
        assert found[0].status_code == 504 and found[0].json()["error"]["code"] == "timeout"
        events = client.chat.completions.create(model="m", messages=question(), stream=True)  # of text alone
        assert next(iter(events)).choices and len(engine.submitted) == 1
        events.close()
        let_go.set()
        for thread in threads:
            thread.join(20)
        assert [one.status_code for one in found] == [504] * 3


def test_a_full_queue_says_when_to_come_again_and_empties():
    with silent(max_batch_size=1, max_waiting=1) as (engine, client, url):
        raised = []

        def ask():
            try:
                client.chat.completions.create(model="m", messages=question())
            except openai.APIError as error:
                raised.append(error)

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        assert eventually(lambda: len(engine.submitted) == 2)
        with pytest.raises(openai.RateLimitError) as found:
            client.chat.completions.create(model="m", messages=question())
        assert found.value.response.headers["retry-after"] == "2" and found.value.code == "queue_full"
        assert requests.get(f"{url}/health").status_code == 200  # a full queue is no illness
        for answer in engine.submitted:
            answer.put("yes")
            answer.end("stop")
        for thread in threads:
            thread.join(20)
        assert not raised and len(engine.submitted) == 2
        client.with_options(timeout=0.2)
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.2).chat.completions.create(model="m", messages=question())


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_ends_with_an_error(stream):
    with silent(request_seconds=0.3) as (engine, client, _):
        with pytest.raises(openai.InternalServerError) as found:
            client.chat.completions.create(model="m", messages=question(), stream=stream)
        assert found.value.status_code == 504 and found.value.code == "timeout"
        assert engine.submitted[0].closed


def test_a_stream_that_stops_in_the_middle_says_why():
    with silent("begun", request_seconds=0.3) as (_, client, url):
        found = requests.post(f"{url}/v1/chat/completions", json=json.loads(BODY) | {"stream": True})
        last = json.loads(found.text.strip().splitlines()[-1].removeprefix("data: "))
        assert found.status_code == 200 and "begun" in found.text and last["error"]["code"] == "timeout"
        with pytest.raises(openai.APIError, match="longer than the limit"):
            list(client.chat.completions.create(model="m", messages=question(), stream=True))


@pytest.mark.parametrize("first, stream", [("", False), ("", True), ("begun", True)])
def test_who_hangs_up_leaves_the_batch(first, stream):
    with silent(first) as (engine, _, url):
        host, port = url.removeprefix("http://").split(":")
        body = json.dumps(json.loads(BODY) | {"stream": stream}).encode()
        with socket.create_connection((host, int(port))) as channel:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
            channel.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
            assert eventually(lambda: engine.submitted) and not engine.submitted[0].closed
        assert eventually(lambda: engine.submitted[0].closed)


def test_a_body_that_does_not_arrive_is_not_waited_for():
    with silent(body_seconds=0.3) as (engine, _, url):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as channel:
            channel.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            assert b" 408 " in channel.recv(100)
        assert not engine.submitted


def test_an_engine_that_fails_tells_no_secrets():
    with silent() as (engine, client, url):
        engine.submit = lambda *_, **__: 1 / 0
        with pytest.raises(openai.InternalServerError) as found:
            client.chat.completions.create(model="m", messages=question())
        assert found.value.code == "internal_error" and "division" not in str(found.value)


def test_urls_of_images_follow_the_policy():
    engine = Silent()
    with served(Service(engine, "m", Limits(), allow_urls=True)) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0)
        for bad in (f"{url}/health", "http://169.254.169.254/x", "http://[::1]/x.png", "/etc/passwd"):
            with pytest.raises(openai.BadRequestError, match="private, local or reserved|never as a path"):
                client.chat.completions.create(model="m", messages=question("what?", bad))
    assert not engine.submitted
