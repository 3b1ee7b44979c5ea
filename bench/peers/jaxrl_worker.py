"""Ours: jaxrl's training program, as `jaxrl.bench` builds it. Runs in jaxrl's environment."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from protocol import peak_rss, serve, timed

import jaxrl
from jaxrl.config import LoraOptions, OptimizerConfig, StepConfig
from jaxrl.models.hf_config import read_config
from jaxrl.parallel.mesh import make_mesh
from jaxrl.perf import flops, hardware, provenance
from jaxrl.train.batch import Batch
from jaxrl.train.program import build_program
from jaxrl.train.state import TrainState

AFTER_IMPORT = peak_rss()


class Training:
    def start(self, shape, optimizer, checkpoint, tokens, options, threads):
        """options: `StepConfig`'s fields as strings; `dtype` is short for `compute_dtype`."""
        del shape, threads  # the checkpoint's; XLA uses the CPUs this process is bound to
        options = dict(options)
        options["compute_dtype"] = options.pop("dtype", "float32")
        for name in ("head_chunk", "mlp_chunk"):
            options[name] = int(options.get(name, 0))
        config = read_config(checkpoint)
        program = build_program(
            config,
            mesh=make_mesh(jax.devices("cpu")[:1]),
            step=StepConfig(type="sft", **options),
            optimizer=OptimizerConfig(**optimizer),
            lora_rank=0,
            lora=LoraOptions(),
            seq_len=len(tokens),
            micro_batches=1,
        )
        start = time.perf_counter()
        self.compiled = program.lower().compile()
        compile_s = time.perf_counter() - start
        self.state = load_state(program, checkpoint)
        ids = np.asarray(tokens, np.int32)[None, None]
        batch = Batch(tokens=ids, loss_mask=np.ones_like(ids))
        shardings = jax.tree.map(lambda s: s.sharding, program.abstract_batch())
        self.batch = jax.device_put(batch, shardings)
        memory = self.compiled.memory_analysis()
        return {
            "after_import": AFTER_IMPORT,
            "versions": provenance.versions(),
            "commit": provenance.commit(),
            "source": provenance.source_hash(),
            "xla_flags": provenance.flags(),
            "step": {
                k: v for k, v in dataclasses.asdict(program.step.config).items() if k != "loss"
            },
            "compile_s": compile_s,
            "temp_bytes": memory.temp_size_in_bytes,
            "model_flops": flops.model_flops_per_step(config, len(tokens)),
            "parameters": sum(p.size for p in jax.tree.leaves(self.state.params)),
        }

    def steps(self, count):
        with jax.transfer_guard("disallow"):
            return timed(self._step, count)

    def _step(self):
        self.state, metrics = jax.block_until_ready(self.compiled(self.state, self.batch))
        return float(jax.device_get(metrics["loss"]))

    def matmul_peak(self, size, repetitions):
        """FLOP/s of this host as `jaxrl.bench` measures it, on one size."""
        return {"flops": hardware.measure_matmul_peak(sizes=(size,), repetitions=repetitions)}


def load_state(program, checkpoint) -> TrainState:
    """A fresh state around the checkpoint's weights."""
    shardings = program.layout.shardings()
    model = jaxrl.load_pretrained(checkpoint, dtype=jnp.float32, shardings=shardings.params)
    params = nnx.to_pure_dict(nnx.state(model))
    assert jax.tree.structure(params) == jax.tree.structure(program.layout.abstract().params)
    opt_state = jax.jit(program.layout.optimizer.init, out_shardings=shardings.opt_state)(params)
    step = jax.device_put(np.zeros((), np.int32), shardings.step)
    return TrainState(step, params, {}, opt_state)


training = Training()
serve({"start": training.start, "steps": training.steps, "matmul_peak": training.matmul_peak})
