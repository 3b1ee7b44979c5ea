"""Rollouts of a scripted engine: what is kept of turns, replies and rewards, and of failures."""

import itertools

import pytest
from tiny_run import CHATML, tiny_checkpoint

from jaxrl.data.tokenizer import load_tokenizer
from jaxrl.data.tool_calls import parse_tool_calls
from jaxrl.envs.curriculum import Curriculum
from jaxrl.envs.isolated import Isolated
from jaxrl.envs.order import TaskOrder
from jaxrl.envs.protocol import SingleTurn, Task, last_turn
from jaxrl.options import ConfigError
from jaxrl.rollout.collector import Collector
from jaxrl.rollout.generation import InTurns
from jaxrl.rollout.requests import Completion, Request, Sampling
from jaxrl.train.advantages import is_flat
from jaxrl.train.rl_metrics import failures


class Asks:
    """Says "more?" until a turn says "done"; the reward is how many turns there were."""

    def __len__(self):
        return 1

    def task(self, index):
        return Task(str(index), ({"role": "user", "content": f"go {index}"},))

    def reply(self, task, messages):
        if "broken" in last_turn(messages):
            raise OSError("no reply")
        if "odd" in last_turn(messages):
            return [{}]
        if "done" in last_turn(messages):
            return []
        return [{"role": "user", "content": "more?"}]

    def score(self, task, messages):
        if "zero" in last_turn(messages):
            return 1 / 0
        return {"reward": sum(m["role"] == "assistant" for m in messages), "x": 5}


class Once(SingleTurn, Asks):
    def reply(self, task, messages):
        raise AssertionError("of a single turn nobody asks for a reply")


class Script:
    """An engine that says the next of its lines; "..." at a line's end: it was cut off there."""

    def __init__(self, tokenizer, *lines, limit=10**6):
        self.hf, self.stop = tokenizer.hf, tokenizer.stop_ids[0]
        self.lines, self.limit = iter(lines), limit
        self.open, self.prompts, self.samplings = [], [], []

    @property
    def busy(self):
        return bool(self.open)

    def submit(self, prompt, sampling=None):
        if len(prompt) > self.limit:
            raise ConfigError(f"the prompt has {len(prompt)} tokens")
        completions = [Completion(i) for i in range(sampling.n)]
        self.prompts.append(list(prompt))
        self.samplings.append(sampling)
        self.open += completions
        return Request(len(self.prompts), prompt, sampling, completions)

    def set_weights(self, weights, version):
        del weights, version

    def step(self):
        completion = self.open.pop(0)
        line = next(self.lines)
        if line == "given up":
            completion.finish, completion.failure = "abort", "nobody answers"
            return
        cut = line.endswith("...")
        tokens = self.hf(line.removesuffix("..."), add_special_tokens=False).input_ids
        completion.tokens += tokens if cut else [*tokens, self.stop]
        completion.logprobs += [-0.5] * len(completion.tokens)
        completion.versions += [2] * len(completion.tokens)
        completion.finish = "length" if cut else "stop"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(tiny_checkpoint(tmp_path_factory.mktemp("model")), 264)


@pytest.fixture(scope="module")
def isolated():
    with Isolated("test_collector:Asks", {}, timeout_s=30) as made:
        yield made


def collected(tokenizer, isolated, *lines, environment=None, limit=10**6, count=1, **options):
    environment = environment or Asks()
    engine = Script(tokenizer, *lines, limit=limit)
    options = {"group_size": 1, "sampling": Sampling(), "max_len": 500} | options
    made = Collector(engine, environment, isolated, tokenizer, **options)
    tasks = [environment.task(i) for i in range(count)]
    return made.collect(tasks, itertools.repeat(7, count)), made, engine


def shown(tokenizer, rollout):
    """(drawn, text) of each run of tokens."""
    pairs = zip(rollout.drawn, rollout.tokens, strict=True)
    for drawn, run in itertools.groupby(pairs, key=lambda pair: pair[0]):
        yield drawn, tokenizer.hf.decode([token for _, token in run])


def test_turns_and_replies_alternate_as_the_template_writes_them(tokenizer, isolated):
    (group,), made, engine = collected(tokenizer, isolated, "first", "2nd", "done")
    (rollout,) = group.rollouts
    asked = "\n<|im_start|>user\nmore?<|im_end|>\n<|im_start|>assistant\n"
    assert list(shown(tokenizer, rollout)) == [
        (False, "<|im_start|>user\ngo 0<|im_end|>\n<|im_start|>assistant\n"),
        (True, "first<|im_end|>"),
        (False, asked),
        (True, "2nd<|im_end|>"),
        (False, asked),
        (True, "done<|im_end|>"),
    ]
    whole = tokenizer.hf.apply_chat_template(rollout.messages, tokenize=False)
    assert tokenizer.hf.decode(rollout.tokens) + "\n" == whole
    assert (rollout.reward, rollout.figures, rollout.failure) == (3.0, {"x": 5.0}, None)
    assert not rollout.truncated and not made.in_flight
    assert engine.prompts[1] == rollout.tokens[: len(engine.prompts[1])]
    for drawn, logprob, version in zip(
        rollout.drawn, rollout.logprobs, rollout.versions, strict=True
    ):
        assert (logprob, version) == ((-0.5, 2) if drawn else (0.0, -1))
    seeds = [sampling.seed for sampling in engine.samplings]
    assert seeds[0] == 7 and len(set(seeds)) == 3
    _, _, again = collected(tokenizer, isolated, "first", "2nd", "done")
    assert [sampling.seed for sampling in again.samplings] == seeds


class Calls(Asks):
    """Answers calls of the tool "now"."""

    def task(self, index):
        return Task(str(index), ({"role": "user", "content": "go"},), tools=({"name": "now"},))

    def reply(self, task, messages):
        calls = parse_tool_calls(last_turn(messages), task.tools)[1]
        return [{"role": "tool", "content": call["name"] + "!"} for call in calls]


def test_tools_are_in_the_prompt_and_their_answers_behind_the_call(tmp_path):
    (tmp_path / "tools.jinja").write_text(
        "{% for t in tools or [] %}{{ t.name }} {% endfor %}" + CHATML
    )
    folder = tiny_checkpoint(tmp_path / "model")
    tokenizer = load_tokenizer(folder, 264, str(tmp_path / "tools.jinja"))
    said = '<tool_call>{"name": "now"}</tool_call>'
    with Isolated("test_collector:Calls", {}) as isolated:
        (group,), _, _ = collected(tokenizer, isolated, said, "done", environment=Calls())
        (rollout,) = group.rollouts
        assert list(shown(tokenizer, rollout)) == [
            (False, "now <|im_start|>user\ngo<|im_end|>\n<|im_start|>assistant\n"),
            (True, f"{said}<|im_end|>"),
            (False, "\n<|im_start|>tool\nnow!<|im_end|>\n<|im_start|>assistant\n"),
            (True, "done<|im_end|>"),
        ]
        assert rollout.reward == 2.0
        plain = load_tokenizer(folder, 264)  # whose template knows no tools
        (group,), _, _ = collected(plain, isolated, environment=Calls())
    assert "does not show the tool 'now'" in group.rollouts[0].failure


def test_a_turn_that_is_cut_off_is_scored_as_it_is(tokenizer, isolated):
    (group,), _, _ = collected(tokenizer, isolated, "first...")
    (rollout,) = group.rollouts
    assert rollout.truncated and rollout.reward == 1.0
    assert tokenizer.hf.decode(rollout.tokens).endswith("assistant\nfirst")


def test_a_turn_that_is_given_up_is_a_failure(tokenizer, isolated):
    (group,), made, _ = collected(tokenizer, isolated, "x", "given up", "done", group_size=2)
    assert [r.failure for r in group.rollouts] == [None, "turn: nobody answers"]
    assert [r.reward for r in group.rollouts] == [2.0, None] and not made.in_flight


def test_of_a_single_turn_no_reply_is_asked_for(tokenizer, isolated):
    (group,), _, _ = collected(tokenizer, isolated, "first", environment=Once())
    assert group.rollouts[0].reward == 1.0


def test_turns_end_at_their_limit_and_where_there_is_no_room(tokenizer, isolated):
    (group,), _, _ = collected(tokenizer, isolated, "a", "b", "c", max_turns=2)
    assert group.rollouts[0].reward == 2.0 and not group.rollouts[0].truncated
    (group,), _, engine = collected(tokenizer, isolated, "a", "b", "c", max_len=60)
    (rollout,) = group.rollouts
    assert (rollout.reward, rollout.truncated, rollout.failure) == (2.0, True, None)
    assert len(rollout.tokens) <= 60 and rollout.messages[-1]["role"] == "assistant"
    assert engine.samplings[0].max_tokens == 60 - len(engine.prompts[0])


def test_turns_of_the_tasks_own_examples_are_not_counted(tokenizer, isolated):
    class Shown(Asks):
        def task(self, index):
            said = [{"role": r, "content": "so"} for r in ("user", "assistant") * 3]
            return Task("shown", (*said, {"role": "user", "content": "go"}))

    (group,), _, engine = collected(
        tokenizer, isolated, "a", "b", "c", environment=Shown(), max_turns=2
    )
    assert len(engine.prompts) == 2 and group.rollouts[0].reward == 5.0


def test_a_group_has_all_its_rollouts_and_groups_come_in_order(tokenizer, isolated):
    lines = ["done", "x", "done", "done", "zero done", "done", "done"]
    groups, _, _ = collected(tokenizer, isolated, *lines, count=2, group_size=3)
    assert [group.number for group in groups] == [0, 1]
    assert [r.reward for r in groups[0].rollouts] == [1.0, 2.0, 1.0]
    assert [r.reward for r in groups[1].rollouts] == [1.0, None, 1.0]
    assert groups[1].rollouts[1].failure == "reward: ZeroDivisionError: division by zero"
    assert len(groups[1].scored) == 2


def test_a_prompt_that_is_too_long_and_a_reply_that_fails_are_failures(tokenizer, isolated):
    (group,), _, _ = collected(tokenizer, isolated, limit=5, group_size=2)
    assert all(r.failure.startswith("prompt: the prompt has") for r in group.rollouts)
    (group,), _, _ = collected(tokenizer, isolated, group_size=1, max_len=20)
    assert "a rollout at most 20; shorten it" in group.rollouts[0].failure
    (group,), _, _ = collected(tokenizer, isolated, "broken")
    assert group.rollouts[0].failure == "reply: OSError: no reply"
    (group,), _, _ = collected(tokenizer, isolated, "odd")
    (rollout,) = group.rollouts
    assert rollout.failure == "reply: ValueError: message 0 has the role None, no text"
    assert [m["role"] for m in rollout.messages] == ["user", "assistant"]


def test_a_conversation_that_the_template_refuses_is_a_failure(tokenizer, isolated):
    class Odd(Asks):
        def task(self, index):
            return Task("odd", ({"role": "user"},))

    (group,), _, _ = collected(tokenizer, isolated, environment=Odd())
    assert group.rollouts[0].failure.startswith("prompt: the chat template refuses the messages: ")


class Partly(Asks):
    """Tasks of which some cannot be had: 2 raises, 3 is none, 4 is too long, 5 is no text."""

    def __len__(self):
        return 8

    def task(self, index):
        if index == 2:
            raise OSError("no data")
        content = {4: "long " * 99, 5: None}.get(index, "go")
        return None if index == 3 else Task(str(index), ({"role": "user", "content": content},))


def rounds(tokenizer, isolated, lines, environment, order, count):
    """Groups of two as a trainer gets them, in turns; the curriculum is told of their rewards."""
    options = {"group_size": 2, "sampling": Sampling(), "max_len": 400}
    engine = Script(tokenizer, *lines)
    collector = Collector(engine, environment, isolated, tokenizer, **options)
    generation, groups = InTurns(collector, environment, order), []
    while len(groups) < count:
        for group in generation.take(1):
            groups.append(group)
            if group.rewards:
                generation.record(group.number, sum(group.rewards) / len(group.rewards))
    return groups, generation


def test_tasks_that_cannot_be_asked_are_counted_by_what_failed(tokenizer, isolated):
    lines = ["done"] * 8
    groups, generation = rounds(tokenizer, isolated, lines, Partly(), TaskOrder(8, 0), 8)
    assert failures(groups) == {"task": 6, "prompt": 2}  # of groups of two
    reasons = {r.task.id: r.failure for group in groups for r in group.rollouts if r.failure}
    assert reasons.pop("4").startswith("prompt: it has ")
    assert reasons == {
        "task 2": "task: OSError: no data",
        "task 3": "task: TypeError: it is None, no Task",
        "task 5": "task: ValueError: message 0 has the content None, no text",
    }
    assert sum(len(group.scored) for group in groups) == 8
    assert generation.place()["again"] == []


def test_rewards_that_are_equal_are_a_flat_group_and_put_their_task_aside(tokenizer, isolated):
    # Two rollouts of each, of a turn each; of the later tasks one has two.
    lines = ["done"] * 4 + ["done", "x", "done"] * 20
    order = TaskOrder(4, 0, Curriculum(0, hard=1.0))
    groups, generation = rounds(tokenizer, isolated, lines, Asks(), order, 12)
    assert [is_flat(group.rewards) for group in groups] == [True] * 2 + [False] * 10
    asked = [group.rollouts[0].task.id for group in groups]
    aside = set(asked[:2])
    assert len(aside) == 2 and aside.isdisjoint(asked[2:])
    assert generation.curriculum_figures() == {"curriculum/hard": 2.0}
