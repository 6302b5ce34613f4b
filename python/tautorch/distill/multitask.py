"""Several heads and several teachers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tautorch._batches import own_copy
from tautorch.distill.adaptive import LogVariances
from tautorch.distill.arguments import at_least_single, one_logits, positive
from tautorch.distill.features import attached_all
from tautorch.distill.losses import Loss


class MultiTask(nn.Module):
    """L = sum over heads h of weight_h * loss_h(student_out[h], teacher_out[h], target[h]).

    `MultiTask({"class": SoftTarget(), "boxes": Regression()}, weights={"boxes": 0.5})`.

    Args:
        losses: by head: a dict for models that give dicts (or dataclass-like outputs that index by name), a
            list or tuple for models that give tuples.
        weights: by head, > 0, 1 where left out; or "uncertainty", learned (see `LogVariances`: the
            parameters must be in the optimizer).

    The student's output must have every head; the teacher's may be one mapping or tuple alike (see `Teachers`
    for one teacher per head), or None where no loss uses it; `target` is alike, or None. A head that target
    or teacher lack gets None there.
    """

    def __init__(
        self,
        losses: Mapping[str, Loss] | Sequence[Loss],
        weights: Mapping[Any, float] | Sequence[float] | Literal["uncertainty"] | None = None,
    ) -> None:
        super().__init__()
        named = _by_head(losses, "losses")
        if not named or not all(callable(loss) for loss in named.values()):
            raise ValueError(f"MultiTask: losses must be one callable or more by head, got {losses!r}")
        self.losses: dict[Any, Any] = named
        # Parameters and state of the losses; a key may be what a ModuleDict refuses ("a.b", 0).
        self.loss_modules = nn.ModuleList(m for m in named.values() if isinstance(m, nn.Module))
        self.learned = LogVariances(len(named)) if weights == "uncertainty" else None
        self.weights = dict.fromkeys(named, 1.0)
        if weights is not None and not isinstance(weights, str):
            given = _by_head(weights, "weights")
            if unknown := [head for head in given if head not in named]:
                raise ValueError(f"MultiTask: weights must be of {list(named)}, got {unknown}")
            for head, weight in given.items():
                self.weights[head] = positive("MultiTask", f"weights[{head!r}]", weight)
        elif weights not in (None, "uncertainty"):
            raise ValueError(f'MultiTask: weights must be numbers by head or "uncertainty", got {weights!r}')

    @contextmanager
    def attached(self, teacher: nn.Module | None, student: nn.Module) -> Iterator[None]:
        """Attach the losses that look into the models."""
        with attached_all(self.losses.values(), teacher, student):
            yield

    def forward(self, student_out: Any, teacher_out: Any, target: Any) -> Tensor:
        """The weighted loss of one batch, a scalar."""
        terms = [
            loss(
                _head(student_out, head, "student"), _head(teacher_out, head, None), _head(target, head, None)
            )
            for head, loss in self.losses.items()
        ]
        self.components = {str(head): term.detach() for head, term in zip(self.losses, terms, strict=True)}
        if self.learned is not None:
            found: Tensor = self.learned(terms)
            return found
        return torch.stack([w * term for w, term in zip(self.weights.values(), terms, strict=True)]).sum()


def _by_head(value: Any, what: str) -> dict[Any, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return dict(enumerate(value))
    raise TypeError(f"MultiTask: {what} must be a dict or a list by head, got {type(value).__name__}")


def _head(value: Any, head: Any, required: str | None) -> Any:
    if isinstance(value, (Tensor, str)) or (value is None and required is not None):
        raise TypeError(
            f"MultiTask: outputs and target must be dicts or tuples by head, got {type(value).__name__}"
        )
    if value is None:
        return None
    try:
        return value[head]
    except (KeyError, IndexError, TypeError):
        if required is None and isinstance(value, Mapping):
            return None
        has = list(value) if isinstance(value, Mapping) else f"{len(value)} items"
        raise ValueError(
            f"MultiTask: the {required or 'teacher or target'} must have the head {head!r}, got {has}"
        ) from None


class Teachers(nn.Module):
    """One teacher per head in one module: the same inputs to each, {head: its output} back.

    Args:
        teachers: by head; all in eval mode.
        output: what to take of each teacher's output, e.g. `lambda out: out.logits`.
    """

    def __init__(
        self, teachers: Mapping[str, nn.Module], *, output: Callable[[Any], Any] | None = None
    ) -> None:
        super().__init__()
        if not isinstance(teachers, Mapping) or not teachers:
            raise ValueError(f"Teachers: teachers must be a dict of one or more by head, got {teachers!r}")
        self.heads = list(teachers)
        self.teachers = _frozen("Teachers", teachers.values())
        self.output = output
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """{head: output}."""
        outputs = (_on_copies(teacher, args, kwargs) for teacher in self.teachers)
        found = outputs if self.output is None else map(self.output, outputs)
        return dict(zip(self.heads, found, strict=True))


class Ensemble(nn.Module):
    """Several teachers of one task as one: logits z with softmax(z / T) = the mean of their softened outputs.

    softmax(z / T) = sum over k of w_k softmax(z_k / T), so that `SoftTarget(temperature=T)` distils the mean
    of the probabilities at T, as in Hinton et al. 2015, arXiv:1503.02531. At another temperature the loss
    softens that mean, which is not the mean of the softened.

    Args:
        teachers: two or more, all in eval mode (ValueError otherwise), that give logits of one shape.
        temperature: T > 0; the loss's.
        weights: w_k > 0, scaled to sum to 1; None for equal ones.
        output: what to take of each teacher's output, e.g. `lambda out: out.logits`.
    """

    def __init__(
        self,
        teachers: Iterable[nn.Module],
        *,
        temperature: float = 1.0,
        weights: Sequence[float] | None = None,
        output: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__()
        self.teachers = _frozen("Ensemble", teachers)
        if len(self.teachers) < 2:
            raise ValueError(f"Ensemble: teachers must be two or more, got {len(self.teachers)}")
        self.temperature = positive("Ensemble", "temperature", temperature)
        given = [1.0] * len(self.teachers) if weights is None else list(weights)
        if len(given) != len(self.teachers):
            raise ValueError(
                f"Ensemble: weights must be one for each of {len(self.teachers)} teachers, got {len(given)}"
            )
        given = [positive("Ensemble", "weights", weight) for weight in given]
        self.log_weights = [math.log(weight / sum(given)) for weight in given]
        self.output = output
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Logits [..., C] of the mean, in at least float32."""
        terms: list[Tensor] = []
        for teacher, log_weight in zip(self.teachers, self.log_weights, strict=True):
            out = _on_copies(teacher, args, kwargs)
            out = out if self.output is None else self.output(out)
            one_logits("Ensemble", "teacher", out)
            if terms and out.shape != terms[0].shape:
                raise ValueError(
                    f"Ensemble: teachers must give logits of one shape, got {list(terms[0].shape)} and "
                    f"{list(out.shape)}"
                )
            terms.append(F.log_softmax(at_least_single(out) / self.temperature, -1) + log_weight)
        return torch.logsumexp(torch.stack(terms), 0) * self.temperature


def _on_copies(teacher: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What it gives on inputs of its own, which it may change in place before the next teacher's turn."""
    args, kwargs = own_copy((args, kwargs))
    return teacher(*args, **kwargs)


def _frozen(op: str, teachers: Iterable[Any]) -> nn.ModuleList:
    models = list(teachers)
    for model in models:
        if not isinstance(model, nn.Module):
            raise TypeError(f"{op}: teachers must be nn.Modules, got {type(model).__name__}")
        if any(module.training for module in model.modules()):
            raise ValueError(f"{op}: teachers must be in eval mode, got one in training mode; call eval()")
    return nn.ModuleList(models)
