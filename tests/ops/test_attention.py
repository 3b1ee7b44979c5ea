"""Blocked attention against the plain one: values, gradients, documents, memory, skipped blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxrl_kernels.flash_attention.reference import flash_attention as plain

from jaxrl.ops import registry
from jaxrl.ops.attention import resolve_attention
from jaxrl.ops.attention_xla import blocked_attention
from jaxrl.ops.registry import Target
from jaxrl.options import ConfigError


def inputs(B, T, N, K, H, dtype=jnp.float32, seed=0):
    """q, k, v and a cotangent of the output."""
    rng = np.random.default_rng(seed)
    heads = (N, K, K, N)
    return tuple(jnp.asarray(rng.standard_normal((B, T, n, H)), dtype) for n in heads)


def packed_ids(*rows):
    """Lengths of the documents of each row -> segment ids [B, T]."""
    return jnp.stack([jnp.repeat(jnp.arange(len(r)), np.array(r)) for r in rows])


def documents(ids):
    """Ids renumbered by hand so that a second run of an id is another document, for the oracle."""
    rows = []
    for row in np.asarray(ids):
        number, out = 0, []
        for i, value in enumerate(row):
            number += i > 0 and value != row[i - 1]
            out.append(number)
        rows.append(out)
    return np.array(rows)


def oracle(q, k, v, dout, ids=None):
    """out, dq, dk, dv with all scores, in numpy and fp64."""
    q, k, v, dout = (np.asarray(a, np.float64) for a in (q, k, v, dout))
    B, T, N, H = q.shape
    K = k.shape[2]
    k, v = (np.repeat(a, N // K, axis=2) for a in (k, v))
    visible = np.tril(np.ones((B, T, T), bool))
    if ids is not None:
        ids = documents(ids)
        visible &= ids[:, :, None] == ids[:, None, :]
    s = np.where(visible[:, None], np.einsum("BTNH,BSNH->BNTS", q, k) / H**0.5, -np.inf)
    p = np.exp(s - np.max(s, axis=-1, keepdims=True))
    p /= np.sum(p, axis=-1, keepdims=True)
    dp = np.einsum("BTNH,BSNH->BNTS", dout, v)
    ds = p * (dp - np.sum(p * dp, axis=-1, keepdims=True)) / H**0.5
    dk, dv = np.einsum("BNTS,BTNH->BSNH", ds, q), np.einsum("BNTS,BTNH->BSNH", p, dout)
    dk, dv = (a.reshape(B, T, K, N // K, H).sum(axis=3) for a in (dk, dv))
    return np.einsum("BNTS,BSNH->BTNH", p, v), np.einsum("BNTS,BSNH->BTNH", ds, k), dk, dv


@functools.partial(jax.jit, static_argnames=("attend", "block"))
def value_and_gradients(attend, q, k, v, dout, ids, block=None):
    fn = functools.partial(attend, block=block) if block else attend
    out, vjp = jax.vjp(lambda q, k, v: fn(q, k, v, ids), q, k, v)
    return out, *vjp(dout)


def check(arrays, ids, block=None, *, attend=blocked_attention, tolerance=1e-5):
    """Every tensor equals the oracle's, relative to its largest value."""
    got = value_and_gradients(attend, *arrays, ids, block=block)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, oracle(*arrays, ids), strict=True):
        assert a.dtype == arrays[0].dtype
        error = np.max(np.abs(np.asarray(a, np.float64) - b))
        assert error < tolerance * max(np.max(np.abs(b)), 0.1), name


CASES = {  # B, T, N, K, H, block
    "whole_blocks": (2, 32, 2, 2, 64, 8),
    "not_a_multiple": (1, 29, 4, 1, 128, 8),
    "shorter_than_a_block": (2, 5, 4, 4, 16, 64),
    "one_token": (3, 1, 4, 2, 8, 8),
    "twelve_queries_per_kv_head": (1, 17, 12, 1, 33, 4),
    "blocks_of_one": (1, 6, 2, 1, 5, 1),
    "default_block": (1, 300, 2, 1, 8, None),
}


@pytest.mark.parametrize("case", CASES)
def test_without_documents(case):
    *shape, block = CASES[case]
    check(inputs(*shape), None, block)


def reference(q, k, v, segment_ids):
    return plain(q, k, v, segment_ids=segment_ids)


@pytest.mark.parametrize("packed", [False, True])
def test_the_reference(packed):
    check(inputs(2, 11, 4, 2, 6), packed_ids([5, 6], [1, 10]) if packed else None, attend=reference)


def test_bf16_within_its_rounding():
    ids = packed_ids([9, 1, 20, 3])
    check(inputs(1, 33, 4, 1, 64, jnp.bfloat16), ids, 8, tolerance=2**-7)


PACKED = {
    "one_token_documents": packed_ids([1] * 21, [21]),
    "across_block_borders": packed_ids([5, 6, 10], [3, 1, 17]),
    "on_block_borders": packed_ids([4, 8, 8, 1], [16, 4, 1]),
    "an_id_used_twice": jnp.array([[7] * 3 + [2] * 4 + [7] * 6 + [0] * 2 + [7] * 6, [5] * 21]),
    "ids_falling": jnp.array([[9] * 10 + [3] * 11, [0] * 5 + [-1] * 16]),
}


@pytest.mark.parametrize("case", PACKED)
def test_packed_documents(case):
    check(inputs(2, 21, 4, 2, 16), PACKED[case], 4)


@settings(deadline=None, max_examples=40, derandomize=True, database=None)
@given(st.lists(st.integers(0, 2), min_size=42, max_size=42), st.integers(0, 2**16))
def test_any_ids(ids, seed):
    # Sorting half of each row makes longer documents beside the short ones.
    ids = np.array(ids).reshape(2, 21)
    ids[:, 8:] = np.sort(ids[:, 8:])
    check(inputs(2, 21, 4, 2, 16, seed=seed), jnp.asarray(ids), 4)


@settings(deadline=None, max_examples=5, derandomize=True, database=None)
@given(st.data())
def test_any_shape(data):
    B, T, K, G, H = (data.draw(st.integers(1, n)) for n in (2, 12, 2, 3, 9))
    block = data.draw(st.integers(1, 14))
    ids = data.draw(st.lists(st.integers(0, 1), min_size=B * T, max_size=B * T))
    check(inputs(B, T, K * G, K, H), jnp.array(ids).reshape(B, T), block)


def test_another_document_changes_nothing():
    ids = PACKED["across_block_borders"]
    mine = np.asarray(ids == 1)
    first = inputs(2, 21, 4, 2, 16)
    other = tuple(
        jnp.where(mine[..., None, None], a, 100.0 * b)
        for a, b in zip(first, inputs(2, 21, 4, 2, 16, seed=1), strict=True)
    )
    a, b = (value_and_gradients(blocked_attention, *x, ids, block=4) for x in (first, other))
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x[mine], y[mine])
        assert not np.array_equal(x, y)


def poisoned(visible, ids):
    """out, dq, dk, dv with not-a-number in the keys and values that are not `visible` [T].

    It spreads, from 0 * NaN, to every query whose loop visits the block, and only there.
    """
    q, k, v, dout = inputs(2, 21, 4, 2, 16)
    k, v = (jnp.where(np.asarray(visible)[:, None, None], a, jnp.nan) for a in (k, v))
    return value_and_gradients(blocked_attention, q, k, v, dout, ids, block=4)


@pytest.mark.parametrize("document", [(0, 8), (8, 20), (20, 21)])
def test_a_block_without_a_shared_document_is_not_visited(document):
    ids = packed_ids([8, 12, 1], [8, 12, 1])  # blocks of 4
    start, end = document
    position = np.arange(21)
    got = poisoned((position >= start) & (position < end), ids)
    for a in got:
        assert np.all(np.isfinite(a[:, start:end]))
    assert np.all(np.isnan(np.delete(got[0], np.s_[start:end], axis=1)))


def test_blocks_above_the_diagonal_are_not_visited():
    for ids in (None, packed_ids([21], [21])):
        out, dq, *_ = poisoned(np.arange(21) < 12, ids)
        for a in (out, dq):
            assert np.all(np.isfinite(a[:, :12])) and np.all(np.isnan(a[:, 12:]))


def temporaries(attend, T, block=None):
    arrays = (jax.ShapeDtypeStruct((1, T, n, 8), jnp.float32) for n in (2, 1, 1, 2))
    lowered = value_and_gradients.lower(attend, *arrays, None, block=block)
    return lowered.compile().memory_analysis().temp_size_in_bytes


def test_memory_is_linear_in_length():
    scores = 2 * 8192**2 * 4
    long = temporaries(blocked_attention, 8192, 64)
    assert long < 5 * temporaries(blocked_attention, 2048, 64)
    assert long < scores / 50 and temporaries(reference, 8192) > scores


H100 = Target("gpu", "NVIDIA H100 80GB HBM3", 90)
A6000 = Target("gpu", "NVIDIA RTX A6000", 86)
CPU, V100 = Target("cpu"), Target("gpu", "Tesla V100", 70)


def resolve(name, target=H100, dtype=jnp.bfloat16, head_dim=128, packed=False, seq_len=512):
    case = {"dtype": dtype, "head_dim": head_dim, "packed": packed, "seq_len": seq_len}
    return resolve_attention(name, target=target, **case)


@pytest.fixture
def nothing_validated(monkeypatch):
    monkeypatch.setattr(registry, "is_validated", lambda kernel, gpu: False)


@pytest.mark.usefixtures("nothing_validated")
def test_auto_takes_what_others_have_validated():
    assert resolve("auto").name == "cudnn"
    assert resolve("auto", packed=True).name == "tokamax"
    assert resolve("auto", target=CPU).name == "xla"


@pytest.mark.usefixtures("nothing_validated")
@pytest.mark.parametrize(
    ("why", "message"),
    [
        (
            {"packed": True, "target": A6000},
            r"on NVIDIA RTX A6000 \(sm_86\) \('cudnn' has no packed documents \(segment_ids\); "
            "'tokamax' needs Hopper or Blackwell, and this is sm_86\\); use 'triton', whose tests "
            r"have not run there \(pytest -m gpu\), or 'xla', which is many times slower",
        ),
        ({"dtype": jnp.float32}, "'cudnn' takes bfloat16 or float16, not float32"),
        ({"head_dim": 256}, "use 'triton'"),
        ({"head_dim": 100}, "use 'triton'"),
    ],
)
def test_auto_leaves_the_choice_where_only_a_kernel_of_ours_could_run(why, message):
    with pytest.raises(ConfigError, match=message):
        resolve("auto", **why)


def test_auto_says_where_no_kernel_can_run(caplog):
    registry._say_once.cache_clear()
    assert resolve("auto", target=V100).name == "xla"
    (record,) = caplog.records
    assert record.message.startswith("attention 'xla' on Tesla V100")
    assert "'triton' needs sm_80 or newer, and this is sm_70" in record.message
    assert resolve("auto", target=CPU).name == "xla"
    assert len(caplog.records) == 1


def test_auto_takes_our_kernel_where_it_is_validated(monkeypatch):
    monkeypatch.setattr(
        registry, "is_validated", lambda *key: key == ("attention triton", A6000.gpu)
    )
    assert resolve("auto", A6000, packed=True).name == "triton"
    assert resolve("auto", A6000).name == "cudnn"
    assert resolve("auto", packed=True).name == "tokamax"


def test_auto_passes_over_a_kernel_of_others_that_has_failed_there(monkeypatch):
    monkeypatch.setattr(registry, "has_failed", lambda kernel, gpu: "cudnn" in kernel)
    assert resolve("auto").name == "tokamax"
    assert resolve("cudnn").name == "cudnn"  # by request


@pytest.mark.usefixtures("nothing_validated")
def test_a_kernel_that_is_not_validated_runs_by_request_and_says_so(caplog):
    registry._say_once.cache_clear()
    assert resolve("triton", A6000).name == "triton"
    assert [r.message for r in caplog.records] == [
        "attention 'triton' is not validated on NVIDIA RTX A6000: its tests have not run there "
        "(pytest -m gpu)"
    ]


@pytest.mark.parametrize(
    ("name", "why", "message"),
    [
        ("cudnn", {"target": CPU}, "needs an NVIDIA GPU, and this program is for cpu; use 'xla'"),
        ("cudnn", {"dtype": jnp.float32}, "bfloat16 or float16, not float32; use 'triton' or"),
        ("cudnn", {"head_dim": 256}, "head_dim up to 128 in steps of 8, not 256"),
        ("cudnn", {"seq_len": 133}, "takes an even number of tokens, not 133"),
        ("cudnn", {"packed": True}, "no packed documents.*use 'triton' or 'tokamax' or 'xla'"),
        ("triton", {"target": CPU}, "needs an NVIDIA GPU, and this program is for cpu"),
        (
            "triton",
            {"target": V100},
            "sm_80 or newer, and this is sm_70",
        ),
        ("triton", {"head_dim": 512}, "head_dim up to 256, not 512"),
        ("tokamax", {"target": A6000}, "needs Hopper or Blackwell, and this is sm_86"),
        ("tokamax", {"dtype": jnp.float32}, "bfloat16 or float16, not float32"),
    ],
)
def test_a_request_that_cannot_be_met_raises(name, why, message):
    with pytest.raises(ValueError, match=f"attention '{name}' .*{message}"):
        resolve(name, **why)


def test_unknown_name_raises():
    with pytest.raises(ValueError, match="unknown attention 'flash'; one of auto, cudnn, triton"):
        resolve("flash")
