"""Text as its tokens come, and the stop texts that end it."""

import pytest
from fallback import byte_fallback
from tiny_run import tiny_checkpoint

from jaxrl.data.tokenizer import load_tokenizer
from jaxrl.rollout.text import TextStream


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return load_tokenizer(tiny_checkpoint(tmp_path_factory.mktemp("model")), 264).hf


def streamed(hf, text, *stop):
    """(the text, how many tokens it took until a stop text was there, or None)."""
    stream = TextStream(hf, stop)
    for count, token in enumerate(hf(text, add_special_tokens=False).input_ids, 1):
        if stream.add(token):
            return stream.text, count
    return stream.text, None


def test_text_is_what_the_tokens_say_characters_of_several_tokens_too(hf):
    assert streamed(hf, "Grüße, 世界!<|im_end|>") == ("Grüße, 世界!", None)


def test_a_stop_text_ends_it_and_is_no_part_of_it(hf):
    assert streamed(hf, "one. two. three", "two") == ("one. ", 8)
    assert streamed(hf, "one. two. three", "xx", "wo. t") == ("one. t", 11)
    assert streamed(hf, "aab", "ab", "b") == ("a", 3)  # the one that begins first


def test_what_may_begin_a_stop_text_is_not_safe_yet(hf):
    stream, safe = TextStream(hf, ("<end>", "ndx")), []
    for token in hf("a<en<end", add_special_tokens=False).input_ids:
        assert not stream.add(token)
        safe.append(stream.text[: stream.safe])
    assert safe == ["a", "a", "a", "a", "a<en", "a<en", "a<en", "a<en"]
    assert TextStream(hf).safe == 0


def test_bytes_that_make_no_character_end_nothing():
    hf, euro = byte_fallback("▁x", "▁y"), [2 + byte for byte in "€".encode()]
    tokens, (stream, said) = [*euro, 2 + 0xFF, 0, 1, *euro, 0], (TextStream(hf, ("<end>",)), [])
    for token in tokens:
        assert not stream.add(token)
        said.append(stream.text)
    x = "€\ufffd x"
    assert said == ["", "", "€", "€", x, f"{x} y", f"{x} y", f"{x} y", f"{x} y€", f"{x} y€ x"]
    # Known all at once, they make those before them none either.
    assert hf.backend_tokenizer.decode(tokens).startswith("\ufffd" * 4)


def test_a_stop_text_is_found_in_what_a_new_stream_says():
    stream = TextStream(byte_fallback("▁x"), ("\ufffd x",))
    stops = [stream.add(token) for token in [1 + 0xC3, 1 + 0xA9, 1 + 0xFF, 0]]
    assert (stops, stream.text) == ([False, False, False, True], "é")


def test_a_completion_begins_with_the_space_that_it_has_behind_its_prompt():
    hf = byte_fallback("▁x", "▁y")
    for prompt, text in (((0, 0), " y x"), ((), "y x"), ((2 + 0xC3,), "y x")):
        stream = TextStream(hf, ("x y",), prompt)
        assert not any([stream.add(token) for token in (1, 0)])
        assert stream.text == text
    assert TextStream(hf, (" y",), (0,)).add(1)
