"""The host's server with our GPT-2: real requests over HTTP, answered with what `generate` writes."""

import contextlib
import http.client
import json
import socket
import sys
import time

import click
import pytest
import transformers
from tiny import BERT, GPT2, VISION, tokenizer, widen

import hf_custom
from hf_custom import serving

for name in serving.REQUIREMENTS:
    pytest.importorskip(name, reason="the extra transformers[serving] is not installed")

NAME = "someone/tiny"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the moth"}]
PROMPT = "Be brief.\nthe moth\n"
NEW = 12


def bpe():
    return tokenizer(bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>")


@contextlib.contextmanager
def patched():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A model in a cache of the Hub, under its name, and the model."""
    cache = tmp_path_factory.mktemp("hub")
    repository = cache / f"models--{NAME.replace('/', '--')}"
    folder = repository / "snapshots" / ("0" * 40)
    transformers.set_seed(0)
    model = widen(hf_custom.CustomGPT2ForCausalLM(hf_custom.CustomGPT2Config(**GPT2))).eval()
    model.save_pretrained(folder)
    bpe().save_pretrained(folder)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    with patched() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        yield folder, model


@pytest.fixture(scope="module")
def server(repository):
    """Address of a running server."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    arguments = ["--host", "localhost", "--port", str(port), "--device", "cpu", "--log-level", "error"]
    running = serving.serve(NAME, [*arguments, "--non-blocking"])
    try:
        limit = time.monotonic() + 30
        while not running.server.started:
            assert time.monotonic() < limit and running._thread.is_alive()
            time.sleep(0.01)
        yield "localhost", port
    finally:
        running.kill_server()
    running._thread.join(timeout=10)
    assert not running._thread.is_alive()


def request(server, method, path, body=None):
    connection = http.client.HTTPConnection(*server, timeout=30)
    try:
        connection.request(method, path, body and json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def ask(server, **fields):
    body = {"model": NAME, "messages": MESSAGES, "temperature": 0, "max_tokens": NEW, **fields}
    return request(server, "POST", "/v1/chat/completions", body)


def written(model, prompt=PROMPT, count=NEW):
    """What greedy search writes behind a prompt."""
    reader = bpe()
    ids = reader(prompt, return_tensors="pt")
    tokens = model.generate(**ids, max_new_tokens=count, do_sample=False)
    return reader.decode(tokens[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_answer_is_what_greedy_search_writes(server, repository):
    status, text = ask(server)
    assert status == 200, text
    answer = json.loads(text)
    expected = written(repository[1])
    assert len(expected) >= NEW
    assert answer["choices"][0]["message"] == {"content": expected, "role": "assistant"}
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == NEW
    assert answer["usage"]["prompt_tokens"] == len(bpe()(PROMPT)["input_ids"])


def events_of(text):
    return [line.removeprefix("data: ") for line in text.split("\n\n") if line]


def test_stream_joins_to_the_same_text(server, repository):
    status, text = ask(server, stream=True)
    assert status == 200, text
    events = events_of(text)
    chunks = [json.loads(event) for event in events if event != "[DONE]"]
    parts = [chunk["choices"][0]["delta"].get("content") for chunk in chunks]
    assert "".join(part for part in parts if part) == written(repository[1])
    assert len([part for part in parts if part]) > 1
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["usage"]["completion_tokens"] == NEW
    assert all(chunk["model"] == f"{NAME}@main" for chunk in chunks)


def test_request_may_bring_its_own_template(server, repository):
    template = "{{ messages[-1]['content'] }}"
    _, text = ask(server, chat_template_kwargs={"chat_template": template})
    content = json.loads(text)["choices"][0]["message"]["content"]
    assert content == written(repository[1], "the moth") != written(repository[1])


def test_models_are_listed(server):
    status, text = request(server, "GET", "/v1/models")
    assert status == 200 and [model["id"] for model in json.loads(text)["data"]] == [NAME]


def test_server_answers_what_the_chat_client_asks(server, repository):
    """`transformers chat` asks for health, for the model to be loaded, then for a stream by a generation config."""
    assert request(server, "GET", "/health") == (200, '{"status":"ok"}')
    _, text = request(server, "POST", "/load_model", {"model": NAME})
    assert [json.loads(event)["status"] for event in events_of(text)] == ["ready"]
    config = transformers.GenerationConfig(max_new_tokens=NEW, do_sample=False)
    body = {"model": NAME, "messages": MESSAGES, "stream": True, "generation_config": config.to_json_string()}
    status, text = request(server, "POST", "/v1/chat/completions", body)
    chunks = [json.loads(event) for event in events_of(text) if event != "[DONE]"]
    parts = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks]
    assert status == 200 and "".join(parts) == written(repository[1])


def test_chat_client_holds_a_conversation(server, repository, monkeypatch, capsys):
    from transformers.cli import chat

    lines = iter(["the moth", "!exit"])
    monkeypatch.setattr(chat.RichInterface, "input", lambda self: next(lines))
    monkeypatch.setattr(chat.RichInterface, "confirm", lambda self, message, default=False: False)
    # Offline, the client refuses its own machine's server too.
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)
    heard = []
    stream_output = chat.RichInterface.stream_output

    async def listen(self, stream):
        heard.append(await stream_output(self, stream))
        return heard[-1]

    monkeypatch.setattr(chat.RichInterface, "stream_output", listen)
    flags = [f"max_new_tokens={NEW}", "do_sample=False"]
    chat.Chat(NAME, f"http://{server[0]}:{server[1]}", flags, save_folder=str(repository[0].parent))
    assert heard == [(written(repository[1], "the moth\n"), "length")]


def test_other_model_is_refused(server):
    status, text = ask(server, model="someone/else")
    assert status == 400 and NAME in text


# --- What happens before the server starts ---


def test_classes_are_found_where_the_server_looks():
    serving.expose_classes()
    assert transformers.CustomGPT2ForCausalLM is hf_custom.CustomGPT2ForCausalLM
    assert transformers.CustomBertForCausalLM is hf_custom.CustomBertForCausalLM
    assert transformers.GPT2LMHeadModel.__module__.startswith("transformers.")


@pytest.mark.parametrize("given", [[], ["--chat-template-kwargs", '{"x": 1}'], ['--chat-template-kwargs={"x": 1}']])
def test_template_joins_the_options_of_the_user(repository, given):
    found = serving.template_arguments(str(repository[0]), ["--port", "1", *given])
    assert found[:3] == ["--port", "1", "--chat-template-kwargs"] and len(found) == 4
    assert json.loads(found[3]) == {"chat_template": serving.PLAIN_TEMPLATE, **({"x": 1} if given else {})}


def test_template_of_the_user_or_of_the_tokenizer_stays(repository, tmp_path):
    own = ["--chat-template-kwargs", '{"chat_template": "mine"}']
    assert serving.template_arguments(str(repository[0]), own) == own
    repository[1].config.save_pretrained(tmp_path)
    reader = bpe()
    reader.chat_template = "mine"
    reader.save_pretrained(tmp_path)
    assert serving.template_arguments(str(tmp_path), ["--port", "1"]) == ["--port", "1"]


@pytest.mark.parametrize("value", ["{", "[1]"])
def test_options_that_are_no_object_are_refused(repository, value):
    with pytest.raises(ValueError, match="--chat-template-kwargs"):
        serving.template_arguments(str(repository[0]), ["--chat-template-kwargs", value])


def test_missing_package_is_named_with_the_command(monkeypatch, repository):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.setattr(serving, "find_spec", lambda name: None if name in ("uvicorn", "rich") else object())
    with pytest.raises(ImportError, match=r"needs uvicorn, rich\. .*pip install 'transformers\[serving\]'"):
        serving.serve(NAME)


def test_model_that_writes_nothing_is_refused(tmp_path):
    config = hf_custom.CustomBertConfig(**BERT)
    config.architectures = ["CustomBertForMaskedLM"]
    config.save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="CustomBertForMaskedLM, which the server cannot run"):
        serving.serve(str(tmp_path / "bert"))
    config = hf_custom.CustomBlip2Config(vision_config=VISION, text_config={**GPT2, "model_type": "custom_gpt2"})
    config.architectures = ["CustomBlip2ForConditionalGeneration"]
    config.save_pretrained(tmp_path / "blip2")
    with pytest.raises(ValueError, match="language models that write text"):
        serving.serve(str(tmp_path / "blip2"))


def test_folder_that_reads_as_a_revision_is_refused(tmp_path, repository):
    folder = tmp_path / "a@b"
    repository[1].config.save_pretrained(folder)
    with pytest.raises(ValueError, match="Rename the folder"):
        serving.serve(str(folder))


def test_folder_without_configuration_is_refused(tmp_path):
    with pytest.raises(OSError, match=r"config\.json"):
        serving.serve(str(tmp_path))


def test_unknown_option_is_refused_by_name(repository):
    with pytest.raises(ValueError, match="--portt"):
        serving.serve(NAME, ["--portt", "1"])


def test_interrupted_server_ends_quietly(repository, monkeypatch, tmp_path):
    def interrupted(*args, **kwargs):
        raise click.Abort

    cache = tmp_path / "cache"
    monkeypatch.setattr("transformers.cli.transformers.app", interrupted)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    assert serving.serve(str(repository[0])) is None
    # Without it the server's list of models is an error.
    assert cache.is_dir()


def test_template_joins_contents_and_nothing_else():
    text = bpe().apply_chat_template(MESSAGES, chat_template=serving.PLAIN_TEMPLATE, tokenize=False)
    assert text == PROMPT
