"""Tokens to text as they come, and where a stop text ends it."""

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream


class TextStream:
    """The text of a growing completion.

    hf: a tokenizer of transformers with a fast backend. stop: texts that end it.
    """

    def __init__(self, hf, stop: Sequence[str] = ()):
        self._backend = hf.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = stop
        self.text = ""

    def add(self, token: int) -> bool:
        """Take one more token; whether a stop text is there now, which `text` then ends before."""
        new = self._stream.step(self._backend, token)
        if not new:  # half a character, or a special token
            return False
        # A stop text that was not there before ends within what is new.
        longest = max(map(len, self._stop), default=0)
        begin = max(0, len(self.text) - longest + 1)
        self.text += new
        places = [at for stop in self._stop if (at := self.text.find(stop, begin)) >= 0]
        if places:
            self.text = self.text[: min(places)]
        return bool(places)

    @property
    def safe(self) -> int:
        """Characters of `text` that no stop text can take back any more."""
        for length in range(max(map(len, self._stop), default=1) - 1, 0, -1):
            tail = self.text[-length:]
            if len(tail) == length and any(stop.startswith(tail) for stop in self._stop):
                return len(self.text) - length
        return len(self.text)
