"""Our side of decode.py: the rollout engine."""

import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from protocol import serve

from jaxrl.models.hf import load_pretrained
from jaxrl.parallel.mesh import make_mesh
from jaxrl.rollout.engine import Engine, EngineLimits
from jaxrl.rollout.programs import Programs
from jaxrl.rollout.requests import Sampling

STATE = {}


def start(model, options, threads, sequences, prompt, tokens):
    del threads  # the process's own number of CPUs
    loaded = load_pretrained(model, dtype=jnp.float32)
    programs = Programs(loaded, make_mesh(jax.devices()[:1]), dtype="float32")
    limits = EngineLimits(
        slots=sequences, max_len=prompt + tokens, steps=int(options.get("steps", 8))
    )
    engine = Engine(programs, limits)
    engine.set_weights(nnx.to_pure_dict(nnx.state(loaded)), 0)
    STATE.update(engine=engine, sizes=(sequences, prompt, tokens))
    return {}


def drawn(seed, temperature):
    sequences, prompt, tokens = STATE["sizes"]
    prompts = np.random.default_rng(seed).integers(100, 40000, (sequences, prompt)).tolist()
    how = Sampling(max_tokens=tokens, ignore_eos=True, temperature=temperature, seed=seed)
    begin = time.perf_counter()
    requests = STATE["engine"].generate(prompts, how)
    seconds = time.perf_counter() - begin
    found = [request.completions[0].tokens for request in requests]
    assert all(len(one) == tokens for one in found)
    return found, seconds


serve(
    {
        "start": start,
        "greedy": lambda seed: {"tokens": drawn(seed, 0.0)[0]},
        "draw": lambda seed: {"seconds": drawn(seed, 1.0)[1]},
    }
)
