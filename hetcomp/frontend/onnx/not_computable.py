"""What a node that hetcomp cannot do is refused with, before it is known which one it is."""

from __future__ import annotations


class NotComputable(Exception):
    """The end of a sentence that begins with the node: ``has no attribute k``."""
