"""Exported tiers for whoever uses them: load, look up, score, top-k. numpy only; no torch, no pyarrow."""

from medscale.runtime.cascade import Cascade
from medscale.runtime.files import needed_files
from medscale.runtime.tier import Tier

__all__ = ["Cascade", "Tier", "needed_files"]
