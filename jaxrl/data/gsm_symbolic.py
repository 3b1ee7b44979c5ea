"""python -m jaxrl.data.gsm_symbolic OUT_DIR: worked answers to grade-school maths, offline.

A small real data set to try things on: reasoning-gym's generator `gsm_symbolic` (Apache-2.0, after
arXiv:2410.05229) draws names and numbers for a hundred problems and works them out in words. Writes
train.jsonl and held_out.jsonl, chats of one question and its worked answer, which ends in
"#### NUMBER"; no question is in both, but their problems are the same hundred. Needs the package
reasoning-gym, which is no dependency of jaxrl.
"""

import argparse
import importlib.util
import json
import sys
import warnings
from pathlib import Path

from jaxrl.models.safetensors_folder import new_folder

INSTALL = "pip install reasoning-gym"


def write(out: str | Path, *, train: int = 2000, held_out: int = 200, seed: int = 0) -> Path:
    """Write so many samples of each file into the new folder `out`; the same for the same seed.

    Each line has `messages` and, besides, `answer`, the final number as text. Raises
    `ModuleNotFoundError` saying what to install, `ValueError` where `out` exists and is not empty.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ModuleNotFoundError(f"gsm_symbolic needs the package reasoning-gym: {INSTALL}")
    with warnings.catch_warnings():  # of a package that reasoning-gym imports
        warnings.simplefilter("ignore", SyntaxWarning)
        import reasoning_gym

    # The problems are a hundred and their numbers few, so that some questions come twice.
    drawn = reasoning_gym.create_dataset("gsm_symbolic", size=2 * (train + held_out), seed=seed)
    samples = {item["question"]: _sample(item) for item in drawn if _is_right(item)}
    lines = list(samples.values())[: train + held_out]
    if len(lines) < train + held_out:
        raise ValueError(f"only {len(lines)} different questions with right answers were drawn")
    with new_folder(Path(out)) as folder:
        for name, part in (("held_out", lines[:held_out]), ("train", lines[held_out:])):
            (folder / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
    return Path(out)


def final_answer(text: str) -> str:
    """The number behind the last "####" of a worked answer, "" without one."""
    _, mark, rest = text.rpartition("####")
    words = rest.replace(",", "").split()
    return words[0].rstrip(".") if mark and words else ""


def _is_right(item) -> bool:
    """Whether the worked answer ends in the answer, which is not so in every problem."""
    return final_answer(item["metadata"]["answer_cot"]) == item["answer"]


def _sample(item) -> str:
    chat = [
        {"role": "user", "content": item["question"]},
        {"role": "assistant", "content": item["metadata"]["answer_cot"]},
    ]
    return json.dumps({"messages": chat, "answer": item["answer"]}, ensure_ascii=False) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m jaxrl.data.gsm_symbolic", description=__doc__)
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path, help="a new folder")
    parser.add_argument("--train", type=int, default=2000, help="samples of train.jsonl")
    parser.add_argument("--held_out", type=int, default=200, help="samples of held_out.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        out = write(args.out_dir, train=args.train, held_out=args.held_out, seed=args.seed)
        print(f"{args.train} and {args.held_out} samples written to {out}")
    except (ModuleNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
