"""The table of parts against what is made, and the rules of an entry."""

import itertools
from dataclasses import fields, replace

import pytest
import torch

from meswitch_cli.delta.codes import CODES
from meswitch_cli.delta.quantize import quantize
from meswitch_cli.delta.settings import QuantizerSettings
from meswitch_cli.delta.stored import PARTS, StoredDelta, expected_entry

OUT, IN = 24, 100


def test_the_table_and_the_noun_have_the_same_parts() -> None:
    names = [field.name for field in fields(StoredDelta)]
    told = ["bits", "trellis", "in_features", "out_features", "group_size", "factor_bits"]
    assert names == [*told, *(part.name for part in PARTS)]
    assert StoredDelta().tensors == {}


@pytest.mark.parametrize(
    ("bits", "salient", "group_size", "scale", "rank", "added"),
    itertools.product(CODES, (0, 3), (0, 32, 128), ("none", "rms"), (0, 2, 30), (0, 5)),
)
def test_what_quantize_makes_is_what_the_table_expects(
    bits: int, salient: int, group_size: int, scale: str, rank: int, added: int
) -> None:
    settings = QuantizerSettings(bits, salient, group_size, scale, rank=rank)  # type: ignore[arg-type]
    delta = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0))
    result = quantize(torch.zeros_like(delta), delta, settings)
    assert result is not None
    stored = replace(result[0], added_rows=torch.zeros(added, IN, dtype=torch.bfloat16) if added else None)
    entry = expected_entry(settings, (OUT + added, IN), (OUT, IN))
    found = replace(entry, **stored.stored_as)
    assert replace(found, nbytes=0) == entry
    assert found.nbytes == stored.nbytes == entry.expected_nbytes(2)
    assert {part.name: part.shape(entry) for part in entry.parts} == {
        name: tuple(tensor.shape) for name, tensor in stored.tensors.items()
    }
    for part in entry.parts:
        tensor = stored.tensors[part.name]
        assert tensor.dtype in part.dtypes and tensor.nbytes == part.nbytes(entry, 2)
    again = StoredDelta.of(found, stored.tensors)
    assert again.tensors == stored.tensors and again.in_features == IN
    assert entry.problem() is None and entry.version == (2 if rank else 1)


def test_parts_of_a_parameter_that_is_stored_whole() -> None:
    stored = StoredDelta(value=torch.ones(7, dtype=torch.float16))
    entry = replace(expected_entry(QuantizerSettings(), (7, 1)), kind="dense", shape=(7,), base_shape=(7,), bits=0)
    entry = replace(entry, salient=0, rank=0, **{"group_size": 0})
    assert [part.name for part in entry.parts] == ["value"] and entry.expected_nbytes(2) == stored.nbytes == 14
    assert stored.named("a.bias").keys() == {"a.bias.value"}
    with pytest.raises(ValueError, match="without codes"):
        stored.multiples()


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("salient_index", torch.tensor([5, 2], dtype=torch.int32), "not ascending and below 100"),
        ("salient_index", torch.tensor([5, 100], dtype=torch.int32), "not ascending and below 100"),
        ("salient_index", torch.tensor([-1, 5], dtype=torch.int32), "not ascending"),
        ("salient_value", torch.full((OUT, 2), float("inf")).half(), "not finite"),
        ("steps", torch.full((OUT, 1), float("nan")), "not finite"),
        ("added_rows", torch.full((1, IN), float("-inf")).bfloat16(), "not finite"),
    ],
)
def test_values_that_cannot_be_are_refused(part: str, value: torch.Tensor, message: str) -> None:
    delta = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0))
    settings = QuantizerSettings(2, 2)
    result = quantize(torch.zeros_like(delta), delta, settings)
    assert result is not None
    with pytest.raises(ValueError, match=message):
        StoredDelta.of(expected_entry(settings, (OUT + 1, IN), (OUT, IN)), result[0].tensors | {part: value})
