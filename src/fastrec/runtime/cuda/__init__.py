"""Whole rankers on a GPU: a plan, recognised as stages, becomes a handful of fused launches."""
