"""New weights for a running server: taken while it draws, and refused where they are not whole."""

import json
import shutil

import jax
import numpy as np
import pytest
from local_server import drawn, local_server
from safetensors.numpy import load_file, save_file
from tiny_run import tiny_checkpoint

from jaxrl.models.hf_config import read_config
from jaxrl.models.lora import LoraConfig, add_lora
from jaxrl.models.peft import save_adapter
from jaxrl.models.transformer import Transformer, initialize
from jaxrl.rollout.engine import Engine
from jaxrl.serving import served, start


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("inputs") / "tiny")


@pytest.fixture(scope="module")
def server(model):
    with local_server(model) as local:
        yield local


@pytest.fixture(scope="module")
def other(model):
    """The same model with other weights."""
    folder = tiny_checkpoint(model.parent / "other")
    tensors = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(0)
    changed = {k: v + rng.normal(0, 0.3, v.shape).astype(v.dtype) for k, v in tensors.items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_new_weights_are_drawn_with(model, server, other, tmp_path):
    before = drawn(server, "abc", max_tokens=8, temperature=0)
    answer = server.http.post("/update_weights_from_disk", json={"model_path": str(other)})
    assert answer.json() == {"success": True, "message": str(other), "version": 1}
    after = drawn(server, "abc", max_tokens=8, temperature=0)
    with local_server(other, server={"model_name": "tiny"}) as own:
        expected = drawn(own, "abc", max_tokens=8, temperature=0)
    assert after[0]["token_ids"] == expected[0]["token_ids"]
    assert after[0]["token_ids"] != before[0]["token_ids"]
    back = {"model_path": str(model), "version": 7}
    assert server.http.post("/update_weights_from_disk", json=back).json()["version"] == 7
    answer = server.http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 3})
    assert answer.json()["weights_version"] == 7
    assert drawn(server, "abc", max_tokens=8, temperature=0) == before
    for path, problem in (("/nowhere", "is no folder"), (str(tmp_path), "config.json")):
        answer = server.http.post("/update_weights_from_disk", json={"model_path": path})
        assert answer.status_code == 400 and problem in answer.json()["error"]["message"]
    assert drawn(server, "abc", max_tokens=8, temperature=0) == before


def test_new_weights_take_over_in_the_middle_of_a_request(model, server, other, monkeypatch):
    asked = {"max_tokens": 40, "temperature": 0, "ignore_eos": True}
    before, step = drawn(server, "abc", **asked)[0], Engine.step
    began, drew = server.served.service.engine.version, []

    def step_once(engine):
        """Draws nothing more with the old weights."""
        if engine.version == began and drew:
            return []
        drew.append(engine.version)
        return step(engine)

    monkeypatch.setattr(Engine, "step", step_once)
    whole = {"prompt": "abc", "stream": True, "return_token_ids": True, **asked}
    parts = []
    with server.http.stream("POST", "/v1/completions", json=whole) as answer:
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            parts.append(json.loads(line.removeprefix("data: "))["choices"][0])
            if len(parts) == 1:
                update = {"model_path": str(other), "version": began + 1}
                taken = server.http.post("/update_weights_from_disk", json=update)
                assert taken.status_code == 200, taken.text
    assert set(drew) == {began, began + 1}
    found = [token for part in parts for token in part["token_ids"]]
    first = parts[0]["token_ids"]
    assert len(found) == 40 and parts[-1]["finish_reason"] == "length"
    assert found[: len(first)] == before["token_ids"][: len(first)] and found != before["token_ids"]
    back = server.http.post("/update_weights_from_disk", json={"model_path": str(model)})
    assert back.status_code == 200
    assert drawn(server, "abc", **asked)[0] == before


def test_a_folder_is_read_when_all_of_it_is_there(model, server, tmp_path, monkeypatch):
    folder = shutil.copytree(model, tmp_path / "new")
    update = {"model_path": str(folder), "marker": "COMPLETE"}
    monkeypatch.setattr(served, "WHOLE_S", 0.0)
    answer = server.http.post("/update_weights_from_disk", json=update)
    assert answer.status_code == 408
    assert f"{folder} has no COMPLETE: it is not whole" in answer.json()["error"]["message"]
    long = update | {"model_path": "/" + "x" * 300}  # what the system itself refuses
    answer = server.http.post("/update_weights_from_disk", json=long)
    assert answer.status_code == 400 and "cannot be read" in answer.json()["error"]["message"]
    looks, is_file = [], served.Path.is_file

    def look(path):
        looks.append(path)
        if len(looks) == 3:
            path.touch()
        return is_file(path)

    monkeypatch.setattr(served, "WHOLE_S", 60.0)
    with monkeypatch.context() as patch:
        patch.setattr(served, "Path", type("Looks", (type(folder),), {"is_file": look}))
        assert server.http.post("/update_weights_from_disk", json=update).status_code == 200
    assert len(looks) == 3


def no_file(name):
    return lambda folder: (folder / name).unlink()


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def index_of_nothing(folder):
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def refuses(server, good, folder, problem):
    """`folder` is answered in one line, and what is drawn stays; `good` is taken."""
    before = drawn(server, "abc", max_tokens=8, temperature=0)
    answer = server.http.post("/update_weights_from_disk", json={"model_path": str(folder)})
    said = answer.json()["error"]["message"]
    assert answer.status_code == 400 and str(folder) in said and problem in said, said
    assert "\n" not in said
    assert drawn(server, "abc", max_tokens=8, temperature=0) == before
    again = server.http.post("/update_weights_from_disk", json={"model_path": str(good)})
    assert again.status_code == 200, again.text


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (no_file("config.json"), "config.json is missing"),
        (cut("config.json"), "is no valid JSON"),
        (no_file("model.safetensors"), "has neither model.safetensors nor"),
        (cut("model.safetensors"), "is truncated or no safetensors file"),
        (index_of_nothing, "model-00001-of-00001.safetensors is missing"),
    ],
)
def test_a_folder_that_is_not_whole_is_not_drawn_with(model, server, tmp_path, damage, problem):
    folder = shutil.copytree(model, tmp_path / "new")
    damage(folder)
    refuses(server, model, folder, problem)


@pytest.fixture(scope="module")
def adapter(model):
    adapted = add_lora(Transformer(read_config(model)), LoraConfig(rank=2))
    folder = model.parent / "adapter"
    save_adapter(initialize(adapted, jax.random.key(0)), folder, base=model)
    return folder


@pytest.fixture(scope="module")
def taking_adapters(model):
    with local_server(model, lora_rank=2) as local:
        yield local


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (no_file("adapter_config.json"), "holds no adapter, which this server takes"),
        (cut("adapter_config.json"), "is no valid JSON"),
        (no_file("adapter_model.safetensors"), "and no adapter_model.safetensors"),
        (cut("adapter_model.safetensors"), "is truncated or no safetensors file"),
        (shutil.rmtree, "holds no adapter, which this server takes"),
    ],
)
def test_an_adapter_that_is_not_whole_is_not_drawn_with(
    taking_adapters, adapter, tmp_path, damage, problem
):
    folder = shutil.copytree(adapter, tmp_path / "new")
    damage(folder)
    refuses(taking_adapters, adapter, folder, problem)


def test_a_folder_that_goes_while_it_is_read_is_not_drawn_with(model, server, monkeypatch):
    def gone(folder, **_):
        raise FileNotFoundError(2, "No such file or directory", str(folder / "model.safetensors"))

    monkeypatch.setattr(start, "load_pretrained", gone)
    answer = server.http.post("/update_weights_from_disk", json={"model_path": str(model)})
    assert answer.status_code == 400
    assert f"{model} cannot be read: " in answer.json()["error"]["message"]
