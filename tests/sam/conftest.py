import pytest
import torch

from vfmk.sam.load import build_tiny_sam


@pytest.fixture
def sam():
    torch.manual_seed(0)
    return build_tiny_sam().eval()


@pytest.fixture
def image():
    return torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
