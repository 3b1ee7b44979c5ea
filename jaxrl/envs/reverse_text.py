"""Write a text backwards, letter by letter."""

import difflib
import random
import re
from collections.abc import Sequence

from jaxrl.envs.protocol import Message, SingleTurn, Task, last_turn
from jaxrl.options import ConfigError

WORDS = """
air all and animal answer apple arm ask ball bank bear bed big bird black blue boat body book
bread bring brother build call car card cat chair child city clean clock cloud coat cold color
come cook corn count cup dance dark day deep dog door down dream drink drive ear earth east
eat egg end eye face fall farm fast father field fire fish floor flower fly food foot forest
friend fruit garden gate girl give glass gold good grass green hair half hand hat head hear
heart hill home horse hot hour house ice iron island jump key kind king lake lamp land laugh
leaf left leg letter light line lion long map milk mind moon morning mother mountain mouth
music name night north nose ocean old open orange page paint paper park pen people piano plant
play pond rain read red rice ring river road rock roof room rose run salt sand school sea seed
ship shoe sing sister sky sleep snow song south spoon spring star stone street sugar summer
sun swim table tail tea teach tell time tooth tower town train tree turn voice walk wall warm
watch water west wheel white wind window winter wolf wood word work write yellow young
""".split()  # noqa: SIM905


class ReverseText(SingleTurn):
    """`count` texts of `min_words` to `max_words` words, drawn from `seed`.

    reward: how alike the answer and the reversed text are, 2 M / T of difflib (M letters in
    matching blocks, T letters of both): 1 where they are equal. The answer is what stands between
    <reversed> and </reversed>, or, with `tags` False, the whole turn; metric `exact`.
    """

    def __init__(
        self,
        *,
        count: int = 2000,
        min_words: int = 2,
        max_words: int = 4,
        seed: int = 0,
        tags: bool = True,
    ):
        if not 1 <= min_words <= max_words:
            raise ConfigError(f"min_words {min_words} must be 1 to max_words {max_words}")
        self._count, self._seed, self._tags = count, seed, tags
        self._words = (min_words, max_words)

    def __len__(self) -> int:
        return self._count

    def task(self, index: int) -> Task:
        rng = random.Random(f"{self._seed} {index}")
        text = " ".join(rng.choices(WORDS, k=rng.randint(*self._words)))
        ask = f"Write this text backwards, letter by letter: {text}"
        if self._tags:
            ask += "\nPut the reversed text between <reversed> and </reversed>."
        name = f"reverse_text/{self._seed}/{index}"
        return Task(name, ({"role": "user", "content": ask},), {"answer": text[::-1]})

    def score(self, task: Task, messages: Sequence[Message]) -> dict[str, float]:
        said, wanted = last_turn(messages).strip(), task.info["answer"]
        if self._tags:
            found = re.findall(r"<reversed>(.*?)</reversed>", said, re.DOTALL)
            said = found[-1].strip() if found else ""
        alike = difflib.SequenceMatcher(None, said, wanted, autojunk=False).ratio()
        return {"reward": alike, "exact": float(said == wanted)}
