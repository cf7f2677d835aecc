"""The server: answers are the library's, in OpenAI's shapes, and whatever it does not know it refuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.serving.running import MODEL, Running, openai, running
from tests.tiny_folder import CONTEXT, QUESTIONS
from tests.tiny_folder import folder as folder

from coldpress import KVPressTextGenerationPipeline, PressedCache, SnapKVPress, Snapshots
from coldpress.architecture.cache_argument import cache_argument
from coldpress.errors import InputError
from coldpress.loading.models import LoadedModel, load_model
from coldpress.serving.answering import picked
from coldpress.serving.refusing import refusal
from coldpress.serving.streaming import GrowingText

PRESS = SnapKVPress(0.5, window_size=8)
DOCUMENT = [{"role": "user", "content": CONTEXT}]


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load_model(str(folder), device="cpu")


@pytest.fixture(scope="module")
def server(loaded: LoadedModel) -> Iterator[Running]:
    with running(loaded, PRESS) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def greedy(loaded: LoadedModel, text: str, snapshot_of: str | None, n: int) -> str:
    """What the library makes of a text whose beginning is compressed."""
    snapshots = Snapshots(loaded.model, loaded.tokenizer, PRESS)
    if snapshot_of is not None:
        snapshots.add(snapshot_of)
    ids = torch.tensor([loaded.tokenizer(text)["input_ids"]])
    cache = snapshots.fork(ids)
    assert bool(cache.seen_tokens) == (snapshot_of is not None)
    output = loaded.model.generate(ids, **cache_argument(cache), max_new_tokens=n, do_sample=False, pad_token_id=1)
    return str(loaded.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


# Answers


@pytest.mark.parametrize("read_tokens", [2048, 5])
def test_a_served_greedy_answer_is_the_librarys(loaded: LoadedModel, server: Running, read_tokens: int) -> None:
    snapshot = server.add(text=CONTEXT)
    limits = server.service.limits
    object.__setattr__(limits, "read_tokens", read_tokens)
    for question in QUESTIONS:
        asked = {"prompt": question, "snapshot": snapshot["id"], "temperature": 0, "max_tokens": 12}
        body = server.post("/v1/completions", asked).json()
        assert body["choices"][0]["text"] == greedy(loaded, CONTEXT + question, CONTEXT, 12)
        assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": snapshot["tokens"]}
        assert body["usage"]["completion_tokens"] <= 12
        found = server.post("/v1/completions", asked | {"prompt": CONTEXT + question, "snapshot": None}).json()
        assert found["choices"] == body["choices"] and found["usage"] == body["usage"]  # by its tokens
    object.__setattr__(limits, "read_tokens", 2048)
    body = server.post("/v1/completions", {"prompt": QUESTIONS[0], "temperature": 0, "max_tokens": 9}).json()
    assert body["choices"][0]["text"] == greedy(loaded, QUESTIONS[0], None, 9)
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


def test_a_chat_is_the_pipelines(loaded: LoadedModel, server: Running, client: Any) -> None:
    pipe = KVPressTextGenerationPipeline(model=loaded.model, tokenizer=loaded.tokenizer, device="cpu")
    snapshot = server.add(messages=DOCUMENT)
    ids = loaded.tokenizer(f"{loaded.tokenizer.bos_token}{CONTEXT}")["input_ids"][: snapshot["tokens"]]
    question = f"{CONTEXT[len(loaded.tokenizer.decode(ids, skip_special_tokens=True)) :]}{QUESTIONS[0]}"
    cache = PressedCache(PRESS)
    pipe(loaded.tokenizer.decode(ids, skip_special_tokens=True), questions=[], cache=cache)
    assert cache.seen_tokens == snapshot["tokens"]
    expected = pipe(question=question, cache=cache, max_new_tokens=10)["answer"]
    messages: Any = [{"role": "user", "content": QUESTIONS[0]}]
    more = {"snapshot": snapshot["id"]}
    answer = client.chat.completions.create(
        model=MODEL, messages=messages, temperature=0, max_tokens=10, extra_body=more
    )
    assert answer.choices[0].message.content == expected
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == snapshot["tokens"]
    whole: Any = [{"role": "user", "content": CONTEXT + QUESTIONS[0]}]
    again = client.chat.completions.create(model=MODEL, messages=whole, temperature=0, max_completion_tokens=10)
    assert again.choices == answer.choices and again.usage == answer.usage


def test_streams(client: Any) -> None:
    messages: Any = [{"role": "user", "content": CONTEXT + QUESTIONS[1]}]
    options: Any = {"model": MODEL, "messages": messages, "seed": 5, "n": 2, "max_tokens": 15}
    whole = client.chat.completions.create(**options)
    texts, reasons, usage = ["", ""], [None, None], None
    for chunk in client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in whole.choices] and texts[0] != texts[1]
    assert reasons == [choice.finish_reason for choice in whole.choices] and usage == whole.usage
    text = "".join(
        chunk.choices[0].text
        for chunk in client.completions.create(model=MODEL, prompt=QUESTIONS[2], temperature=0, stream=True)
    )
    assert text == client.completions.create(model=MODEL, prompt=QUESTIONS[2], temperature=0).choices[0].text


def test_seeds_and_choices(server: Running) -> None:
    def texts(**options: Any) -> list[str]:
        body = server.post("/v1/completions", {"prompt": QUESTIONS, "max_tokens": 8, "n": 2, **options}).json()
        assert [choice["index"] for choice in body["choices"]] == list(range(6))
        return [choice["text"] for choice in body["choices"]]

    assert texts(seed=1) == texts(seed=1) != texts(seed=2)
    assert texts() != texts()
    assert texts(seed=1, top_p=0) == texts(temperature=0)
    assert texts(seed=-(2**63), temperature=5e-324) == texts(temperature=0)


def test_stop_texts_are_no_part_of_an_answer(server: Running) -> None:
    asked = {"prompt": QUESTIONS[0], "temperature": 0, "max_tokens": 20}
    text = server.post("/v1/completions", asked).json()["choices"][0]["text"]
    for stop in (text[7:12], ["nowhere to be found", text[3:5]], text[-1]):
        first = min(text.find(one) for one in ([stop] if isinstance(stop, str) else stop) if one in text)
        choice = server.post("/v1/completions", asked | {"stop": stop}).json()["choices"][0]
        assert choice["text"] == text[:first] and choice["finish_reason"] == "stop"
    assert server.post("/v1/completions", asked | {"stop": text + "!"}).json()["choices"][0]["text"] == text


def test_probabilities_are_the_models(loaded: LoadedModel, server: Running) -> None:
    asked = {"prompt": QUESTIONS[0], "temperature": 0, "max_tokens": 5, "logprobs": 3, "echo": True}
    object.__setattr__(server.service.limits, "read_tokens", 3)
    choice = server.post("/v1/completions", asked).json()["choices"][0]
    object.__setattr__(server.service.limits, "read_tokens", 2048)
    ids = loaded.tokenizer(QUESTIONS[0])["input_ids"]
    told = choice["logprobs"]
    assert len(told["tokens"]) == len(ids) + 5 and "".join(told["tokens"]) == choice["text"]
    assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
    assert told["text_offset"][1] == len(told["tokens"][0])
    made = loaded.model.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False, pad_token_id=1)
    expected = loaded.model(made).logits[0].log_softmax(-1)
    for place, (logprob, top) in enumerate(zip(told["token_logprobs"][1:], told["top_logprobs"][1:], strict=True)):
        assert logprob == pytest.approx(float(expected[place, made[0, place + 1]]), abs=1e-4)
        assert max(top.values()) == pytest.approx(float(expected[place].max()), abs=1e-4)
    scored = server.post("/v1/completions", asked | {"max_tokens": 0, "prompt": ids}).json()["choices"][0]
    n = len(ids)
    assert scored["logprobs"]["token_logprobs"][1:] == pytest.approx(told["token_logprobs"][1:n], abs=1e-5)
    assert scored["text"] == QUESTIONS[0] and scored["finish_reason"] == "length"
    body = {"messages": [{"role": "user", "content": "Who?"}], "max_tokens": 3, "logprobs": True, "top_logprobs": 2}
    content = server.post("/v1/chat/completions", body | {"temperature": 0}).json()["choices"][0]["logprobs"]["content"]
    assert len(content) == 3
    for one in content:
        assert one["token"] == one["top_logprobs"][0]["token"] and one["logprob"] == one["top_logprobs"][0]["logprob"]
        assert one["bytes"] is None or bytes(one["bytes"]).decode() == one["token"]


def test_drawing() -> None:
    logits, generator = torch.tensor([0.0, 3.0, 2.0, -50.0]), torch.Generator().manual_seed(0)
    drawn = [picked(logits, 1.0, 1.0, generator) for _ in range(300)]
    shares = logits.softmax(-1)
    for token in range(4):
        assert drawn.count(token) / 300 == pytest.approx(float(shares[token]), abs=0.08)
    assert {picked(logits, 1.0, 0.7, generator) for _ in range(50)} == {1}
    assert {picked(logits, 1.0, 0.9, generator) for _ in range(50)} == {1, 2}
    assert picked(logits, 0.0, 1.0, generator) == 1


def test_texts_grow_by_whole_characters(loaded: LoadedModel) -> None:
    text = "Ὀλίγα δένδρα, 樹木 and trees; naïve 🌳."
    ids = loaded.tokenizer(text)["input_ids"]
    for stop in ((), ("never",), ("tr",)):
        growing = GrowingText(loaded.tokenizer, stop)
        parts = [growing.add(token) for token in ids] + [growing.finish()]
        assert "".join(parts) == (text[: text.index("tr")] if stop == ("tr",) else text)
        assert not any("�" in part for part in parts)


# Snapshots


def test_snapshots_are_made_shown_and_removed(server: Running) -> None:
    made = server.add(text=CONTEXT + "One.", press="knorm", compression_ratio=0.25, kv_bits=8)
    assert made["press"] == "KnormPress(compression_ratio=0.25)" and made["kv_bits"] == 8
    assert made["removed_ratio"] == pytest.approx(0.25, abs=0.02) and made["tier"] == "memory" and made["bytes"] > 0
    smaller = server.add(text=CONTEXT + "One.", budget_tokens=20, chunk_tokens=30)
    assert smaller["id"] != made["id"] and smaller["bytes"] < made["bytes"] and "window_size=8" in smaller["press"]
    none = server.add(text=CONTEXT + "One.", press="no_press")
    assert none["press"] is None and none["removed_ratio"] == 0
    listed = server.client.get("/v1/snapshots").json()
    assert [one["id"] for one in listed["data"][:3]] == [none["id"], smaller["id"], made["id"]]
    assert listed["counts"]["memory_bytes"] == sum(one["bytes"] for one in listed["data"])
    assert server.client.get(f"/v1/snapshots/{made['id']}").json() == made
    for one in (made, smaller, none):
        answer = {"prompt": " Two.", "snapshot": one["id"], "max_tokens": 3, "temperature": 0}
        assert server.post("/v1/completions", answer).json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 100
        gone = server.client.delete(f"/v1/snapshots/{one['id']}")
        assert gone.json() == {"id": one["id"], "object": "snapshot", "deleted": True}
        response = server.post("/v1/completions", answer)
        assert response.status_code == 404 and response.json()["error"]["code"] == "snapshot_not_found"


def test_what_is_made_again_was_not_there(loaded: LoadedModel) -> None:
    with running(loaded, PRESS, budget_bytes=40_000) as server:
        made = [server.add(text=f"{number} {CONTEXT}") for number in ("One.", "Two.")]
        asked = {"prompt": "Who?", "max_tokens": 1, "temperature": 0}
        assert server.client.get(f"/v1/snapshots/{made[0]['id']}").json()["tier"] == "declared"
        found = [server.post("/v1/completions", asked | {"snapshot": made[0]["id"]}).json() for _ in range(2)]
        cached = [one["usage"]["prompt_tokens_details"]["cached_tokens"] for one in found]
        assert cached == [0, made[0]["tokens"]] and found[0]["choices"] == found[1]["choices"]


def test_a_long_question_after_a_prefix_in_pieces(loaded: LoadedModel, server: Running) -> None:
    made = server.add(text=CONTEXT[:100], chunk_tokens=8)
    question = {"prompt": " " + CONTEXT[100:200], "snapshot": made["id"], "max_tokens": 3, "temperature": 0}
    assert server.post("/v1/completions", question).status_code == 200
    server.client.delete(f"/v1/snapshots/{made['id']}")


# What is refused

SAY = [{"role": "user", "content": "Who?"}]
CHAT = [
    ({}, "messages must be a list of messages"),
    ({"messages": []}, "messages must be a list of messages"),
    ({"messages": SAY, "temperature": 3}, "temperature must be a number from 0 to 2, got 3"),
    ({"messages": SAY, "temperature": True}, "temperature must be a number"),
    ({"messages": SAY, "max_tokens": "5"}, 'max_tokens must be an integer from 1 to 2147483648, got "5"'),
    ({"messages": SAY, "max_tokens": 0}, "max_tokens must be an integer from 1"),
    ({"messages": SAY, "max_tokens": 5000}, "The prompt has 5 tokens and asks for 5000 more, and the model has 256"),
    ({"messages": SAY, "max_tokens": 200}, "max_tokens must be at most 100 on this server"),
    ({"messages": SAY, "max_tokens": 5, "max_completion_tokens": 6}, "differ; give one"),
    ({"messages": SAY, "n": 17}, "n must be an integer from 1 to 16"),
    ({"messages": SAY, "top_logprobs": 2}, "top_logprobs needs logprobs: true"),
    ({"messages": SAY, "tools": [{"type": "function"}]}, r"tools is not supported; leave it out or give \[\]"),
    ({"messages": SAY, "tool_choice": "required"}, 'tool_choice is not supported; leave it out or give "none" or give'),
    ({"messages": SAY, "temprature": 0}, "Did you mean 'temperature'"),
    ({"messages": SAY, "presence_penalty": 0.5}, r"presence_penalty is not supported; leave it out or give 0\.$"),
    ({"messages": SAY, "stop": ["a"] * 17}, "stop must be a text or a list of up to 16"),
    ({"messages": SAY, "stop": [""]}, "stop must be texts of 1 to 1000"),
    ({"messages": SAY, "stream_options": {"include_usage": True}}, "stream_options needs stream: true"),
    ({"messages": SAY, "stream": 1}, "stream must be true or false, got 1"),
    ({"messages": SAY, "snapshot": 7}, "snapshot must be a text, got 7"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "role must be one of system, developer"),
    ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\].content must be a text, got null"),
    ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, 'has "name"'),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "the model reads texts alone"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "without lone surrogates"),
    ({"messages": [{"role": "user", "content": "tree " * 300}]}, "and the model has 256 positions"),
]
TEXT = [
    ({"prompt": ""}, "The prompt has no tokens"),
    ({"prompt": [4096]}, "token ids from 0 to 4095"),
    ({"prompt": [1, "a"]}, "token ids from 0 to 4095"),
    ({"prompt": {}}, "prompt must be a text, a list of texts"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens must be at least 1, unless"),
    ({"prompt": ["a"] * 17}, "n times prompts must be at most 16"),
    ({"prompt": "a", "best_of": 2}, "best_of is not supported"),
    ({"prompt": "a", "logprobs": 9}, "logprobs must be an integer from 0 to 5"),
]
MADE = [
    ({}, "of a text, of messages or of a file"),
    ({"text": "a", "messages": SAY}, "of a text, of messages or of a file"),
    ({"text": ""}, "The text is empty"),
    ({"text": CONTEXT, "press": "snapkw"}, "Unknown press 'snapkw'. Did you mean 'snapkv'"),
    ({"text": CONTEXT, "press": ["snapkv"]}, "press must be the name of a press"),
    ({"text": CONTEXT, "compression_ratio": "half"}, r"compression_ratio must be a number in \[0, 1\)"),
    ({"text": CONTEXT, "compression_ratio": "0.5"}, r"must be a number in \[0, 1\), got '0\.5'\.$"),
    ({"text": CONTEXT, "budget_tokens": "9"}, r"budget_tokens must be an integer of at least 1, got '9'\.$"),
    ({"text": CONTEXT, "presss": "knorm"}, r"^Unknown option \"presss\"\. Did you mean 'press'"),
    ({"text": CONTEXT, "compression_ratio": 1.5}, "compression_ratio"),
    ({"text": CONTEXT, "compression_ratio": 0.5, "budget_tokens": 9}, "both say how much is kept"),
    ({"text": CONTEXT, "budget_tokens": 0}, "budget_tokens must be an integer of at least 1"),
    ({"text": CONTEXT, "press_args": {"window": 3}}, "no parameter 'window'"),
    ({"text": CONTEXT, "press_args": {"window_size": "a"}}, "window_size must be int"),
    ({"text": CONTEXT, "press_args": 3}, "press_args must be a dictionary"),
    ({"text": CONTEXT, "press": "qfilter", "press_args": {"filters": "/etc"}}, "filters names a file"),
    ({"text": CONTEXT, "press": "duo_attention", "press_args": {"pattern": "/etc/passwd"}}, "pattern names a file"),
    ({"text": CONTEXT, "press": "lukv", "press_args": {"curves": "/etc/passwd"}}, "curves names a file"),
    ({"text": CONTEXT, "press": "restorekv", "press_args": {"weights": "/etc"}}, "weights names a file"),
    ({"text": CONTEXT, "press": "fastkvzip", "press_args": {"weights": "/etc"}}, "weights names a file"),
    ({"text": CONTEXT, "press": "quality", "press_args": {"thresholds": "/etc"}}, "thresholds names a file"),
    ({"text": CONTEXT, "press": "kvzap", "press_args": {"weights": "/etc"}}, "weights names a file"),
    ({"text": CONTEXT, "press": "decoding_triattention", "press_args": {"stats": "/etc"}}, "stats names a file"),
    ({"text": CONTEXT, "kv_bits": 3}, "kv_bits must be 8, 4, 2 or null"),
    ({"text": CONTEXT, "press": "decoding_knorm"}, "goes on while decoding"),
    ({"text": CONTEXT, "file": "/etc/passwd"}, "give one of them"),
    ({"text": CONTEXT * 3}, "and the model has 256 positions"),
]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        *(("/v1/chat/completions", *case) for case in CHAT),
        *(("/v1/completions", *case) for case in TEXT),
        *(("/v1/snapshots", *case) for case in MADE),
    ],
)
def test_what_is_refused(server: Running, path: str, body: Any, message: str) -> None:
    object.__setattr__(server.service.limits, "new_tokens", 100)
    # httpx writes no lone surrogates
    response = server.client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert re.search(message, error["message"]), error["message"]


@pytest.mark.parametrize("name", ["foo", "reasoning_effort"])
def test_an_option_that_is_like_none_of_ours_is_taken_for_none(server: Running, name: str) -> None:
    response = server.post("/v1/chat/completions", {"messages": SAY, name: 1})
    assert response.json()["error"]["message"] == f'Unknown option "{name}".'


def test_no_client_hears_where_things_lie(
    server: Running, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An artefact that is missing was named with its path, and the model with its folder."""
    monkeypatch.setenv("COLDPRESS_ARTEFACTS", str(tmp_path / "with blanks" / "art"))
    response = server.post("/v1/snapshots", {"text": CONTEXT, "press": "qfilter"})
    said = response.json()["error"]["message"]
    assert response.status_code == 400 and "there is no [path], and none are published" in said
    assert not any(word in said for word in (str(tmp_path), str(folder), "blanks", str(Path.home())))
    for given, left in (
        ("'/srv/my models/a' is damaged (/etc/x).", "'[path]' is damaged ([path])."),
        ("see https://a.b/c/d, EleutherAI/pythia-70m and 1/2", "see https://a.b/c/d, EleutherAI/pythia-70m and 1/2"),
    ):
        assert str(refusal(InputError(given))) == left


def test_what_clients_send_without_meaning_it(server: Running) -> None:
    idle = {"tools": [], "tool_choice": "auto", "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}}
    idle |= {"response_format": {"type": "text"}, "store": False, "metadata": {}, "user": "me", "seed": None}
    assert server.post("/v1/chat/completions", {"messages": SAY, "max_tokens": 1, **idle}).status_code == 200


def test_openais_errors(client: Any) -> None:
    with pytest.raises(openai.NotFoundError, match="There is no model 'gpt-4' here; ask for 'tiny'"):
        client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "Who?"}])
    with pytest.raises(openai.BadRequestError, match="Unknown option"):
        client.completions.create(model=MODEL, prompt="a", extra_body={"beams": 4})
    with pytest.raises(openai.NotFoundError, match="There is no snapshot"):
        client.completions.create(model=MODEL, prompt="a", extra_body={"snapshot": "../../etc/passwd"})


def test_snapshots_of_the_other_kind(server: Running) -> None:
    text, chat = server.add(text=CONTEXT), server.add(messages=DOCUMENT)
    response = server.post("/v1/chat/completions", {"messages": SAY, "snapshot": text["id"]})
    assert response.status_code == 400 and "ask it at /v1/completions" in response.text
    response = server.post("/v1/completions", {"prompt": "Who?", "snapshot": chat["id"]})
    assert response.status_code == 400 and "ask it at /v1/chat/completions" in response.text
    response = server.post("/v1/completions", {"prompt": "Who?", "snapshot": text["id"], "echo": True})
    assert response.status_code == 400 and "echo needs all tokens" in response.text


# Other paths


def test_models_health_and_metrics(server: Running, client: Any) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "coldpress"
    assert server.client.get("/health").json() == {"status": "ok"}
    server.post("/v1/completions", {"prompt": "Who?", "max_tokens": 2})
    found = server.client.get("/metrics").text
    assert 'coldpress_requests_total{path="/v1/completions",status="200"}' in found
    for name in ("completion_tokens_total", "snapshot_hits_total", "running 0.0", "first_token_seconds_count"):
        assert f"coldpress_{name}" in found
    assert f'coldpress_snapshot_bytes{{tier="memory"}} {float(server.service.snapshots.memory_bytes)}' in found
    for method, path, status in (("GET", "/no", 404), ("GET", "/v1/completions", 405), ("GET", "/v1/models/no", 404)):
        response = server.client.request(method, path)
        assert response.status_code == status and response.json()["error"]["message"]
    for path in ("/docs", "/openapi.json"):
        assert server.client.get(path).status_code == 404


def test_keys_and_hosts(loaded: LoadedModel) -> None:
    with running(loaded, api_key="sesame", hosts=("127.0.0.1",)) as server:
        get = server.client.get
        assert get("/health").status_code == 200
        for headers in ({}, {"authorization": "Bearer sesam"}, {"authorization": "Basic sesame"}):
            response = get("/v1/models", headers=headers)
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
        assert get("/metrics").status_code == 401
        assert get("/v1/models", headers={"authorization": "bearer sesame"}).status_code == 200
        for host in ("evil.example", "127.0.0.1.evil.example:80", ""):
            response = get("/health", headers={"host": host})
            assert response.status_code == 403 and response.json()["error"]["code"] == "wrong_host"
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="sesame", max_retries=0) as client:
            assert len(client.models.list().data) == 1


def test_the_page_asks_nobody_else(server: Running, tmp_path: Path) -> None:
    response = server.client.get("/")
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/html")
    page = response.text
    assert "default-src 'none'" in page and "connect-src 'self'" in page
    assert not re.search(r"https?://|<script src|<link|@import|innerHTML", page)
    names = set(re.findall(r"""at\("(\w+)"\)""", page))
    assert names == set(re.findall(r""" id="(\w+)\"""", page))
    for path in set(re.findall(r'call\("(/[^"]*)"', page)):
        assert server.client.get(path.rstrip("/")).status_code in (200, 405), path
    if shutil.which("node"):
        script = tmp_path / "page.js"
        script.write_text(re.findall(r"<script>\n(.*)</script>", page, re.S)[0])
        subprocess.run(["node", "--check", str(script)], check=True)


def test_the_page_of_what_is_kept(server: Running) -> None:
    made = server.add(text=CONTEXT)
    page = server.client.get(f"/v1/snapshots/{made['id']}/page")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    data = json.loads(re.findall(r'<script[^>]*type="application/json"[^>]*>(.*?)</script>', page.text, re.S)[0])
    assert data["text"] == CONTEXT[: len(data["text"])] and len(data["text"]) > len(CONTEXT) - 10
    assert data["presses"][0]["pairs"] == data["presses"][0]["before"] // 2 == made["tokens"] * 4
    assert server.client.get(f"/v1/snapshots/{made['id']}").json()["uses"] == made["uses"]
    none = server.add(text=CONTEXT, press="no_press")
    assert server.client.get(f"/v1/snapshots/{none['id']}/page").status_code == 400
