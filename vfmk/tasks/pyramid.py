"""Feature maps of several resolutions from the one that a plain vision transformer gives."""

from torch import Tensor, nn

NORM_GROUPS = 32


class SimpleFeaturePyramid(nn.Module):
    """Maps at 4, 2, 1 and 1/2 times the resolution (Li et al., 2022, "Exploring Plain Vision
    Transformer Backbones for Object Detection"), each from the input alone: by deconvolution or
    max-pooling, then 1×1 and 3×3 convolutions.

    Args:
        channels: C of the input and of every map; a multiple of 32.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            nn.Sequential(*resize, _convolution(channels, 1), _convolution(channels, 3))
            for resize in (
                (_deconvolution(channels), nn.GELU(), _deconvolution(channels)),
                (_deconvolution(channels),),
                (),
                (nn.MaxPool2d(2),),
            )
        )

    def forward(self, embedding: Tensor) -> list[Tensor]:
        """[B, C, H, W] → [B, C, sH, sW] for s = 4, 2, 1, 1/2."""
        return [level(embedding) for level in self.levels]


def normalisation(channels: int) -> nn.Module:
    return nn.GroupNorm(NORM_GROUPS, channels)


def _convolution(channels: int, size: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, channels, size, padding=size // 2, bias=False), normalisation(channels)
    )


def _deconvolution(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(channels, channels, 2, stride=2, bias=False), normalisation(channels)
    )
