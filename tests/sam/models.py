"""Small models, and records to give them."""

import torch

import vfmk

SMALL = vfmk.VFMAdapterConfig(rank=8, token_dim=16, low_dim=4, num_queries=4)


def records(count: int = 2) -> list[dict]:
    """Images of different sizes with different prompts."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(128, 96), (80, 128), (128, 128)][:count]
    batch = [
        {"image": 255 * torch.rand(3, *size, generator=generator), "original_size": (200, 150)}
        for size in sizes
    ]
    batch[0] |= {
        "point_coords": torch.tensor([[[9.0, 60.0]]] * 3),
        "point_labels": torch.ones(3, 1),
    }
    batch[1] |= {"boxes": torch.tensor([[3.0, 4.0, 50.0, 60.0]])}
    return batch


def randomise(adapted: vfmk.AdaptedSam) -> None:
    """Move the adapters away from where they start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if not parameter.requires_grad:
                continue
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
