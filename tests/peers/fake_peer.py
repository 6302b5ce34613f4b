"""A peer that needs nothing but numpy; the case's `behave` says what it does wrong."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
from loaded import Loaded


def version() -> str:
    print("a library that prints to stdout")
    return "0.1"


def load(case: dict[str, Any]) -> dict[str, Loaded]:
    behave = case.get("behave", "")
    if behave == "crash on load":
        os.abort()
    if behave == "hang":
        time.sleep(60)
    if behave == "refuse":
        raise ValueError("no such layer\nwith a second line")
    x, weight, bias = (np.load(case[name]) for name in ("x", "weight", "bias"))
    y = x.reshape(len(x), -1) @ weight.reshape(len(weight), -1).T + bias
    if behave == "wrong":
        y = y + 1
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1
        if behave == "crash later" and calls > 3:
            os._exit(3)

    def slow() -> None:
        time.sleep(2e-3)

    return {"fast": Loaded(call, lambda: y, "fake"), "slow": Loaded(slow, lambda: y, "fake")}
