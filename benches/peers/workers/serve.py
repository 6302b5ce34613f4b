"""A peer as a process of its own: `python serve.py PEER.py`, one JSON object a line in, one a line out.

    {"op": "version"}                                              -> {"ok": true, "version": "1.2.3"}
    {"op": "load", "slot": s, "case": {...}}                       -> {"ok": true, "variants": {name: kernel}}
    {"op": "output", "slot": s, "variant": name, "path": "y.npy"}  -> {"ok": true}
    {"op": "time", "slot": s, "variant": name, "seconds": 0.02}    -> {"ok": true, "samples": [seconds, ...]}
    {"op": "drop"}                                                 -> {"ok": true}

What goes wrong is {"ok": false, "error": "one line"}. PEER.py has `version()` and `load(case)`, which returns
{variant: Loaded}. Runs in the peer's environment: numpy and the peer, nothing of torch or tautorch.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import signal
import sys
from typing import Any

PR_SET_PDEATHSIG = 1


def answer(peer: Any, loaded: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    """Do what the request asks; `loaded` holds the variants of every slot's case."""
    from slices import time_slice

    op = request["op"]
    if op == "version":
        return {"version": peer.version()}
    if op == "load":
        loaded[request["slot"]] = variants = peer.load(request["case"])
        return {"variants": {name: variant.kernel for name, variant in variants.items()}}
    if op == "output":
        import numpy

        variant = loaded[request["slot"]][request["variant"]]
        variant.call()
        numpy.save(request["path"], numpy.ascontiguousarray(variant.output()))
        return {}
    if op == "time":
        variant = loaded[request["slot"]][request["variant"]]
        return {"samples": time_slice(variant.call, request["seconds"])}
    if op == "drop":
        loaded.clear()
        return {}
    raise ValueError(f"unknown op {op!r}")


def main() -> None:
    # A stopped worker sees no end of its input, so the kernel ends it with the harness.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # Libraries print to stdout: they get stderr, the protocol keeps the pipe.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    loaded: dict[str, Any] = {}
    peer: Any = None
    for line in sys.stdin:
        try:
            if peer is None:
                spec = importlib.util.spec_from_file_location("peer", sys.argv[1])
                assert spec is not None and spec.loader is not None
                peer = importlib.util.module_from_spec(spec)
                sys.modules["peer"] = peer
                spec.loader.exec_module(peer)
            reply = {"ok": True, **answer(peer, loaded, json.loads(line))}
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            reply = {"ok": False, "error": f"{type(error).__name__}: {text}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
