"""Where roles run. ``spawn`` returns an object with the role's methods; the loop can't tell which cluster it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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

    def together(self, methods: Sequence[Callable[..., Any]], *args: Any) -> list[Any]:
        """Call methods of different roles with the same arguments; at the same time where each has devices of its own,
        else one after another. Their results, in order."""

    def usage(self) -> dict[str, float]:
        """Memory by role, as metrics: GiB resident, now and at the peak, on the rank that has most (and now on each, of
        several); MiB that calls sent and received since the last time; MiB in the object store."""

    def stop(self, role: Any) -> None:
        """End one role and give its memory back."""

    def shutdown(self) -> None:
        """End all roles."""


def make_cluster(section: config.Cluster, log_folder: Path, ranks: Mapping[str, int]) -> Cluster:
    """The cluster of ``cluster.kind``.

    ``log_folder`` receives one log per role and rank (under Ray), and what each is doing (``.phase``).
    ``ranks``: of every role that needs a device, by name (``Config.ranks``).
    """
    if section.kind == "ray":
        from rlhf.cluster.ray import RayCluster

        return RayCluster(section, log_folder, ranks)
    from rlhf.cluster.local import LocalCluster

    return LocalCluster(section, log_folder)
