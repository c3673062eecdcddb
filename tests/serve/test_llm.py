"""`llm` with this server's models in its extra-openai-models.yaml, as docs/serve.md says, and its embeddings."""

import json

import pytest

from tests.serve.running import running

MODELS = """\
- {model_id: rkf, model_name: tiny, api_base: "http://127.0.0.1:PORT/v1", supports_schema: true, supports_tools: true}
- {model_id: rkf-text, model_name: tiny, api_base: "http://127.0.0.1:PORT/v1", completion: true}
- {model_id: rkf-responses, model_name: tiny, api_base: "http://127.0.0.1:PORT/v1", responses: true}
"""
EMBEDDING = "text-embedding-3-small"  # llm takes OpenAI's embedding models alone, at the address of OPENAI_BASE_URL
pytestmark = pytest.mark.filterwarnings("ignore")  # of llm and its plugins


@pytest.fixture(scope="module")
def served(paths):
    with running({"tiny": paths["tiny"], EMBEDDING: paths["tiny"]}) as port:
        yield port


@pytest.fixture
def llm(served, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    monkeypatch.setenv("LLM_LOAD_PLUGINS", "")
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{served}/v1")
    (tmp_path / "extra-openai-models.yaml").write_text(MODELS.replace("PORT", str(served)))
    import llm as found

    return found


@pytest.mark.parametrize("name", ["rkf", "rkf-responses"])
def test_prompts_and_streams(llm, model, name):
    wanted = model.chat([{"role": "user", "content": "The capital?"}], max_tokens=12)
    limit = {"max_tokens": 12}
    asked = llm.get_model(name)
    whole = asked.prompt("The capital?", stream=False, **limit)
    assert whole.text() == wanted
    assert whole.usage().output == 12
    assert "".join(asked.prompt("The capital?", stream=True, **limit)) == wanted


def test_a_conversation_and_a_system_prompt(llm, model):
    talk = llm.get_model("rkf").conversation()
    first = talk.prompt("The capital?", system="Be brief.", max_tokens=5).text()
    second = talk.prompt("And now?", max_tokens=5).text()
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The capital?"}]
    assert first == model.chat(messages, max_tokens=5)
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "And now?"}]
    assert second == model.chat(messages, max_tokens=5)


def test_completions(llm, model):
    found = llm.get_model("rkf-text").prompt("The capital", max_tokens=8, stream=False).text()
    assert found == model.generate("The capital", raw=True, max_tokens=8)


def test_a_schema(llm):
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    found = llm.get_model("rkf").prompt("A number?", schema=schema, stream=False, max_tokens=300).text()
    assert json.loads(found)["n"] in (1, 2)


def test_embeddings(llm, model):
    asked = llm.get_embedding_model("3-small")
    asked.key = "none"
    texts = ["The capital", "x"]
    assert list(asked.embed_multi(texts)) == model.embed(texts).tolist()
