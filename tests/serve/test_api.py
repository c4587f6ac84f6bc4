"""OpenAI's client against each engine: the same tests for all."""

import json
import random
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import requests
from http_server import KEY, data_url, question
from PIL import Image

COLOURS = ("red", "green", "blue", "white", "black", "orange")


def ask(client, messages, **options):
    options = {"model": "tiny", "temperature": 0, "max_tokens": 8} | options
    return client.chat.completions.create(messages=messages, **options)


def text_of(answer):
    return answer.choices[0].message.content


def streamed(client, messages, **options):
    """(text, finish reason, usage) of a stream."""
    events = list(ask(client, messages, stream=True, stream_options={"include_usage": True}, **options))
    text = "".join(choice.delta.content or "" for event in events for choice in event.choices)
    return text, [event.choices[0].finish_reason for event in events if event.choices][-1], events[-1].usage


def error_of(found):
    """What is refused says so in OpenAI's form."""
    body = found.json() if isinstance(found, requests.Response) else found.response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str) and isinstance(body["error"]["type"], str)
    return body["error"]


def post(url, content, **headers):
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json", **headers}
    return requests.post(f"{url}/v1/chat/completions", data=content, headers=headers, timeout=60)


@pytest.mark.parametrize("num_images", [0, 1, 3])
def test_an_answer_whole_and_in_pieces(client, num_images):
    messages = question("what colour is it?", *map(data_url, COLOURS[:num_images]))
    whole, (text, reason, usage) = ask(client, messages), streamed(client, messages)
    assert whole.object == "chat.completion" and whole.model == "tiny" and whole.choices[0].message.role == "assistant"
    assert text_of(whole) == text and text and whole.choices[0].finish_reason == reason
    assert whole.usage.prompt_tokens == usage.prompt_tokens > 9 * num_images
    assert 0 < whole.usage.completion_tokens == usage.completion_tokens <= 8
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_usage_of_a_stream_comes_only_where_it_is_asked_for(client):
    events = list(ask(client, question(), stream=True))
    assert all(event.usage is None and event.choices for event in events)
    assert events[0].choices[0].delta.role == "assistant" and len({event.id for event in events}) == 1


def test_a_stream_ends_with_done(url):
    body = {"model": "tiny", "messages": question(), "stream": True, "max_tokens": 3}
    found = post(url, json.dumps(body))
    assert found.headers["content-type"].startswith("text/event-stream") and found.text.endswith("data: [DONE]\n\n")


def test_images_are_looked_at(client):
    answers = {text_of(ask(client, question("what?", data_url(Image.effect_noise((24, 24), 90))))) for _ in range(4)}
    assert len(answers) > 1


def test_roles_and_earlier_turns_are_read(client):
    messages = [{"role": "system", "content": "be short"}, *question(), {"role": "assistant", "content": "red"}]
    longer = ask(client, [*messages, *question("and now?")]).usage.prompt_tokens
    assert longer > ask(client, question("and now?")).usage.prompt_tokens + 10
    assert ask(client, [{"role": "developer", "content": "be short"}, *question()]).usage.prompt_tokens


def test_an_answer_may_be_sent_back_as_it_came(client):
    said = ask(client, question()).choices[0].message.model_dump()
    assert said["refusal"] is None and "tool_calls" in said
    history = [*question(), {**said, "content": said["content"] or "red"}, *question("and now?")]
    assert text_of(ask(client, history)) is not None
    with pytest.raises(openai.BadRequestError, match="tool_calls is not supported"):
        ask(client, [*history[:1], {**history[1], "annotations": [], "tool_calls": [{"id": "1"}]}, history[2]])


def test_max_tokens_stop_and_seed(client):
    cut = ask(client, question(), max_completion_tokens=3, max_tokens=openai.omit)
    assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 3
    text = text_of(ask(client, question(), max_tokens=12))
    stop = text[len(text) // 2 :][:2]
    stopped = ask(client, question(), max_tokens=12, stop=[stop, "never said"])
    assert text_of(stopped) == text[: text.index(stop)] and stopped.choices[0].finish_reason == "stop"
    assert streamed(client, question(), max_tokens=12, stop=stop)[0] == text_of(stopped)
    draws = [text_of(ask(client, question(), temperature=1, seed=seed, max_tokens=20)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert text_of(ask(client, question(), temperature=1, top_p=1e-6)) == text_of(ask(client, question()))


def test_texts_are_never_control_tokens(client):
    plain = ask(client, question("x")).usage.prompt_tokens
    for text in ("<|im_end|>", "<|im_start|>", "<reponame>", "<__media__>", "<|endoftext|>"):
        assert ask(client, question(text)).usage.prompt_tokens > plain + 2, text
    assert ask(client, [{"role": "user", "content": "<|im_end|>"}]).usage.prompt_tokens > plain + 2


def test_keys(url):
    for key in ("wrong", "Bearer", KEY + "x", KEY[:-1], "ü"):
        headers = {"Authorization": f"Bearer {key}".encode()}
        found = requests.get(f"{url}/v1/models", headers=headers)
        assert found.status_code == 401 and error_of(found)["code"] == "invalid_api_key"
    assert requests.get(f"{url}/metrics").status_code == requests.post(f"{url}/v1/chat/completions").status_code == 401
    assert requests.get(f"{url}/health").json()["status"] == "ok"


def test_models(client, url):
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError) as found:
        ask(client, question(), model="other/model")
    assert error_of(found.value)["code"] == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")


def test_what_is_no_request_is_refused(url):
    deep = '{"model": "tiny", "messages": ' + "[" * 50_000 + "]" * 50_000 + "}"
    huge = '{"model": "tiny", "max_tokens": ' + "9" * 6000 + "}"
    for body in ("", "{", "[]", "null", deep, huge, b"\xff\xfe", '{"model": "tiny"}', '{"messages": []}'):
        assert post(url, body).status_code == 400 and error_of(post(url, body)), body[:50]
    surrogate = '{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}'
    assert post(url, surrogate).status_code == 400
    plain = post(url, json.dumps({"model": "tiny", "messages": question()}), **{"Content-Type": "text/plain"})
    assert plain.status_code in (400, 415) and error_of(plain)
    key = {"Authorization": f"Bearer {KEY}"}
    assert error_of(requests.get(f"{url}/v1/nothing", headers=key))["code"] == "not_found"
    assert error_of(requests.get(f"{url}/v1/chat/completions", headers=key))["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    "options, param",
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"extra_body": {"top_k": 3}}, "top_k"),
        ({"temperature": 2.5}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 41}, "max_tokens"),
        ({"stop": list("abcde")}, "stop"),
        ({"max_completion_tokens": 3}, None),
    ],
)
def test_what_is_not_done_is_refused_by_name(client, options, param):
    with pytest.raises(openai.BadRequestError) as found:
        ask(client, question(), **options)
    assert error_of(found.value)["param"] == param


PART = "messages.0.content.0"


@pytest.mark.parametrize(
    "options, param, says",
    [
        ({"stop": [""]}, "stop.0", "at least 1 character"),
        ({"stop": ["a", 5]}, "stop.1", "a text is wanted"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, f"{PART}.type", "a part is"),
        ({"messages": [{"role": "user", "content": ["hi"]}]}, f"{PART}.type", "a part is"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, f"{PART}.text", "required"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "b": 1}]}]}, f"{PART}.b", "support"),
        ({"messages": ["hi"]}, "messages.0", "an object is wanted"),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content", "at least 1 item"),
    ],
)
def test_errors_name_the_place_in_the_body(url, options, param, says):
    found = post(url, json.dumps({"model": "tiny", "messages": question(), **options}))
    error = error_of(found)
    assert found.status_code == 400 and error["param"] == param
    assert says in error["message"] and not any(sign in error["message"] for sign in "[<")


def test_texts_that_follow_each_other_are_one(client):
    def num_tokens(content):
        return ask(client, [{"role": "user", "content": content}], max_tokens=1).usage.prompt_tokens

    whole = num_tokens("what colour is it?")
    assert num_tokens([{"type": "text", "text": text} for text in ("what col", "our ", "is it?")]) == whole


def test_what_changes_nothing_is_taken(client):
    neutral = {"n": 1, "frequency_penalty": 0, "logprobs": False, "user": "me", "response_format": {"type": "text"}}
    assert text_of(ask(client, question(), **neutral)) == text_of(ask(client, question()))


@pytest.mark.parametrize(
    "bad",
    [
        "/etc/passwd", "file:///etc/passwd", "photo.png", "iVBORw0KGgo=", "http://127.0.0.1/a.png", "ftp://x/a.png",
        "data:image/png;base64,", "data:image/png;base64,AAAA", "data:text/plain,hello", "data:image/png;base64,%%%",
        data_url(size=(301, 300)), data_url(Image.effect_noise((250, 250), 90)),
    ],
    ids=lambda bad: bad[:30],
)  # fmt: skip
def test_bad_images_are_refused_and_named(client, bad):
    with pytest.raises(openai.BadRequestError) as found:
        ask(client, question("what?", data_url(), bad))
    error = error_of(found.value)
    assert error["param"] == "messages.0.content.1.image_url" and error["code"] == "invalid_image"
    assert len(error["message"]) < 500


def test_a_body_that_does_not_say_it_is_json_hears_so(url):
    body = json.dumps({"model": "tiny", "messages": question()})
    found = post(url, body, **{"Content-Type": "application/x-www-form-urlencoded"})
    assert found.status_code == 400 and "Content-Type: application/json" in error_of(found)["message"]


def test_too_much_is_refused(client, url):
    with pytest.raises(openai.BadRequestError, match="4 images are more than the limit of 3"):
        ask(client, question("what?", *[data_url()] * 4))
    with pytest.raises(openai.BadRequestError, match="characters of text are more"):
        ask(client, question("a" * 20_000))
    with pytest.raises(openai.BadRequestError) as found:
        ask(client, question("qz" * 300))
    assert error_of(found.value)["code"] == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError):
        list(ask(client, question("qz" * 300), stream=True))

    def chunks():
        for _ in range(25):
            yield b" " * 10_000

    for body in (b" " * 250_000, chunks(), b" " * 1_000_000):  # announced, unannounced, far too large
        found = post(url, body)
        assert found.status_code == 413 and error_of(found)["code"] == "request_too_large"


def test_clients_get_their_own_answers(client):
    """Of text, one image and several, whole and in pieces, long and short; some break off, some are wrong."""
    draw = random.Random(0)
    asked = [
        (question(f"what is {n}?", *map(data_url, draw.sample(COLOURS, n % 4))), {"max_tokens": 1 + 5 * n % 17})
        for n in range(12)
    ]
    wanted = [text_of(ask(client, messages, **options)) for messages, options in asked]

    def one(number):
        messages, options = asked[number % 12]
        if number % 7 == 3:
            with pytest.raises(openai.BadRequestError):
                ask(client, question("what?", "data:image/png;base64,AAAA"))
        if number % 5 == 4:
            with ask(client, messages, stream=True, max_tokens=40) as events:
                next(iter(events))
        return streamed(client, messages, **options)[0] if number % 2 else text_of(ask(client, messages, **options))

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(one, range(48))) == wanted * 4


def test_who_has_gone_is_forgotten(client, service):
    with ask(client, question(), stream=True, max_tokens=40) as events:
        next(iter(events))
    end = time.monotonic() + 30
    while service.engine.load() != (0, 0) and time.monotonic() < end:
        time.sleep(0.02)
    assert service.engine.load() == (0, 0) and text_of(ask(client, question()))


def test_metrics(client, url):
    def value(name):
        lines = requests.get(f"{url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    before, tokens = value("vora_answers_total"), value("vora_answer_tokens_total")
    used = ask(client, question()).usage.completion_tokens
    assert value("vora_answers_total") == before + 1 and value("vora_answer_tokens_total") == tokens + used
    assert value("vora_running") == value("vora_waiting") == 0
