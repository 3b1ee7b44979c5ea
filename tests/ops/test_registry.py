"""Which implementation of an op is taken, for what, and what it is given."""

import types

import jax
import jax.numpy as jnp
import pytest

from jaxrl.ops import registry, tokamax_kernels
from jaxrl.ops.attention import ATTENTION, flash_attention
from jaxrl.ops.grouped_matmul import GROUPED_MATMUL, grouped_matmul
from jaxrl.ops.registry import Implementation, Op, Target

H100 = Target("gpu", "NVIDIA H100 80GB HBM3", 90)
A100 = Target("gpu", "NVIDIA A100-SXM4-80GB", 80)
CPU = Target("cpu")


@pytest.mark.parametrize("said", ["8.0", "8.6", "9.0", "10.3", "12.0"])
def test_a_target_is_what_its_device_says(said):
    device = types.SimpleNamespace(platform="gpu", device_kind="some GPU", compute_capability=said)
    assert Target.of(device) == Target("gpu", "some GPU", int(said.replace(".", "")))
    assert Target.of(types.SimpleNamespace(platform="cpu")) == CPU


def test_the_oracle_is_neither_chosen_nor_recommended():
    oracle = Implementation("oracle", lambda _: min, lambda _: None)
    other = Implementation("other", lambda _: max, lambda _: None)
    never = Implementation("never", lambda _: max, lambda _: "is not here")
    op = Op("op", (oracle, other, never), never_auto=frozenset({"oracle"}))
    assert op.resolve("auto", CPU) == ("other", max)
    assert op.resolve("oracle", CPU) == ("oracle", min)
    with pytest.raises(ValueError, match=r"op 'never' is not here; use 'other'$"):
        op.resolve("never", CPU)


@pytest.fixture
def all_validated(monkeypatch):
    monkeypatch.setattr(registry, "is_validated", lambda kernel, gpu: True)
    monkeypatch.setattr(registry, "has_failed", lambda kernel, gpu: False)


@pytest.mark.usefixtures("all_validated")
@pytest.mark.parametrize("target", [H100, A100])
def test_what_a_call_asks_for_decides(target):
    case = {"dtype": jnp.bfloat16, "head_dim": 128, "seq_len": 512, "packed": False, "lse": False}

    def taken(**change):
        return ATTENTION.resolve("auto", target, **(case | change))[0]

    assert taken() == taken(dtype=jnp.float16) == "cudnn"
    assert taken(lse=True) == taken(packed=True) == taken(head_dim=256) == "triton"
    for name in ("cudnn", "tokamax") if target == H100 else ("cudnn",):
        with pytest.raises(ValueError, match=f"{name}' gives no log-sum-exp that can be different"):
            ATTENTION.resolve(name, target, **(case | {"lse": True}))
    q, ids = jnp.zeros((1, 4, 2, 16), jnp.bfloat16), jnp.zeros((1, 4), jnp.int32)
    for asked, said in (({"return_lse": True}, "log-sum-exp"), ({"segment_ids": ids}, "no packed")):
        with pytest.raises(ValueError, match=said):
            flash_attention(q, q, q, **asked, implementation="cudnn", target=target)


@pytest.mark.usefixtures("all_validated")
def test_cudnn_is_given_the_options(monkeypatch):
    seen = []
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *_, **given: seen.append(given))
    q = jnp.zeros((1, 4, 2, 16), jnp.bfloat16)
    flash_attention(q, q, q, causal=False, scale=0.5, implementation="cudnn", target=H100)
    assert seen == [{"scale": 0.5, "is_causal": False, "implementation": "cudnn"}]


@pytest.mark.usefixtures("all_validated")
def test_tokamax_takes_narrow_products_in_triton(monkeypatch):
    seen = []

    def ragged_dot(x, w, group_sizes, *, implementation):
        seen.append((w.dtype.name, implementation))

    monkeypatch.setattr(tokamax_kernels, "ragged_dot", ragged_dot)
    features = {"dtype": jnp.bfloat16, "features": (128, 128)}
    _, fn = GROUPED_MATMUL.resolve("tokamax", H100, **features)
    x, sizes = jnp.zeros((4, 128), jnp.bfloat16), jnp.array([4])
    for N in (128, 16):
        fn(x, jnp.zeros((1, 128, N)), sizes)
    assert seen == [("bfloat16", None), ("bfloat16", "triton")]
    with pytest.raises(ValueError, match="steps of 64, not 100 x 128"):
        w = jnp.zeros((1, 100, 128))
        grouped_matmul(x[:, :100], w, sizes, implementation="tokamax", target=H100)
