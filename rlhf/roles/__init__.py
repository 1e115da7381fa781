"""Plain classes, one per role; none knows Ray. A role speaks ``score`` and, if it learns, ``update``."""
