"""The real worker, with this host's CPU, split into two devices, passing for two H100s."""

import dataclasses
import os

os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}

from tiny import TINY

from jaxrl.perf import hardware, measure, plan, worker

hardware.GPUS["H100"] = dataclasses.replace(hardware.GPUS["H100"], device_kinds=("cpu",))
measure.preset = plan.preset = lambda name: TINY
worker.main()
