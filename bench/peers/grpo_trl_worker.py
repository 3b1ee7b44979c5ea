"""The peer of grpo.py: TRL's GRPOTrainer on torch's CPU. Runs in the torch environment.

    TORCH_PYTHON grpo_trl_worker.py OPTIONS_JSON OUT_JSONL

Writes a line per step: seconds, drawn tokens, reward, loss.
"""

import difflib
import json
import os
import sys
import tempfile
import time

import datasets
import torch
import transformers
import trl


def main(options, out):
    torch.set_num_threads(options["threads"])
    data = datasets.Dataset.from_list(options["tasks"])
    lines, drawn = [], []

    def reward(completions, answer, completion_ids, **kwargs):
        del kwargs
        drawn.append(sum(map(len, completion_ids)))
        said = [turns[-1]["content"].strip() for turns in completions]
        return [
            difflib.SequenceMatcher(None, a, b, autojunk=False).ratio()
            for a, b in zip(said, answer, strict=True)
        ]

    with tempfile.TemporaryDirectory() as folder:
        rows = options["tasks_per_step"] * options["group_size"]
        micro = options["rows"] or rows
        config = trl.GRPOConfig(
            output_dir=folder,
            max_steps=options["steps"],
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=rows // micro,
            num_generations=options["group_size"],
            max_completion_length=options["tokens"],
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            beta=0.0,
            loss_type=options["loss"],
            scale_rewards=False,
            learning_rate=options["learning_rate"],
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            weight_decay=0.01,
            max_grad_norm=1.0,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            seed=0,
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(
            options["model"], dtype=torch.float32, attn_implementation="sdpa"
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            options["model"], padding_side="left"
        )
        trainer = trl.GRPOTrainer(
            model=model,
            args=config,
            train_dataset=data,
            processing_class=tokenizer,
            reward_funcs=reward,
        )

        class Clock(transformers.TrainerCallback):
            def on_step_begin(self, *args, **kwargs):
                self.begin = time.perf_counter()

            def on_step_end(self, *args, **kwargs):
                lines.append({"seconds": time.perf_counter() - self.begin})

            def on_log(self, args, state, control, logs=None, **kwargs):
                if logs and "loss" in logs:
                    lines[-1] |= {"loss": logs["loss"], "reward": logs["reward"]}

        trainer.add_callback(Clock())
        trainer.train()
    assert len(drawn) == len(lines), (len(drawn), len(lines))
    for line, tokens in zip(lines, drawn, strict=True):
        line["tokens"] = tokens
    with open(out, "w") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
main(json.loads(sys.argv[1]), sys.argv[2])
