"""Object discovery: LOST and TokenCut on the features of any model, and CorLoc."""

from vitreg.discovery.discover import Detection, discover_objects

__all__ = ["Detection", "discover_objects"]
