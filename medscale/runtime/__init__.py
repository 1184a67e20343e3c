"""Exported tiers for whoever uses them: load, look up, score, top-k. numpy only; no torch, no pyarrow."""

from medscale.runtime.tier import Tier

__all__ = ["Tier"]
