"""What `convert` did to each layer and to the whole model: plain records that print, and turn into JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


def format_error(error: float | None) -> str:
    """A relative error in percent: ``0.0123`` -> ``1.23 %``; nothing where it is not known."""
    return "" if error is None else f"{error * 100:.3g} %"


@dataclass
class ShapeTime:
    """One layer (or the whole model) at one real input; times are median seconds per call.

    `ratio` is before / after from alternated samples (above 1: the replacement is faster), with its 95 %
    confidence interval. It is measured pairwise, so it differs a little from `before_s / after_s`.
    """

    shape: tuple[int, ...]  # of the first tensor argument
    dtype: str
    stride: tuple[int, ...]
    before_s: float
    after_s: float
    ratio: float
    ratio_low: float
    ratio_high: float

    @property
    def shape_text(self) -> str:
        """``64x1152``."""
        return "x".join(map(str, self.shape))

    def __str__(self) -> str:
        return (
            f"{self.shape_text}: {1e6 * self.before_s:.1f} -> {1e6 * self.after_s:.1f} us ({self.ratio:.2f}x)"
        )


@dataclass
class LayerRecord:
    """One entry of the plan. A layer that was kept has `new_class`, `error` and `times` of what it beat."""

    name: str
    old_class: str
    new_class: str
    kernel: str  # what runs in the model now
    replaced: bool
    reason: str  # why it was kept, or why it was replaced
    parameters: int  # of the layer that was there before
    bytes_before: int  # parameters and buffers, in memory
    bytes_after: int  # of what is in the model now
    error: float | None = None  # relative L2 error of the candidate's output on the example inputs
    times: list[ShapeTime] = field(default_factory=list)  # empty without the gate

    @property
    def worst_ratio(self) -> float:
        """The smallest speed-up over the measured shapes; infinite where nothing was measured."""
        return min((t.ratio for t in self.times), default=float("inf"))


@dataclass
class ConvertReport:
    """Pass an empty one to `convert(..., report=report)`; it is filled when the conversion succeeds.

    `layers` has one record per entry of the plan, in the plan's order. `model` has the end-to-end times, one
    per example input, of the model as it was against the model as it is returned (empty without the gate).
    """

    layers: list[LayerRecord] = field(default_factory=list)
    model: list[ShapeTime] = field(default_factory=list)
    model_error: float | None = None  # relative L2 error of the model's output over the example inputs
    uncompared: str = ""  # why there is none, with example inputs
    model_parameters: int = 0  # of the whole model before the conversion
    gated: bool = False
    device: str = "cpu"
    threads: int = 0
    torch_version: str = ""

    @property
    def replaced(self) -> list[LayerRecord]:
        return [layer for layer in self.layers if layer.replaced]

    @property
    def kept(self) -> list[LayerRecord]:
        return [layer for layer in self.layers if not layer.replaced]

    @property
    def converted_share(self) -> float:
        """The share of the model's parameters (counted before) that now live in replaced layers."""
        return sum(layer.parameters for layer in self.replaced) / max(1, self.model_parameters)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-able values, the derived shares included."""
        data = asdict(self)
        for layer, record in zip(data["layers"], self.layers, strict=True):
            layer["worst_ratio"] = record.worst_ratio if record.times else None
        return data | {"converted_share": self.converted_share}

    def __str__(self) -> str:
        rows = [("layer", "was", "runs", "bytes", "error", "why")]
        for layer in self.layers:
            runs = f"{layer.new_class} [{layer.kernel}]" if layer.replaced else f"{layer.old_class} (kept)"
            sizes = f"{layer.bytes_before} -> {layer.bytes_after}"
            rows.append((layer.name, layer.old_class, runs, sizes, format_error(layer.error), layer.reason))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [
            "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[5]]) for row in rows
        ]
        lines += [f"model at {time}" for time in self.model]
        if self.model_error is not None:
            lines.append(f"model error {format_error(self.model_error)}")
        lines += [f"model error unknown: {self.uncompared}"] if self.uncompared else []
        share = (
            f"{len(self.replaced)} of {len(self.layers)} layers replaced, {100 * self.converted_share:.1f} %"
        )
        return "\n".join([*lines, f"{share} of the parameters"])
