"""Process groups, and each rank's share of a micro-batch."""

from meditron_train.parallel.batch import LocalBatch, PackedTokens, localize
from meditron_train.parallel.forked import free_port, rejoin
from meditron_train.parallel.mesh import Mesh, destroy, initialize
from meditron_train.parallel.pretended import pretend

__all__ = [
    "LocalBatch",
    "Mesh",
    "PackedTokens",
    "destroy",
    "free_port",
    "initialize",
    "localize",
    "pretend",
    "rejoin",
]
