"""The state of re-basing as one value of a parameter group: whole, exact, and never pickled."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
import training
from safetensors.torch import load, save
from torch import Tensor

import scalora
from scalora.resuming.encoding import flattened, packed, sealed, unpacked

INPUTS = models.vectors(16, 12)
STOP = 5
KINDS: dict[str, dict[str, Any]] = {
    "calibrating": {"interval": 3},
    "carry": {"interval": 3, "accumulator": "carry"},
    "exact": {"rule": "exact"},
    "compensated": {"rule": "exact", "rounding": "compensated"},
}
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone: the state then travels in a parameter group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make(kind: str = "calibrating") -> tuple[Any, scalora.ScaLoRA]:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if kind == "compensated" else torch.float32
    model = models.with_lora(models.Perceptron().to(dtype), target_modules=["first", "second"])
    return model, training.optimizer_of(model, **{"rule": "auto", **KINDS[kind]})


def train(model: Any, optimizer: scalora.ScaLoRA, steps: int) -> list[float]:
    dtype = model.get_base_model().first.base_layer.weight.dtype
    return models.train(model, optimizer, INPUTS.to(dtype), steps)


def plain(value: Any) -> Any:
    """With tensors that compare by dtype, shape and bits."""
    if isinstance(value, Tensor):
        flat = value.detach().reshape(-1).contiguous().view(torch.uint8)
        return value.dtype, tuple(value.shape), bytes(flat.tolist())
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def everything(optimizer: scalora.ScaLoRA) -> Any:
    return plain([optimizer.inner.state_dict(), optimizer.rebasing_state()])


@kinds
def test_state_in_a_parameter_group_continues_to_the_same_bits(kind: str, group: None) -> None:
    model, optimizer = make(kind)
    train(model, optimizer, STOP)
    state, weights = copy.deepcopy(optimizer.state_dict()), models.bits(model)
    expected = train(model, optimizer, STOP)
    assert isinstance(state["param_groups"][0]["scalora"], bytes)

    model, optimizer = make(kind)
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    assert train(model, optimizer, STOP) == expected


@kinds
@pytest.mark.parametrize("steps", [0, STOP])
def test_packing_loses_nothing(kind: str, steps: int) -> None:
    model, optimizer = make(kind)
    train(model, optimizer, steps)
    state = optimizer.rebasing_state()
    found, inner = unpacked({"state": {}, "param_groups": [{"lr": 1.0, "scalora": packed(state)}]})
    assert plain(found) == plain(state)
    assert inner == {"state": {}, "param_groups": [{"lr": 1.0}]}


VALUES = {
    "none": None,
    "0-d": torch.tensor(0.1),
    "float64": torch.tensor([0.1, torch.nan, -torch.inf], dtype=torch.float64),
    "float16": torch.tensor([[0.1], [65504.0]], dtype=torch.float16),
    "bfloat16": torch.tensor([[0.1, -0.0]], dtype=torch.bfloat16),
    "float8": torch.tensor([0.1, 448.0]).to(torch.float8_e4m3fn),
    "int64": torch.tensor(2**62 + 1),
    "bool": torch.tensor([True, False]),
    "no columns": torch.zeros(7, 0),
    "transposed": torch.arange(6.0).view(2, 3).T,
    "one number, expanded": torch.ones(()).expand(3),
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES.keys())
def test_tensor_of_any_kind_survives_packing(value: Tensor | None) -> None:
    state = make()[1].rebasing_state()
    state["layers"]["first"] |= {"measured": value, "residual": None}
    state["step_length"]["last"] = copy.deepcopy(value)
    [found, _] = unpacked({"state": {}, "param_groups": [{"scalora": packed(state)}]})
    assert plain(found) == plain(state)


def repacked(held: bytes, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> bytes:
    """Changed, with a checksum that is right."""
    own, _ = unpacked({"state": {}, "param_groups": [{"scalora": held}]})
    assert own is not None
    tensors, values = flattened(own)
    change(tensors, values)
    return save(*sealed(tensors, values))


def pickled(held: bytes) -> bytes:
    own, _ = unpacked({"state": {}, "param_groups": [{"scalora": held}]})
    buffer = io.BytesIO()
    torch.save(own, buffer)
    return buffer.getvalue()


def metadata_of(held: bytes) -> dict[str, str]:
    return json.loads(held[8 : 8 + int.from_bytes(held[:8], "little")])["__metadata__"]


def other_dtypes(held: bytes) -> bytes:
    """The same bytes, taken for other numbers."""
    tensors = {
        name: tensor.view(torch.int32) if tensor.dtype == torch.float32 else tensor
        for name, tensor in load(held).items()
    }
    return save(tensors, metadata_of(held))


def one_step_more(held: bytes) -> bytes:
    """What one who does not know of the checksum may do."""
    header = metadata_of(held)
    values = json.loads(header["scalora"])
    values["steps"] += 1
    return save(load(held), {**header, "scalora": json.dumps(values)})


DAMAGES: dict[str, tuple[Callable[[bytes], Any], str]] = {
    "cut in half": (lambda held: held[: len(held) // 2], "cannot be read"),
    "last byte missing": (lambda held: held[:-1], "cannot be read"),
    "a byte too many": (lambda held: held + b"\0", "cannot be read"),
    "empty": (lambda held: b"", "cannot be read"),
    "pickled, as it once was": (pickled, "cannot be read.*another version"),
    "no bytes": (lambda held: "text", "cannot be read"),
    "another file of tensors": (
        lambda held: save({"weight": torch.zeros(2)}),
        "not written by this package",
    ),
    "another step count": (one_step_more, "damaged"),
    "other dtypes": (other_dtypes, "damaged"),
    "another version": (
        lambda held: repacked(held, lambda _, values: values.update(version=99)),
        "another version",
    ),
    "no step count": (
        lambda held: repacked(held, lambda _, values: values.pop("steps")),
        "damaged.*'steps'",
    ),
    "another seed": (
        lambda held: repacked(held, lambda _, values: values.update(seed=7)),
        "seed=7",
    ),
}


@pytest.mark.parametrize("damage, match", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_value_is_refused_and_nothing_is_changed(
    damage: Callable[[bytes], Any], match: str, group: None
) -> None:
    model, optimizer = make("carry")
    train(model, optimizer, STOP)
    state = optimizer.state_dict()
    state["param_groups"][0]["scalora"] = damage(state["param_groups"][0]["scalora"])

    model, optimizer = make("carry")
    train(model, optimizer, 2)
    weights, before = models.bits(model), everything(optimizer)
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(state)
    models.assert_same_bits(model, weights)
    assert everything(optimizer) == before


def test_a_bit_that_flips_anywhere_is_noticed() -> None:
    model, optimizer = make("exact")
    train(model, optimizer, STOP)
    held = packed(optimizer.rebasing_state())
    for place in range(len(held)):
        flipped = bytearray(held)
        flipped[place] ^= 1 << place % 8
        with pytest.raises(ValueError, match=r"damaged|not written by|another version"):
            unpacked({"state": {}, "param_groups": [{"scalora": bytes(flipped)}]})
