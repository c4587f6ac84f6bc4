"""What the scripts find is there: a wait and a mixed device on a GPU that is not there, a gap of the matrix."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))

import check_device
import fake_gpu
import matrix


def test_a_torch_without_cuda_checks_nothing_and_says_so(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    monkeypatch.setattr(sys, "argv", ["check_device.py"])
    with pytest.raises(SystemExit, match="Nothing was checked: .* built without CUDA"):
        check_device.main()


@pytest.mark.skipif(fake_gpu.lacks() is not None, reason="needs a torch that is built with CUDA")
def test_waits_and_mixed_devices_are_found_without_a_gpu():
    gpu = fake_gpu.FakeGpu()
    with gpu.present():
        values = torch.arange(4.0).to(fake_gpu.GPU, non_blocking=True)
        assert not gpu.waits
        assert (values.sum().item(), values[values > 1].shape, values.cpu().tolist()) == (
            6.0,
            (2,),
            [0.0, 1.0, 2.0, 3.0],
        )
        with pytest.raises(Exception, match="cuda.*cpu|cpu.*cuda"):
            values + torch.ones(4)
    assert [what for what, *_ in gpu.waits] == ["reads a number", "asks where values are true", "copies to the host"]


def test_the_matrix_tells_what_works_from_what_does_not(tmp_path):
    found = {family: matrix.of_family(family, ["vit"], tmp_path) for family in ("llama", "opt")}
    page = matrix.page_of(found, ["vit"])
    assert "| llama | yes | yes | yes | yes | yes | yes | 1 of 1 |" in page
    assert "| opt | no [1] |  |  |  |  |  |  |" in page and "1. ValueError: opt takes" in page
    found["llama"]["merge"]["bfloat16"] = "off by 2"
    assert "| llama | yes | yes | not bfloat16 [1] |" in matrix.page_of(found, ["vit"])
