"""Documents that go on from another, against the mask of what they see; and, this file as a script,
the program compiled for a GPU."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from jaxrl_kernels.launch import interpreted
from scripts import output_of

from jaxrl.ops import attention_xla
from jaxrl.ops.attention_blocks import resolve_blocks
from jaxrl.ops.registry import Target
from jaxrl.ops.shared_prefix import Families, family_attention
from jaxrl.parallel.context import context_attention
from jaxrl.parallel.mesh import make_mesh

ANY_GPU = Target("gpu", "a GPU that no tile was tuned for", 90)


def families(*rows) -> Families:
    """Each row a list of families, each of those the lengths of its documents."""
    segments, numbers = [], []
    for row in rows:
        lengths = [(length, f) for f, family in enumerate(row) for length in family]
        # Ids come back: runs count, not ids.
        segments.append(np.repeat([d % 3 for d in range(len(lengths))], [n for n, _ in lengths]))
        numbers.append(np.repeat([f % 2 for _, f in lengths], [n for n, _ in lengths]))
    return Families(jnp.asarray(np.stack(segments)), jnp.asarray(np.stack(numbers)))


def visible(rows) -> np.ndarray:
    """[B, queries, keys], from the lengths alone."""
    masks = []
    for row in rows:
        T = sum(sum(family) for family in row)
        mask, at = np.zeros((T, T), bool), 0
        for family in row:
            first = slice(at, at + family[0])
            for number, length in enumerate(family):
                here = slice(at, at + length)
                mask[here, here] = np.tril(np.ones((length, length), bool))
                if number:
                    mask[here, first] = True
                at += length
        masks.append(mask)
    return np.stack(masks)


ROWS = {
    "one_family": [[[10, 7, 1, 12, 20]], [[3, 30, 17]]],
    "several": [[[4, 6, 5], [9], [1, 2, 2, 2], [12, 7]], [[20], [5, 5], [5, 5, 5, 5]]],
    "no_prefix_is_shared": [[[17], [9], [24]], [[50]]],
}
ROWS |= {"one_row_shares": [ROWS["one_family"][0], ROWS["no_prefix_is_shared"][0]]}


def masked(rows):
    mask = visible(rows)[:, None, None]

    def attend(q, k, v):
        B, T, N, H = q.shape
        q = q.reshape(B, T, k.shape[2], -1, H)
        s = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, precision="highest") * H**-0.5
        p = jax.nn.softmax(jnp.where(mask, s, -jnp.inf), axis=-1)
        return jnp.einsum("BKGTS,BSKH->BTKGH", p, v, precision="highest").reshape(B, T, N, H)

    return attend


@pytest.mark.filterwarnings("ignore:.*encountered in (divide|log2)")  # queries that see nothing
@pytest.mark.parametrize("implementation", ["xla", "triton", "reference"])
@pytest.mark.parametrize("name", ROWS)
def test_equals_the_mask(name, implementation, monkeypatch):
    monkeypatch.setattr(attention_xla, "block_size", lambda seq_len: 8)
    rng = np.random.default_rng(0)
    heads = (4, 2, 2, 4)
    arrays = [jnp.asarray(rng.standard_normal((2, 50, n, 16)), jnp.float32) for n in heads]
    target = ANY_GPU if implementation == "triton" else Target("cpu")
    case = {"dtype": jnp.float32, "head_dim": 16, "packed": True, "seq_len": 50}
    attend = family_attention(resolve_blocks(implementation, target=target, **case)[1])
    documents = families(*ROWS[name])

    @jax.jit
    def run(q, k, v, dout):
        out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, documents), q, k, v)
        return out, *vjp(dout)

    with interpreted():
        got = run(*arrays)
    *qkv, dout = arrays
    out, vjp = jax.vjp(masked(ROWS[name]), *qkv)
    for what, a, b in zip(("out", "dq", "dk", "dv"), got, (out, *vjp(dout)), strict=True):
        assert np.linalg.norm(a - b) <= 2e-6 * np.linalg.norm(b), what


def test_a_prompt_longer_than_what_is_visited_at_once(monkeypatch):
    """In XLA's blocks: more blocks in a row see nothing than are computed together."""
    monkeypatch.setattr(attention_xla, "block_size", lambda seq_len: 1)
    rows = [[[2, 3], [40, 5]]]
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 50, n, 8)), jnp.float32) for n in (2, 1, 1))
    case = {"dtype": jnp.float32, "head_dim": 8, "packed": True, "seq_len": 50}
    attend = jax.jit(family_attention(resolve_blocks("xla", target=Target("cpu"), **case)[1]))
    np.testing.assert_allclose(attend(q, k, v, families(*rows)), masked(rows)(q, k, v), atol=1e-5)


@pytest.mark.slow
def test_two_passes_of_the_kernel_on_a_gpu():
    """At 32768 tokens: kernels alone, and memory of a few arrays."""
    seen = output_of(__file__, "H100")
    # Forward; queries' gradients; keys' and values'. Each over the own document and the prefix.
    assert seen["custom_calls"] == {"triton_kernel_call_ffi": 2 * 3}
    assert seen["spill_bytes"] == 0
    q_bytes = 4 * 32768 * 32 * 128  # in fp32
    assert seen["temp"] < 6 * q_bytes  # the scores of one head: 8 times as much


def main(gpu):
    from jaxrl_kernels import launch, resources

    from jaxrl.perf import compile_only, hlo

    devices = compile_only.topology(gpu, 1)
    mesh = make_mesh(devices)
    attend = context_attention(
        "ring",
        size=1,
        attention="triton",
        target=Target.of(devices[0]),
        dtype=jnp.bfloat16,
        head_dim=128,
        num_heads=32,
        num_kv_heads=8,
        packed=True,
        seq_len=32768,
        shared_prefix=True,
    )

    def run(q, k, v, dout, documents):
        out, vjp = jax.vjp(lambda q, k, v: attend.fn(q, k, v, documents), q, k, v)
        return out, vjp(dout)

    def array(*shape, dtype=jnp.bfloat16):
        everywhere = NamedSharding(mesh, PartitionSpec())
        return jax.ShapeDtypeStruct((1, 32768, *shape), dtype, sharding=everywhere)

    ids = Families(array(dtype=jnp.int32), array(dtype=jnp.int32))
    with compile_only.as_device(mesh), launch.collect() as found:
        lowered = jax.jit(run).lower(*(array(n, 128) for n in (32, 8, 8, 32)), ids)
    program = compile_only.compile_for(lowered)
    said = {
        "temp": compile_only.memory(program).temp,
        "custom_calls": hlo.summarize(program.as_text() or "").custom_calls,
        "spill_bytes": sum(resources.resources(k).spill_bytes for k in found),
    }
    print(json.dumps(said))


if __name__ == "__main__":
    import sys

    from jaxrl.perf import compile_only

    compile_only.prepare_environment()
    main(sys.argv[1])
