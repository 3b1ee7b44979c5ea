"""The engine against the model run on the whole text: tokens, log-probs, and who runs when."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import TINY, TINY_GLM, TINY_MOE, tiny_program, tiny_state

from jaxrl.models.transformer import merge_trees
from jaxrl.options import ConfigError
from jaxrl.rollout.engine import STOPS, Engine, EngineLimits
from jaxrl.rollout.programs import Programs
from jaxrl.rollout.requests import Sampling

LIMITS = EngineLimits(slots=4, max_len=64, page=4, steps=3, prefill_tokens=32)
LAST = TINY.vocab_size - 1
GREEDY = Sampling(max_tokens=12, temperature=0)
CASES = {
    "dense": {},
    "lora": {"rank": 4},
    "moe": {"model": TINY_MOE},
    "glm": {"model": TINY_GLM},
    "dense 8": {"devices": 8},
    "lora 2x4": {"devices": 8, "rank": 4, "context": 2},
    "glm expert 2": {"devices": 8, "model": TINY_GLM, "expert": 2},
}


@functools.cache
def trained(name: str):
    """(model, mesh, weights) of the training state that other tests train."""
    program = tiny_program(**CASES[name])
    state = tiny_state(program)
    layout = program.layout
    return layout.model, layout.mesh, merge_trees(state.params, state.frozen)


def engine(name="dense", limits=LIMITS, whole=False, **options) -> Engine:
    model, mesh, weights = trained(name)
    made = Engine(Programs(model, mesh, dtype="float32", whole_layers=whole), limits, **options)
    made.set_weights(weights, version=0)
    return made


@functools.cache
def whole_model(name: str):
    """logits [T, V] of tokens [T], by the model itself on one device."""
    model, _, weights = trained(name)
    here = jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), weights)
    graphdef = nnx.graphdef(model)
    return jax.jit(lambda tokens: nnx.merge(graphdef, here)(tokens[None])[0])


def log_softmax(name, tokens):
    padded = np.zeros(LIMITS.max_len, np.int32)
    padded[: len(tokens)] = tokens
    return np.asarray(jax.nn.log_softmax(whole_model(name)(jnp.asarray(padded))))[: len(tokens)]


def prompts(count, seed=0, longest=20):
    rng = np.random.default_rng(seed)
    return [
        rng.integers(0, TINY.vocab_size, rng.integers(1, longest)).tolist() for _ in range(count)
    ]


def check(name, request):
    """Log-probs are those of the model on the whole text; greedy tokens are its likeliest."""
    for completion in request.completions:
        text = [*request.prompt, *completion.tokens]
        expected = log_softmax(name, text)[len(request.prompt) - 1 : -1]
        drawn = np.arange(len(completion.tokens)), completion.tokens
        np.testing.assert_allclose(completion.logprobs, expected[drawn], atol=1e-5)
        if not request.sampling.temperature:
            np.testing.assert_array_equal(completion.tokens, expected.argmax(-1))


@pytest.mark.parametrize(
    ("name", "whole"), [*((n, False) for n in CASES), *((n, True) for n in CASES if n[-1] in "248")]
)
def test_tokens_and_log_probs_are_those_of_the_whole_model(name, whole):
    made = engine(name, whole=whole)
    asked = [made.submit(prompt, GREEDY) for prompt in prompts(10)]
    asked += [made.submit(p, Sampling(max_tokens=9, n=3, seed=1)) for p in prompts(4, seed=1)]
    while made.busy:
        made.step()
    for request in asked:
        assert [c.finish for c in request.completions] == ["length"] * request.sampling.n
        check(name, request)
    assert made.counts == {
        "running": 0,
        "waiting": 0,
        "free_pages": made.devices * (LIMITS.pages - 1),
    }


def tokens_of(requests):
    return [[c.tokens for c in r.completions] for r in requests]


MIXED = [
    Sampling(max_tokens=n, temperature=t, n=k, seed=n)
    for n, t, k in ((3, 1.0, 1), (11, 0.0, 1), (20, 0.7, 3), (1, 1.0, 2), (9, 1.3, 4))
]


def run(made: Engine, asked, every: int = 0):
    """The requests of (prompt, sampling) pairs, handed in at once or some steps apart."""
    requests = []
    for prompt, sampling in asked:
        requests.append(made.submit(prompt, sampling))
        for _ in range(every):
            made.step()
    while made.busy:
        made.step()
    return requests


@functools.cache
def expected():
    asked = list(zip(prompts(5, seed=5), MIXED, strict=True))
    made = engine()
    return asked, tokens_of([run(made, [one])[0] for one in asked])


@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize(
    "limits",
    [
        LIMITS,
        EngineLimits(slots=2, max_len=64, page=4, steps=1),
        EngineLimits(slots=5, max_len=64, page=8, steps=7, cache_tokens=64),  # pages run out
    ],
)
def test_tokens_do_not_depend_on_what_else_is_sampled(limits, every):
    asked, alone = expected()
    assert tokens_of(run(engine(limits=limits), asked, every)) == alone


def test_pages_that_run_out_are_taken_from_the_last_one_which_goes_on_later():
    limits = EngineLimits(slots=4, max_len=64, page=4, steps=4, cache_tokens=64)
    made = engine(limits=limits)
    asked = [made.submit(p, Sampling(max_tokens=40, seed=i)) for i, p in enumerate(prompts(4, 3))]
    waited = 0
    while made.busy:
        made.step()
        counts = made.counts
        waited += counts["waiting"] > 0 and any(c.tokens for c in asked[3].completions)
        assert counts["free_pages"] >= 0
    assert waited and made.counts["free_pages"] == limits.pages - 1
    for request in asked:
        check("dense", request)


def test_samples_of_a_prompt_share_its_prefill_and_its_pages(monkeypatch):
    made = engine(limits=EngineLimits(slots=8, max_len=64, page=4, steps=2))
    prefilled = []
    prefill = made.programs.prefill

    def counted(weights, cache, tokens, table):
        prefilled.append(np.asarray(table))
        return prefill(weights, cache, tokens, table)

    monkeypatch.setattr(made.programs, "prefill", counted)
    prompt = list(range(1, 20))
    request = made.submit(prompt, Sampling(n=8, max_tokens=2))
    made.step()
    (table,) = prefilled
    assert (table > 0).sum() == 5  # 18 tokens: four whole pages and one begun
    # the four shared ones and, of each sample, one for tokens 17 to 20
    assert made.counts["free_pages"] == made.limits.pages - 1 or request.finished
    check("dense", request)
    request = made.submit(prompt, Sampling(n=8, max_tokens=9))
    made.step()
    assert made.counts["free_pages"] == made.limits.pages - 1 - 4 - 8


def test_nothing_is_compiled_after_warming_up():
    made = engine(limits=EngineLimits(slots=4, max_len=16, page=4, steps=3, prefill_tokens=32))
    made.warm_up()
    before = dict(made.programs.traced)
    assert before == {"prefill": 6, "decode": 6, "copy_pages": 1}
    for count, seed in ((9, 3), (2, 4), (1, 5)):
        sampling = Sampling(max_tokens=12, temperature=0.5, top_p=0.9, seed=seed, n=count)
        made.generate(prompts(count, seed=2, longest=12), sampling)
    assert dict(made.programs.traced) == before


def test_a_seed_draws_the_same_again_and_none_draws_anew():
    made, prompt = engine(), [5, 6, 7]
    first, again = (
        tokens_of(made.generate([prompt], Sampling(max_tokens=10, n=3, seed=3)))[0]
        for _ in range(2)
    )
    assert first == again and len({tuple(t) for t in first}) == 3
    others = made.generate([prompt] * 4, Sampling(max_tokens=10))
    assert len({tuple(t) for (t,) in tokens_of(others)}) == 4


def test_stop_tokens_end_a_completion_and_are_part_of_it():
    free = engine().generate([[3, 4]], GREEDY)[0].completions[0].tokens
    made = engine(stop_tokens=(free[4],))
    (stopped,) = made.generate([[3, 4]], GREEDY)[0].completions
    at = free.index(free[4])
    assert (stopped.tokens, stopped.finish) == (free[: at + 1], "stop")
    options = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
    (further,) = made.generate([[3, 4]], Sampling(**options))[0].completions
    assert (further.tokens, further.finish) == (free, "length")
    sampling = Sampling(**options, stop_tokens=(free[2],))
    (other,) = made.generate([[3, 4]], sampling)[0].completions
    assert other.tokens == free[: free.index(free[2]) + 1]


def test_any_number_of_stop_tokens_ends_a_completion_and_none_compiles_anew():
    made, drawn = engine(), Sampling(max_tokens=12, seed=4)
    free = made.generate([[3, 4]], drawn)[0].completions[0].tokens
    before = dict(made.programs.traced)
    last = max(free)  # behind all that the device is told of
    others = [t for t in range(last) if t not in free][: 2 * STOPS]
    assert len(others) == 2 * STOPS
    sampling = dataclasses.replace(drawn, stop_tokens=(*others, last))
    (stopped,) = made.generate([[3, 4]], sampling)[0].completions
    assert (stopped.tokens, stopped.finish) == (free[: free.index(last) + 1], "stop")
    assert dict(made.programs.traced) == before
    assert made.counts["free_pages"] == LIMITS.pages - 1


def test_numbers_of_any_size_are_taken():
    made = engine()
    huge = Sampling(max_tokens=10**30, top_k=5 * 10**9, seed=10**30, temperature=1.3)
    first, again = (made.generate([[3, 4]], huge)[0].completions[0].tokens for _ in range(2))
    whole = dataclasses.replace(huge, top_k=0)
    assert first == again == made.generate([[3, 4]], whole)[0].completions[0].tokens


def test_a_completion_ends_where_the_context_does():
    made = engine()
    (completion,) = made.submit([1] * 60, Sampling()).completions
    while made.busy:
        made.step()
    assert (len(completion.tokens), completion.finish) == (4, "length")


def test_what_is_not_finite_stays_with_the_request_that_it_came_from():
    made = engine(limits=dataclasses.replace(LIMITS, cache_tokens=64))
    expected = tokens_of(made.generate([[5, 6, 7]], GREEDY))
    good = made.weights
    made.set_weights(jax.tree.map(lambda w: w * jnp.nan, good), 1)
    made.generate([[1] * 30, [2] * 20], GREEDY)  # every page, and nobody's, has been written
    made.set_weights(good, 2)
    (request,) = made.generate([[5, 6, 7]], GREEDY)
    assert tokens_of([request]) == expected
    check("dense", request)


def test_what_is_aborted_makes_room():
    made = engine()
    long = [made.submit([1, 2, 3], Sampling(max_tokens=50, n=2)) for _ in range(4)]
    made.step()
    for request in long[:3]:
        made.abort(request)
    assert [c.finish for c in long[0].completions] == ["abort", "abort"]
    assert len(long[0].completions[0].tokens) == 3 and long[2].completions[0].tokens == []
    while made.busy:
        made.step()
    assert [len(c.tokens) for c in long[3].completions] == [50, 50]
    assert made.counts["free_pages"] == LIMITS.pages - 1


def test_tokens_carry_the_version_of_the_weights_that_drew_them():
    made = engine()
    _, _, weights = trained("dense")
    request = made.submit([1, 2, 3], Sampling(max_tokens=7, temperature=0))
    made.step()
    made.set_weights(jax.tree.map(lambda w: 0.5 * w, weights), version=4)
    while made.busy:
        made.step()
    (completion,) = request.completions
    assert completion.versions == [0, 0, 0, 4, 4, 4, 4]


@pytest.mark.parametrize(
    ("prompt", "sampling", "problem"),
    [
        ([], {}, "the prompt is empty"),
        ([1] * 64, {}, "the prompt has 64 tokens, .* at most 64; shorten it"),
        ([1], {"stop": ("x",)}, "stop needs a tokenizer"),
        ([1], {"n": 0}, "n is 0; it takes 1 and more"),
        ([1], {"temperature": float("nan")}, "temperature is nan"),
        ([1], {"top_p": 0.0}, "top_p is 0.0; it takes more than 0"),
        ([1], {"min_p": 2.0}, "min_p is 2.0; it takes 0 to 1"),
        ([1], {"top_k": -1}, "top_k is -1"),
        ([1], {"seed": -1}, "seed is -1; it takes 0 and more"),
        ([1, 10**10], {}, f"the prompt has token 10000000000; the model's are 0 to {LAST}"),
        ([-1], {}, f"the prompt has token -1; the model's are 0 to {LAST}"),
        ([1], {"stop_tokens": (2, LAST + 1)}, f"stop_tokens has {LAST + 1}; the model's are 0 to"),
        ([1], {"stop_tokens": (-(10**10),)}, "stop_tokens has -10000000000; the model's are 0 to"),
        ([1], {"max_tokens": -1}, "max_tokens is -1"),
        ([1], {"stop": ("",)}, "stop has an empty text"),
    ],
)
def test_bad_requests_are_one_line_and_change_nothing(prompt, sampling, problem):
    made = engine()
    with pytest.raises(ConfigError, match=problem):
        made.submit(prompt, Sampling(**sampling))
    assert not made.busy


def test_limits_that_hold_no_sequence_are_refused():
    with pytest.raises(ConfigError, match="cache_tokens 10 hold no sequence of max_len 64"):
        EngineLimits(max_len=64, cache_tokens=10)
