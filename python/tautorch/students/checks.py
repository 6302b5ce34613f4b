"""What every student must be: a model that runs as its teacher does, and that can be trained."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tautorch._batches import Batch, call_model, left_as_it_is, model_device, opened, to_device


def trainable(student: nn.Module) -> nn.Module:
    """The student of a wholly frozen teacher is thawed; what a teacher froze in part stays so."""
    if not any(p.requires_grad for p in student.parameters()):
        for parameter in student.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
    return student


def run(op: str, model: nn.Module, example_input: Batch) -> Any:
    """The model's output in eval mode and without gradients; modes and buffers are put back."""
    with left_as_it_is(model):
        return call_model(op, model, to_device(example_input, model_device(model)))


def check_same_outputs(op: str, teacher: nn.Module, student: nn.Module, example_input: Batch) -> None:
    """ValueError unless the student runs and returns tensors of the teacher's shapes and dtypes."""
    wanted, form = pytree.tree_flatten(opened(run(op, teacher, example_input)))
    try:
        got, got_form = pytree.tree_flatten(opened(run(op, student, example_input)))
    except Exception as error:
        raise ValueError(
            f"{op}: the student must run on example_input, it fails with {type(error).__name__}: {error}; "
            "does the model's code rely on what was taken away?"
        ) from error
    shapes, got_shapes = [_shape(v) for v in wanted], [_shape(v) for v in got]
    if form != got_form or shapes != got_shapes:
        raise ValueError(f"{op}: the student must return {shapes} as its teacher does, got {got_shapes}")


def _shape(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
