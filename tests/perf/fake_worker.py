"""Stands in for `jaxrl.perf.worker`: same protocol, invented numbers, no JAX.

FAKE_WORKER, a JSON object, maps a substring of a row's slug to what happens instead.
"""

import json
import os
import signal
import sys
import time


def main():
    channel = int(sys.argv[-1])

    def send(**message):
        os.write(channel, json.dumps(message).encode() + b"\n")

    request = json.loads(sys.stdin.readline())
    row, mode = request["row"], request["mode"]
    name = f"{row['type']}-{row['lora_rank']}-{row['seq_len']}-{row['ac']}-{row['gpu']}-{mode}"
    plan = json.loads(os.environ.get("FAKE_WORKER", "{}"))
    what = next((v for k, v in plan.items() if k in name), "ok")
    with open(os.environ.get("FAKE_WORKER_LOG", os.devnull), "a") as log:
        log.write(name + "\n")
    delay = float(os.environ.get("FAKE_WORKER_DELAY", "0"))
    send(stage="compiling")
    time.sleep(delay)
    if what == "error":
        send(error="XlaRuntimeError: RESOURCE_EXHAUSTED: out of memory")
        return
    if what == "exit":
        print("F0000 mosaic: Check failed: wrong architecture", flush=True)
        sys.exit(3)
    if what in ("SIGKILL", "SIGABRT"):
        os.kill(os.getpid(), getattr(signal, what))
    if what == "hang":
        time.sleep(600)
    numbers = {
        "attn_compiled": "cudnn",
        "peak_mem_gib": row["seq_len"] / 4096 + 7.5,
        "floor_mem_gib": row["seq_len"] / 4096 + 6.5,
        "model_flops_per_token": 4.2e9,
        "hardware_flops_per_step": 1.5e14,
        "compile_s": 9.9,
    }
    if mode != "planned":
        for step in range(1, 11):
            time.sleep(delay / 10)
            send(stage="step", step=step, of=10, scalars={"step_time_s": 0.4 + step / 1000})
        numbers |= {"tps": 640.0, "step_time_s": 0.405, "step_time_iqr_s": 0.003}
        numbers |= {"mfu_pct": 31.0, "mfu_primerl_pct": 34.0, "hfu_pct": float("nan")}
        numbers |= {"attn_compiled": "xla"}
    send(result=numbers)


main()
