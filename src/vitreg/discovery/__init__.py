"""Object discovery: LOST and TokenCut on the features of any model, and CorLoc."""

from typing import TYPE_CHECKING

from vitreg.common.lazy import lazy

if TYPE_CHECKING:
    from vitreg.discovery.discover import Detection, discover_objects

__all__ = ["Detection", "discover_objects"]
__getattr__, __dir__ = lazy(__name__, {"discover": ["Detection", "discover_objects"]})
