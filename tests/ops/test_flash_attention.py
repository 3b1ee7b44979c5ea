"""Every implementation of attention under one test: value and gradients against plain fp32.

On CPU: XLA's blocks, and the Triton kernels in Triton's numpy interpreter. `pytest -m gpu`: the
kernels themselves, with cases of a real size beside these.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxrl_kernels import interpreter, tiles
from jaxrl_kernels.flash_attention import cost, triton
from jaxrl_kernels.flash_attention.reference import flash_attention as plain
from jaxrl_kernels.launch import interpreted
from validation import skip

from jaxrl.ops.attention import ATTENTION, flash_attention
from jaxrl.ops.registry import Target

ANY_GPU = Target("gpu", "a GPU that no tile was tuned for", 90)


@dataclasses.dataclass(frozen=True)
class Case:
    """Lengths of the documents of each row (one int: not packed), heads, head size, and options."""

    docs: int | tuple[tuple[int, ...], ...]
    N: int = 2
    K: int = 1
    H: int = 64
    dtype: str = "float32"
    causal: bool = True
    scale: float | None = None
    lse: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """B, T."""
        return (1, self.docs) if isinstance(self.docs, int) else (len(self.docs), sum(self.docs[0]))

    @property
    def segment_ids(self):
        if isinstance(self.docs, int):
            return None
        return jnp.stack([jnp.repeat(jnp.arange(len(r)), np.array(r)) for r in self.docs])

    def arrays(self, seed=0):
        """q, k, v, and cotangents of out and of the log-sum-exp."""
        rng = np.random.default_rng(seed)
        B, T = self.shape
        qkv = [rng.standard_normal((B, T, n, self.H)) for n in (self.N, self.K, self.K, self.N)]
        dlse = rng.standard_normal((B, self.N, T)) if self.lse else np.zeros((B, self.N, T))
        return *(jnp.asarray(a, self.dtype) for a in qkv), jnp.asarray(dlse, jnp.float32)


CASES = {
    "whole_blocks": Case(128),
    "tail": Case(133, N=4, K=4),
    "shorter_than_a_block": Case(5, H=16),
    "one_token": Case(1, N=4, K=2),
    "four_queries_per_key": Case(70, N=4, H=128),
    "twelve_queries_per_key": Case(40, N=12, H=32),
    "head_dim_that_is_no_power_of_two": Case(66, H=40),
    "bfloat16": Case(133, N=4, dtype="bfloat16"),
    "float16": Case(133, N=4, dtype="float16", H=128),
    "bfloat16_packed": Case(((60, 1, 39), (1, 98, 1)), N=4, dtype="bfloat16"),
    "one_token_documents": Case(((1,) * 70, (70,))),
    "documents_across_blocks": Case(((30, 50, 60, 1), (3, 97, 40, 1))),
    "documents_on_blocks": Case(((32, 64, 32), (64, 32, 32))),
    "padding_tail": Case(((90, 43), (33, 100)), N=4, K=2),
    "not_causal": Case(78, causal=False),
    "not_causal_packed": Case(((30, 41, 6), (1, 75, 1)), causal=False),
    "scale": Case(50, scale=0.5),
    "log_sum_exp": Case(50, N=4, K=2, lse=True),
    "log_sum_exp_packed": Case(((30, 20), (1, 49)), lse=True, causal=False),
}
IN_EACH_DTYPE = (
    "tail",
    "twelve_queries_per_key",
    "one_token_documents",
    "documents_across_blocks",
    "padding_tail",
    "not_causal_packed",
    "log_sum_exp",
    "log_sum_exp_packed",
)
CASES |= {
    f"{name}_{dtype}": dataclasses.replace(CASES[name], dtype=dtype)
    for dtype in ("bfloat16", "float16")
    for name in IN_EACH_DTYPE
}
# Of a real size, for a GPU: rows of many blocks, and of documents as they come.
LARGE = {
    "4096": Case(4096, N=32, K=8, H=128, dtype="bfloat16"),
    "head_dim_64": Case(4096, N=32, K=8, H=64, dtype="bfloat16"),
    "float16_tail": Case(3001, N=16, K=8, H=128, dtype="float16"),
    "float16_even_tail": Case(3000, N=8, K=8, H=128, dtype="float16"),
    "four_keys": Case(2048, N=64, K=4, H=128, dtype="bfloat16"),
    "twelve_queries_per_key": Case(2048, N=96, K=8, H=128, dtype="bfloat16"),
    "packed": Case(
        ((5, 1000, 1, 1, 700, 2389), (4000, 96), (128, 128, 3840)),
        N=32,
        K=8,
        H=128,
        dtype="bfloat16",
    ),
    "packed_64": Case(((1,) * 96 + (4000,), (1000,) * 4 + (96,)), N=8, K=2, dtype="bfloat16"),
}


def run(attend, case: Case, arrays):
    """out, lse, dq, dk, dv; `attend(q, k, v, segment_ids)` returns out, or both."""
    q, k, v, dout, dlse = arrays

    @jax.jit
    def all_of_it(q, k, v, dout, dlse, ids):
        out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, ids), q, k, v)
        out, cotangent = (out, (dout, dlse)) if case.lse else ((out, None), dout)
        return *out, *vjp(cotangent)

    return all_of_it(q, k, v, dout, dlse, case.segment_ids)


def options(case: Case):
    return {"causal": case.causal, "scale": case.scale, "return_lse": case.lse}


def check(case: Case, implementation: str, target: Target, arrays=None):
    """Every tensor is within one rounding step of the input type, as a whole."""
    arrays = case.arrays() if arrays is None else arrays
    _, fn = ATTENTION.resolve(
        implementation,
        target,
        dtype=jnp.dtype(case.dtype),
        head_dim=case.H,
        packed=case.segment_ids is not None,
        seq_len=case.shape[1],
        causal=case.causal,
        lse=case.lse,
    )
    got = run(functools.partial(fn, **options(case)), case, arrays)
    exact = tuple(a.astype(jnp.float32) for a in arrays)
    expected = run(
        lambda q, k, v, ids: plain(q, k, v, segment_ids=ids, **options(case)), case, exact
    )
    eps = float(jnp.finfo(case.dtype).eps)
    tolerance = 16 * eps if case.dtype == "float32" else eps
    if target.gpu and target != ANY_GPU:  # a GPU rounds to nearest, the interpreter cuts off
        tolerance /= 2
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, expected, strict=True):
        if name == "lse" and not case.lse:
            continue
        assert a.shape == b.shape and a.dtype == (jnp.float32 if name == "lse" else case.dtype)
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.all(np.isfinite(a)), name
        # A gradient that cancels to nothing (one-token documents) keeps fp32's rounding.
        error, rounding = np.linalg.norm(a - b), 2.0**-19 * np.sqrt(b.size)
        assert error < tolerance * np.linalg.norm(b) + rounding, (name, error)
        if name != "lse":  # and no head of a row is worse than twice that
            of_head = functools.partial(np.linalg.norm, axis=(1, 3))
            limit = 2 * tolerance * of_head(b) + 2 * 2.0**-19 * np.sqrt(b[0, :, 0].size)
            assert np.all(of_head(a - b) < limit), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_on_cpu(implementation, case):
    with interpreted():
        check(CASES[case], implementation, Target("cpu") if implementation == "xla" else ANY_GPU)


@settings(deadline=None, max_examples=12, derandomize=True, database=None)
@given(st.data())
def test_any_documents(data):
    """Drawn documents, heads and sizes, forward and backward, in the interpreter."""
    draw = data.draw
    docs = tuple(draw(st.lists(st.integers(1, 70), min_size=1, max_size=5)))
    K, G, H = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from((16, 24, 64)))
    causal, lse = draw(st.booleans()), draw(st.booleans())
    dtype = draw(st.sampled_from(triton.DTYPES))
    case = Case((docs,), N=K * G, K=K, H=H, dtype=dtype, causal=causal, lse=lse)
    with interpreted():
        check(case, "triton", ANY_GPU, case.arrays(draw(st.integers(0, 99))))


def test_an_id_used_twice_is_two_documents():
    q, k, v, *_ = Case(24).arrays()
    ids = jnp.array([[7] * 3 + [2] * 4 + [7] * 6 + [0] * 2 + [7] * 9])
    numbered = jnp.array([[0] * 3 + [1] * 4 + [2] * 6 + [3] * 2 + [4] * 9])
    for implementation in ("xla", "triton", "reference"):
        with interpreted():
            attend = functools.partial(
                flash_attention,
                q,
                k,
                v,
                implementation=implementation,
                target=ANY_GPU if implementation == "triton" else Target("cpu"),
            )
            out = attend(segment_ids=ids)
            np.testing.assert_array_equal(out, attend(segment_ids=numbered))
        assert not np.allclose(out, plain(q, k, v), atol=1e-2)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("docs", "block_q", "block_k"),
    [
        ((128,), 32, 32),
        ((1,) * 50 + (78,), 16, 32),
        ((40, 3, 60, 25), 32, 16),
        ((32, 32, 64), 32, 32),
    ],
)
def test_only_blocks_that_share_a_document_are_visited(docs, block_q, block_k, causal, monkeypatch):
    """The interpreted kernels' products, counted: visits x products per visit, of each kernel."""
    monkeypatch.setattr(tiles, "attention", lambda *_: tiles.Tile(block_q, block_k, 4, 1))
    case = Case((docs,), N=3, K=1, H=16, causal=causal)

    def passes(seed):
        return run(
            lambda q, k, v, ids: flash_attention(
                q, k, v, segment_ids=ids, causal=causal, implementation="triton", target=ANY_GPU
            ),
            case,
            case.arrays(seed),
        )

    with interpreted():
        _, products = interpreter.count_products(passes, 0)
    visits = case.N * cost.visited_blocks(docs, block_q, block_k, causal=causal)
    assert products == {f"{which}_kernel": visits * n for which, n in cost.PRODUCTS.items()}


@settings(deadline=None, max_examples=60, derandomize=True, database=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.booleans(), st.data())
def test_a_visited_block_holds_a_visible_pair(docs, causal, data):
    """`visited_blocks`, which the kernels' loops are counted against, against all pairs."""
    block_q, block_k = (data.draw(st.sampled_from((1, 4, 16, 32))) for _ in "qk")
    ids = np.repeat(np.arange(len(docs)), docs)
    seen = ids[:, None] == ids[None, :]
    if causal:
        seen = np.tril(seen)
    rows, columns = np.nonzero(seen)
    blocks = {*zip(rows // block_q, columns // block_k, strict=True)}
    assert cost.visited_blocks(docs, block_q, block_k, causal=causal) == len(blocks)
    assert cost.pairs(docs, causal=causal) == seen.sum()


def test_work_of_a_packed_row_is_that_of_its_documents():
    one, eight = (cost.visited_blocks((n,) * (4096 // n), 64, 64) for n in (4096, 512))
    assert one / eight == pytest.approx(8, rel=0.15)


def test_a_scale_that_is_not_above_zero_is_refused():
    q = jnp.zeros((1, 8, 4, 16))
    with interpreted(), pytest.raises(ValueError, match=r"scale -1\.0 is not above 0"):
        flash_attention(q, q, q, scale=-1.0, implementation="triton", target=ANY_GPU)


def refusal(implementation: str, case, target: Target) -> str | None:
    """Why `implementation` does not take the case on `target`, or None."""
    why_not = next(i.why_not for i in ATTENTION.implementations if i.name == implementation)
    return why_not(
        target,
        dtype=jnp.dtype(case.dtype),
        head_dim=case.H,
        packed=case.segment_ids is not None,
        seq_len=case.shape[1],
        causal=case.causal,
        lse=case.lse,
    )


def on_gpu(implementation: str):
    """The cases that `implementation` takes on some GPU, each marked as a test of it: where it is
    the dtype that it does not take, in bf16."""
    mark = pytest.mark.validates(f"attention {implementation}")
    everything = {f"small_{n}": c for n, c in CASES.items()} | LARGE

    def takes(case):
        said = refusal(implementation, case, ANY_GPU)
        return said is None or "installed" in said

    taken = {name: case for name, case in everything.items() if takes(case)}
    for name, case in everything.items():
        narrow = dataclasses.replace(case, dtype="bfloat16")
        if name not in taken and narrow not in taken.values() and takes(narrow):
            taken[f"{name}_bfloat16"] = narrow
    return [
        pytest.param(implementation, case, id=f"{implementation}-{name}", marks=mark)
        for name, case in taken.items()
    ]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("implementation", "case"), [*on_gpu("triton"), *on_gpu("cudnn"), *on_gpu("tokamax")]
)
def test_on_gpu(implementation, case):
    if said := refusal(implementation, case, Target.here()):
        skip(f"{implementation} {said}")
    check(case, implementation, Target.here())


@pytest.mark.gpu
@pytest.mark.validates("attention triton")
def test_backward_is_deterministic_on_gpu():
    case = LARGE["packed"]
    attend = functools.partial(flash_attention, implementation="triton")

    def packed(q, k, v, ids):
        return attend(q, k, v, segment_ids=ids)

    first, *others = (run(packed, case, case.arrays()) for _ in range(3))
    for other in others:
        for a, b in zip(first, other, strict=True):
            if a is not None:
                np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
