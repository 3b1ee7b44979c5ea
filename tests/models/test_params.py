"""Random parameters: reproducible from key and path, and the same however they are drawn."""

import jax
import numpy as np
import pytest

from jaxrl.models.params import initial_value, specs
from jaxrl.models.presets import preset
from jaxrl.models.transformer import Transformer

SMALL = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 100, "num_layers": 2}
SPECS = specs(Transformer(preset("Qwen3-0.6B").replace(**SMALL)))


@pytest.mark.parametrize("path", SPECS, ids="/".join)
def test_drawn_in_turns_or_at_once_the_values_are_the_same(path):
    key, spec = jax.random.key(3), SPECS[path]
    at_once = initial_value(path, spec, key)
    assert at_once.shape == spec.shape
    in_turns = initial_value(path, spec, key, in_turns=True)
    np.testing.assert_allclose(in_turns, at_once, rtol=1e-5, atol=1e-7)  # fused otherwise


def test_normal_values_are_normal_and_differ_by_row_and_path():
    draws = [
        np.asarray(initial_value(path, spec, jax.random.key(0)))
        for path, spec in SPECS.items()
        if spec.init == "normal"
    ]
    values = np.concatenate([d.ravel() for d in draws])
    assert len(np.unique(values)) > 0.97 * values.size
    assert abs(values.mean()) < 0.0005
    assert abs(values.std() - 0.02) < 0.0005
