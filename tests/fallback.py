"""A tokenizer that falls back to bytes, and leaves out the space that a text begins with."""

from types import SimpleNamespace

from tokenizers import Tokenizer, decoders, models


def byte_fallback(*words):
    """A tokenizer like Llama 2's: these tokens, and behind them one of each byte."""
    names = [*words, *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(
        models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True)
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return SimpleNamespace(backend_tokenizer=backend, convert_ids_to_tokens=backend.id_to_token)
