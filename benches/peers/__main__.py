"""`make bench-peers`: our layers and the best of others in one run.

make bench-peers                                 everything, about a quarter of an hour on two idle cores
make bench-peers ARGS="dense --only ^128x1024"   one part, cases by a regular expression
make bench-peers ARGS="--quick"                  a few cases, short slices; nothing is written
make bench-peers ARGS="--setup"                  the peers' environments and nothing else
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import torch
from benches.peers import results, table
from benches.peers.environments import PEERS, NotHad, prepare
from benches.peers.parts import PARTS
from benches.peers.session import Session
from benches.peers.worker import Worker, WorkerError

from tautorch.testing.bench import machine
from tautorch.testing.cores import LEARN_S, Cores, patience

RESULTS = Path(__file__).resolve().parents[1] / "results"
ROUNDS, SLICE_MS = 7, 15.0
QUICK_ROUNDS, QUICK_SLICE_MS = 5, 8.0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "make bench-peers", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all if none")
    parser.add_argument("--quick", action="store_true", help="few cases, short slices; writes nothing")
    parser.add_argument("--only", default="", metavar="RE", help="cases whose name it finds")
    parser.add_argument("--peers", default=",".join(PEERS), metavar="NAMES", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, help=f"slices of each contestant a case; {ROUNDS}")
    parser.add_argument("--slice-ms", type=float, help=f"length of a slice; {SLICE_MS:g}")
    parser.add_argument("--output", type=Path, help="results file; benches/results/<machine>-peers.json")
    parser.add_argument(
        "--quieter", action="store_true",
        help="a row gives way only to one whose contestants together took less time (for shared machines)",
    )  # fmt: skip
    parser.add_argument(
        "--patience", type=patience, default=0.0, metavar="S",
        help="seconds a case may wait for cores on which no other guest of the host works (shared machines)",
    )  # fmt: skip
    parser.add_argument("--setup", action="store_true", help="install the peers and stop")
    options = parser.parse_args(arguments)
    for part in options.parts:
        if part not in PARTS:
            parser.error(f"no part {part!r}; there are {', '.join(PARTS)}")
    options.peers = [name for name in options.peers.split(",") if name]
    for name in options.peers:
        if name not in PEERS:
            parser.error(f"no peer {name!r}; there are {', '.join(PEERS)}")
    return options


def start(names: list[str]) -> tuple[dict[str, Worker], dict[str, str]]:
    """(a worker for each peer that can be had, its version); one line for each that cannot."""
    workers, versions = {}, {}
    for name in names:
        peer = PEERS[name]
        try:
            worker = Worker(peer.title, prepare(peer), peer.worker)
            versions[name] = worker.request(op="version", timeout=120)["version"]
            workers[name] = worker
        except (NotHad, WorkerError) as error:
            print(f"without {peer.title}: {error}", flush=True)
    return workers, versions


def main() -> int:
    options = parse()
    if options.setup:
        for name in options.peers:
            try:
                print(prepare(PEERS[name]))
            except NotHad as error:
                print(f"without {PEERS[name].title}: {error}")
        return 0
    warnings.filterwarnings(
        "ignore", message=".*quantized tensor creation functions.*deprecated", category=UserWarning
    )
    torch.set_num_threads(options.threads)
    workers, versions = start(options.peers)
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    slice_ms = options.slice_ms or (QUICK_SLICE_MS if options.quick else SLICE_MS)
    name = machine()
    path = options.output
    if path is None and not options.quick:
        path = RESULTS / f"{name.replace(' ', '-').lower()}-peers.json"
    about = results.about(name, versions, rounds, slice_ms, options.patience)
    print(f"{name}; " + ", ".join(f"{key} {value}" for key, value in about["versions"].items()), flush=True)
    kept = results.Results(path, about, options.quieter)
    cores = Cores(options.patience)
    session = Session(
        workers, kept, threads=options.threads, rounds=rounds, seconds=slice_ms / 1e3,
        quick=options.quick, say=lambda line: print(line, flush=True), only=options.only,
        cores=cores,
    )  # fmt: skip
    begin = time.monotonic()
    cores.learn(LEARN_S)
    try:
        with torch.inference_mode():
            for part in options.parts or PARTS:
                PARTS[part](session)
    except KeyboardInterrupt:
        print("broken off; what was measured is kept")
    finally:
        session.close()
    table.show(kept.rows)
    print(f"{len(kept.rows)} cases in {time.monotonic() - begin:.0f} s", "" if path is None else f"-> {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
