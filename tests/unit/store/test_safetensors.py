"""Our writer of safetensors against safetensors itself."""

import tempfile

import pytest
import torch
from safetensors.torch import load, save

from lora_gpt2.store.safetensors import NAMES, iter_safetensors, pack_safetensors, read_own_safetensors

CASES = {
    "adapter": {f"h.{i}.lora_{ab}.weight": torch.randn(3, 4) for i in (10, 2, 1) for ab in "BA"},
    "kinds": {f"t{i}": torch.ones(i, 3).to(dtype) for i, dtype in enumerate(NAMES)},
    "shapes": {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "é": torch.arange(5)},
    "none": {},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_the_bytes_are_those_of_safetensors(name, metadata):
    assert pack_safetensors(CASES[name], metadata) == save(CASES[name], metadata=metadata)


@pytest.mark.parametrize("name", CASES)
def test_what_safetensors_wrote_is_read(name):
    tensors = CASES[name]
    found = read_own_safetensors_of(save(tensors, metadata={"format": "pt"}))
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) and found[key].dtype == tensors[key].dtype for key in tensors)
    assert load(pack_safetensors(tensors)).keys() == tensors.keys()


def read_own_safetensors_of(content):

    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.seek(0)
        return read_own_safetensors(file)


def test_pieces_share_the_tensors_memory():
    tensor = torch.zeros(1000)
    pieces = list(iter_safetensors({"a": tensor}))
    tensor[0] = 1
    assert bytes(pieces[1][:4]) == b"\0\0\x80\x3f"


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, save(CASES["adapter"])[:-1], (2).to_bytes(8, "little") + b"[]"])
def test_what_is_no_such_file_is_an_error_that_the_reader_of_checkpoints_expects(content):
    with pytest.raises((ValueError, KeyError, TypeError, AttributeError)):
        read_own_safetensors_of(content)
