"""Which layer's pruning costs the model most."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tautorch._batches import Batches, left_as_it_is
from tautorch.prune._tables import table, text
from tautorch.prune.choice import Rule, choose
from tautorch.prune.importance import Importance, LossOf
from tautorch.prune.patterns import Ranking, check_sparsity, parse_pattern

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer: its weights, and the model's score with this layer alone pruned, by sparsity."""

    name: str
    weights: int
    scores: dict[float, float]


@dataclass(frozen=True)
class Sensitivity:
    """The layers, the dearest at the highest sparsity first; `str()` is a table of the score's drops."""

    pattern: str
    score: float
    layers: tuple[LayerSensitivity, ...]

    def suggest(self, max_drop: float) -> dict[str, float]:
        """The highest sparsity of each layer that, pruned alone, drops the score by at most `max_drop`.

        0 where even the lowest one scanned costs more. Drops of several layers add up, more or less.
        """
        return {
            layer.name: max(
                [0.0, *(s for s, score in layer.scores.items() if self.score - score <= max_drop)]
            )
            for layer in self.layers
        }

    def __rich__(self) -> Table:
        sparsities = list(self.layers[0].scores)
        rows = [
            (
                layer.name,
                f"{layer.weights:,}",
                *(f"{self.score - layer.scores[sparsity]:+.4g}" for sparsity in sparsities),
            )
            for layer in self.layers
        ]
        title = f"Score lost by pruning one layer to {self.pattern} (whole model: {self.score:.6g})"
        return table(title, ("layer", "weights", *(f"{s:.0%}" for s in sparsities)), rows, ())

    def __str__(self) -> str:
        return text(self.__rich__())


def sensitivity(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    pattern: str = "unstructured",
    sparsities: Sequence[float] | None = None,
    *,
    importance: Importance = "magnitude",
    layers: Iterable[str] | None = None,
    calibration: Batches | None = None,
    ranking: Ranking | None = None,
    loss: LossOf | None = None,
) -> Sensitivity:
    """Prune one layer at a time, to each sparsity, and measure what that does (Han et al. 2015, section 4).

    Args:
        model: as it was afterwards, bit for bit, but for what its own forward writes into buffers of over
            64 MB or into lists.
        evaluate: (model in eval mode) -> its score, higher is better; called once for each layer and sparsity
            and once for the whole model, without gradients.
        sparsities: in (0, 1); by default 50, 70, 80 and 90 %, for an n:m pattern its own.
        pattern, importance, layers, calibration, ranking, loss: as in `prune`, but for ranking="global".
            `calibration` is run once for each sparsity: no spent generator.

    Raises ValueError/TypeError as `prune` does, and for a whole model's score that is not finite.
    """
    op = "sensitivity"
    form = parse_pattern(op, pattern)
    fixed = (1 - form.keep / form.of,) if form.of else (0.5, 0.7, 0.8, 0.9)
    shares = [check_sparsity(op, s) for s in (fixed if sparsities is None else sparsities)]
    if not shares or min(shares) == 0:
        raise ValueError(f"{op}: sparsities must be one or more numbers in (0, 1), got {sparsities}")
    if ranking == "global":
        raise ValueError(f'{op}: ranking must be "local" or "row" for one layer at a time, got "global"')
    if not callable(evaluate):
        raise TypeError(f"{op}: evaluate must be a callable, got {type(evaluate).__name__}")
    named = None if layers is None else ([layers] if isinstance(layers, str) else list(layers))
    held = calibration if calibration is None or isinstance(calibration, Sequence) else list(calibration)
    options: dict[str, Any] = {
        "importance": importance,
        "pattern": pattern,
        "layers": named,
        "calibration": held,
        "ranking": ranking,
        "loss": loss,
    }
    choices = {share: choose(Rule(op, sparsity=share, **options), model) for share in shares}
    with left_as_it_is(model):
        whole = _score(op, evaluate, model)
        if not torch.isfinite(torch.tensor(whole)):
            raise ValueError(f"{op}: evaluate must give a finite score of the whole model, got {whole}")
        found = []
        for name in choices[shares[0]].masks:
            layer = model.get_submodule(name)
            weight: Any = layer.weight
            scores = {}
            for share, choice in choices.items():
                before = weight.detach().clone()
                try:
                    weight.copy_(choice.weights.get(name, weight))
                    weight.masked_fill_(~choice.masks[name], 0.0)
                    scores[share] = _score(op, evaluate, model)
                finally:
                    weight.copy_(before)
            found.append(LayerSensitivity(name, weight.numel(), scores))
    # NaN is the worst of all.
    found.sort(key=lambda row: (row.scores[max(shares)] == row.scores[max(shares)], row.scores[max(shares)]))
    return Sensitivity(pattern, whole, tuple(found))


def _score(op: str, evaluate: Callable[[nn.Module], float], model: nn.Module) -> float:
    value: object = evaluate(model)
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise TypeError(f"{op}: evaluate must return a number, got {type(value).__name__}") from error
