"""The parts of a run, by the name they have on the command line."""

from collections.abc import Callable

from benches.peers.parts import conv, dense, fp32, sparse
from benches.peers.session import Session

PARTS: dict[str, Callable[[Session], None]] = {
    "dense": dense.run,
    "conv": conv.run,
    "sparse": sparse.run,
    "fp32": fp32.run,
}
