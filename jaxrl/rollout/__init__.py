"""Sampling completions from a model: the engine, the server, and clients of other engines."""
