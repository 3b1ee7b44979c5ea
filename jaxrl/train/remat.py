"""Activation checkpointing: what of a layer is kept for backward, as `jax.checkpoint` policies."""

from collections.abc import Callable

import jax

POLICIES = ("none", "recompute", "selective", "offload")


def remat_policy(name: str) -> Callable:
    """The policy over the values that `Block` names.

    none: everything is kept. recompute: the layer's input. selective: also what attention returns,
    so that attention is not run again. offload: the layer's input, in pinned host memory. Always
    kept: which experts were chosen, or rounding could choose others in backward.
    """
    policies = jax.checkpoint_policies
    match name:
        case "none":
            return policies.everything_saveable
        case "recompute":
            return policies.save_only_these_names("layer_input", "experts_chosen")
        case "selective":
            return policies.save_only_these_names(
                "layer_input", "attention_out", "attention_residual", "mlp_input", "experts_chosen"
            )
        case "offload":
            return policies.save_and_offload_only_these_names(
                names_which_can_be_saved=["experts_chosen"],
                names_which_can_be_offloaded=["layer_input"],
                offload_src="device",
                offload_dst="pinned_host",
            )
    raise ValueError(f"unknown activation checkpointing {name!r}; one of {', '.join(POLICIES)}")
