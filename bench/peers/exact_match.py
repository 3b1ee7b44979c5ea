"""How many worked answers end in the right number: a model folder on held-out chats, greedily.

    TORCH_PYTHON bench/peers/exact_match.py MODEL_FOLDER held_out.jsonl [--items 100]

transformers generates, not jaxrl: the folder is what `jaxrl.export` wrote (or the base model), so
that the figure is also one of the export. An answer's number is the one behind "####", or, where
there is none, the last number in the text. Prints one JSON object.
"""

import argparse
import json
import re
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def number(text):
    _, mark, rest = text.rpartition("####")
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", rest if mark else text)
    if not found:
        return None
    return float(found[0 if mark else -1].replace(",", ""))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("chats")
    parser.add_argument("--items", type=int, default=100, help="the first so many")
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=256)
    args = parser.parse_args()
    with open(args.chats) as file:
        chats = [json.loads(line) for line in file][: args.items]
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    right = marked = ended = 0
    begin = time.monotonic()
    samples = []
    for first in range(0, len(chats), args.batch):
        part = chats[first : first + args.batch]
        texts = [
            tokenizer.apply_chat_template(
                chat["messages"][:1], tokenize=False, add_generation_prompt=True
            )
            for chat in part
        ]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.no_grad():
            out = model.generate(
                **inputs,
                max_new_tokens=args.new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        for chat, row in zip(part, out[:, inputs.input_ids.shape[1] :], strict=True):
            text = tokenizer.decode(row, skip_special_tokens=True)
            right += number(text) == float(chat["answer"])
            marked += "####" in text
            ended += tokenizer.eos_token_id in row.tolist()
            samples.append(text)
    share = right / len(chats)
    result = {
        "items": len(chats),
        "right": right,
        "exact_match": share,
        "standard_error": (share * (1 - share) / len(chats)) ** 0.5,
        "with_mark": marked,
        "ended_by_stop_token": ended,
        "seconds": round(time.monotonic() - begin),
        "first_answer": samples[0],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
