"""A server of one model over OpenAI's API; needs the `serve` extra."""
