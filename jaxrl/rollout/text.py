"""Tokens to text as they come, and where a stop text ends it."""

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream

_CONTEXT = 8  # tokens of a prompt that decide how what follows begins


class TextStream:
    """The text of a growing completion.

    hf: a tokenizer of transformers with a fast backend. stop: texts that end it. prompt: the tokens
    before it; some tokenizers leave out the space that a text begins with.
    """

    def __init__(self, hf, stop: Sequence[str] = (), prompt: Sequence[int] = ()):
        self._backend = hf.backend_tokenizer
        before = list(prompt[-_CONTEXT:])
        if self._backend.decode(before, skip_special_tokens=True).endswith("\ufffd"):
            before = []  # half a character, of which the stream would tell as of something new
        self._stream = DecodeStream(ids=before, skip_special_tokens=True)
        self._held: list[int] = []  # tokens whose text is not there yet
        self._stop = stop
        self.text = ""

    def add(self, token: int) -> bool:
        """Take one more token; whether a stop text is there now, which `text` then ends before."""
        new = self._step(token)
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

    def _step(self, token: int) -> str | None:
        """What is new of the text.

        Bytes that make no character change what those before them say, where a tokenizer falls
        back to bytes. The stream then refuses to go on, as what it said cannot be taken back;
        another one goes on behind it.
        """
        self._held.append(token)
        try:
            new = self._stream.step(self._backend, token)
        except Exception:  # it has no class of its own
            new = self._backend.decode(self._held, skip_special_tokens=True)
            self._stream = DecodeStream(ids=self._held, skip_special_tokens=True)
        if new:
            self._held.clear()
        return new

    @property
    def safe(self) -> int:
        """Characters of `text` that no stop text can take back any more."""
        longest = max(map(len, self._stop), default=1) - 1
        for length in range(min(longest, len(self.text)), 0, -1):
            tail = self.text[-length:]
            if any(stop.startswith(tail) for stop in self._stop):
                return len(self.text) - length
        return len(self.text)
