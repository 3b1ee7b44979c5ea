"""The peer: transformers' Qwen3-MoE block, forward and backward. Runs in the torch environment."""

import torch
import transformers
from protocol import serve, timed
from safetensors.torch import load_file, save_file
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

OPTIONS = {
    "experts": "eager",  # transformers' experts_implementation: eager, batched_mm, grouped_mm
    "compile": "no",  # yes: torch.compile(block)
}


class Layer:
    def start(self, shape, tensors, options, threads):
        """tensors: a file of weights, input and cotangent."""
        torch.set_num_threads(threads)
        if unknown := set(options) - set(OPTIONS):
            raise ValueError(f"unknown options {unknown}; one of {list(OPTIONS)}")
        o = OPTIONS | options
        config = transformers.Qwen3MoeConfig(
            **shape, norm_topk_prob=True, experts_implementation=o["experts"]
        )
        assert config._experts_implementation == o["experts"]
        given = load_file(tensors)
        self.x, self.dy = given.pop("x")[None].requires_grad_(), given.pop("dy")[None]
        self.block = Qwen3MoeSparseMoeBlock(config)
        self.block.load_state_dict(given, strict=True)
        self.forward = torch.compile(self.block) if o["compile"] == "yes" else self.block
        return {"versions": {"torch": torch.__version__, "transformers": transformers.__version__}}

    def results(self, path):
        """Write output and gradients."""
        y = self._step()
        gradients = {name: p.grad for name, p in self.block.named_parameters()}
        save_file({"y": y.detach()[0].clone(), "x": self.x.grad[0].clone()} | gradients, path)
        return {}

    def steps(self, count):
        return timed(lambda: self._step() is None, count)

    def _step(self):
        self.block.zero_grad(set_to_none=True)
        self.x.grad = None
        y = self.forward(self.x)
        y.backward(self.dy)
        return y  # torch's CPU operations are synchronous


layer = Layer()
serve({"start": layer.start, "results": layer.results, "steps": layer.steps})
