"""Where roles run. ``spawn`` returns an object with the role's methods; the loop can't tell which cluster it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rlhf import config

Role = TypeVar("Role")


class RoleDied(RuntimeError):
    """A role's process ended while the run needed it."""


class PlacementError(RuntimeError):
    """The roles can't be placed: more was asked for than there is."""


class Cluster(Protocol):
    def spawn(self, name: str, role: Callable[..., Role], *, ranks: int = 1, **kwargs: Any) -> Role:
        """Start ``role(**kwargs)`` as ``name`` on ``ranks`` data-parallel ranks; blocks until they are built.

        What is called on the result is divided over the ranks as the role's methods say (``rlhf.division``).
        """

    def stop(self, role: Any) -> None:
        """End one role and give its memory back."""

    def shutdown(self) -> None:
        """End all roles."""


def make_cluster(section: config.Cluster, log_folder: Path) -> Cluster:
    """The cluster of ``cluster.kind``. ``log_folder`` receives one log per role (under Ray)."""
    if section.kind == "ray":
        from rlhf.cluster.ray import RayCluster

        return RayCluster(section, log_folder)
    from rlhf.cluster.local import LocalCluster

    return LocalCluster(section)
