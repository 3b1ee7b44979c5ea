"""The peer: transformers' Qwen3ForCausalLM trained by torch. Runs in the torch environment."""

import statistics
import time

import torch
import transformers
from protocol import peak_rss, serve, timed

AFTER_IMPORT = peak_rss()
OPTIONS = {
    "loss": "labels",  # labels: transformers' own; own: one cross_entropy over shifted logits
    "ac": "recompute",  # recompute: gradient checkpointing of every layer; none
    "adamw": "fused",  # fused, foreach
    "dtype": "float32",  # bfloat16: autocast
    "compile": "no",  # yes: torch.compile(model)
    "attention": "sdpa",
}


class Training:
    def start(self, shape, optimizer, checkpoint, tokens, options, threads):
        torch.set_num_threads(threads)
        self.options = o = OPTIONS | options
        if unknown := set(options) - set(OPTIONS):
            raise ValueError(f"unknown options {unknown}; one of {list(OPTIONS)}")
        self.model = transformers.Qwen3ForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation=o["attention"]
        )
        self.model.config.use_cache = False
        self.model.train()
        if o["ac"] == "recompute":
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.forward = torch.compile(self.model) if o["compile"] == "yes" else self.model
        self.max_norm = optimizer.pop("max_grad_norm")
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=optimizer["learning_rate"],
            weight_decay=optimizer["weight_decay"],
            betas=(optimizer["b1"], optimizer["b2"]),
            eps=optimizer["eps"],
            **{o["adamw"]: True},
        )
        self.tokens = torch.tensor([tokens])
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        parameters = sum(p.numel() for p in self.model.parameters())
        return {"after_import": AFTER_IMPORT, "versions": versions, "parameters": parameters}

    def steps(self, count):
        return timed(self._step, count)

    def _step(self):
        low = self.options["dtype"] == "bfloat16"
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            if self.options["loss"] == "labels":
                loss = self.forward(input_ids=self.tokens, labels=self.tokens).loss
            else:
                logits = self.forward(input_ids=self.tokens).logits
                loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), self.tokens[0, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()  # torch's CPU operations are synchronous

    def matmul_peak(self, size, repetitions):
        """FLOP/s of torch's own square fp32 product, for comparison with XLA's."""
        a = torch.randn(size, size)
        times = []
        for _ in range(repetitions):
            start = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - start)
        return {"flops": 2 * size**3 / statistics.median(times)}


def make_checkpoint(shape, path, seed):
    """Write a randomly initialised model as a Hugging Face checkpoint folder."""
    torch.manual_seed(seed)
    config = transformers.Qwen3Config(**shape, use_cache=False)
    transformers.Qwen3ForCausalLM(config).float().save_pretrained(path)
    return {}


training = Training()
serve(
    {
        "make_checkpoint": make_checkpoint,
        "start": training.start,
        "steps": training.steps,
        "matmul_peak": training.matmul_peak,
    }
)
