"""The environments that jaxrl brings: their tasks, replies and rewards."""

import pytest

from jaxrl.envs.protocol import make_environment
from jaxrl.options import ConfigError


def said(task, *turns):
    """The conversation with turns of the model, and replies, by turns."""
    roles = ("assistant", "user") * len(turns)
    return [
        *task.messages,
        *({"role": r, "content": t} for r, t in zip(roles, turns, strict=False)),
    ]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("reverse_text", {}),
        ("guess_number", {}),
        ("reasoning_gym", {"dataset": "chain_sum"}),
    ],
)
def test_tasks_are_drawn_from_the_seed_alone(name, options):
    one, again, other = (
        make_environment(name, options | {"count": 20, "seed": seed}) for seed in (3, 3, 4)
    )
    assert len(one) == 20
    tasks = [one.task(i) for i in range(20)]
    assert tasks == [again.task(i) for i in reversed(range(20))][::-1]
    assert len({task.id for task in tasks}) == 20
    assert len({str(task.info) for task in tasks}) > 1
    assert [t.info for t in tasks] != [other.task(i).info for i in range(20)]


def test_reverse_text():
    env = make_environment("reverse_text", {"min_words": 2, "max_words": 2})
    task = env.task(0)
    right = task.info["answer"]
    assert right[::-1] in task.messages[0]["content"] and not env.reply(task, said(task, "x"))
    assert env.score(task, said(task, f"So: <reversed>{right}</reversed>.")) == {
        "reward": 1.0,
        "exact": 1.0,
    }
    assert env.score(task, said(task, right))["reward"] == 0  # no tags
    half = env.score(task, said(task, f"<reversed>{right[: len(right) // 2]}</reversed>"))
    assert 0.5 < half["reward"] < 0.8 and half["exact"] == 0
    plain = make_environment("reverse_text", {"min_words": 2, "max_words": 2, "tags": False})
    assert plain.score(plain.task(0), said(task, f" {right}\n"))["exact"] == 1


def test_guess_number():
    env = make_environment("guess_number", {"high": 100, "guesses": 3})
    task = env.task(5)
    number = task.info["number"]
    assert 1 < number < 100  # of this seed
    say = lambda *turns: env.reply(task, said(task, *turns))  # noqa: E731
    assert say(f"Is it {number - 1}?") == ({"role": "user", "content": "Higher."},)
    assert say("I begin with 1, or 100")[0]["content"] == "Lower."
    assert say("hm")[0]["content"] == "That is no number."
    assert say("1", "Higher.", str(number)) == () == say("1", "Higher.", "1", "Higher.", "2")
    score = lambda *turns: env.score(task, said(task, *turns))  # noqa: E731
    assert score(str(number)) == {"reward": 1.0, "found": 1.0, "turns": 1.0}
    assert score("1", "Higher.", str(number))["reward"] == pytest.approx(2 / 3)
    assert score("1", "Higher.", "1", "Higher.", "1") == {"reward": 0, "found": 0, "turns": 3}


def test_reasoning_gym():
    options = {"dataset": "chain_sum", "options": {"min_terms": 2, "max_terms": 2}}
    env = make_environment("reasoning_gym", options)
    task = env.task(0)
    right = task.info["answer"]
    assert "<answer>" in task.messages[0]["content"]
    assert env.score(task, said(task, f"<answer>{right}</answer>"))["reward"] == 1
    assert env.score(task, said(task, right)) == {"reward": 0.0, "answered": 0.0}
    assert env.score(task, said(task, f"<answer>{int(right) + 1}</answer>"))["reward"] < 0.1
    plain = make_environment("reasoning_gym", options | {"tags": False})
    assert plain.score(plain.task(0), said(task, f"1 and 2 are {right}."))["reward"] == 1


@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        ("nothing", {}, "unknown environment 'nothing'; use reverse_text, guess_number"),
        ("no.such:Thing", {}, "environment 'no.such:Thing' cannot be imported: No module"),
        ("jaxrl.envs.protocol:Thing", {}, "cannot be imported: module .* has no attribute"),
        ("reverse_text", {"x": 1}, r"got an unexpected keyword argument 'x'; it takes count, min"),
        ("reverse_text", {"min_words": 9}, "min_words 9 must be 1 to max_words 4"),
        ("guess_number", {"guesses": 0}, "high is 20 and guesses 0"),
        ("reasoning_gym", {}, "missing a required .*'dataset'; it takes dataset"),
        ("reasoning_gym", {"dataset": "sums"}, "reasoning_gym has no 'sums'; it has"),
        (
            "reasoning_gym",
            {"dataset": "chain_sum", "options": {"min_terms": -1}},
            "chain_sum does not take",
        ),
    ],
)
def test_bad_options_are_one_line(name, options, problem):
    with pytest.raises(ConfigError, match=problem) as error:
        make_environment(name, options)
    assert "\n" not in str(error.value)
