"""How good a candidate is on one sample: SAM's masks, or whatever a caller's function says."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from vfmk import ops
from vfmk.channels.decoder import CandidateDecoder, Prompted

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

    from vfmk.data.sample import Sample

CPU_BYTES = 8 << 20  # for a chunk of candidates: they stay in the last-level cache
CUDA_BYTES, CUDA_SHARE = 8 << 30, 0.5  # at most; and of the memory that is free
SHARPNESS = 4.0  # of the sigmoid that stands for the mask's threshold in its gradient


class Scorer(Protocol):
    """Scores candidates. overwritten, read: int64 [K, P], as CandidateDecoder.logits has them.

    Attributes:
        copies: of a sample's features, what is held at once for a candidate.
        is_known: whether its scores follow from a digest of its model.
    """

    copies: int
    is_known: bool

    def encode(self, sample: Any) -> Tensor:
        """A sample's features: [1, C, h, w], [1, N, C] or [1, C]."""

    def prepare(self, sample: Any, features: Tensor) -> Any:
        """What does not depend on the candidate."""

    def scores(self, prepared: Any, overwritten: Tensor, read: Tensor) -> Tensor:
        """[K], any float dtype."""

    def gain_estimates(self, prepared: Any) -> Tensor:
        """To first order, what every pair adds to the score: [C, C], overwritten by read."""


class _Image(NamedTuple):
    prompted: Prompted
    embedding: Tensor  # [C, h, w]
    sparse: Tensor
    dense: Tensor
    target: Tensor  # bool [H0, W0]
    soft_target: Tensor  # [4h, 4w], the share of a cell that the mask covers
    input_size: tuple[int, int]


class SamScorer:
    """The IoU of SAM's single mask for a sample's points, at the image's own size."""

    copies = 8
    is_known = True

    def __init__(self, sam: "Sam") -> None:
        self.sam = sam
        self.decoder = CandidateDecoder(sam)

    @torch.no_grad()
    def encode(self, sample: "Sample") -> Tensor:
        from vfmk.data.records import to_record

        image = to_record(self.sam, sample)["image"]
        return self.sam.image_encoder(self.sam.preprocess(image)[None])

    @torch.no_grad()
    def prepare(self, sample: "Sample", features: Tensor) -> _Image:
        from segment_anything.utils.transforms import ResizeLongestSide

        from vfmk.data.records import to_points, to_target

        sam, embedding = self.sam, features[0]
        input_size = ResizeLongestSide.get_preprocess_shape(
            *sample.mask.shape, sam.image_encoder.img_size
        )
        points = to_points(sam, sample)
        sparse, dense = sam.prompt_encoder(points, boxes=None, masks=None)
        side = 4 * embedding.shape[-1]
        return _Image(
            self.decoder.prepare(embedding, sparse, dense),
            embedding,
            sparse,
            dense,
            torch.tensor(sample.mask, device=embedding.device),
            to_target(sam, sample, input_size, (side, side)),
            input_size,
        )

    @torch.no_grad()
    def scores(self, prepared: _Image, overwritten: Tensor, read: Tensor) -> Tensor:
        logits = self.decoder.logits(prepared.prompted, overwritten, read)
        height, width = prepared.target.shape
        return ops.mask_iou(
            logits,
            prepared.target,
            prepared.input_size,
            (height, width),
            self.sam.image_encoder.img_size,
            threshold=self.sam.mask_threshold,
        )

    @torch.enable_grad()
    def gain_estimates(self, prepared: _Image) -> Tensor:
        embedding = prepared.embedding.clone().requires_grad_()
        logits, _ = self.sam.mask_decoder(
            image_embeddings=embedding[None],
            image_pe=self.sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=prepared.sparse,
            dense_prompt_embeddings=prepared.dense,
            multimask_output=False,
        )
        mask = torch.sigmoid(SHARPNESS * (logits[0, 0] - self.sam.mask_threshold))
        both = (mask * prepared.soft_target).sum()
        soft_iou = both / (mask.sum() + prepared.soft_target.sum() - both)
        (gradient,) = torch.autograd.grad(soft_iou, embedding)
        return _first_order_gains(gradient, prepared.embedding, 0)


class FeatureScorer:
    """A caller's score of an encoder's features: `score_fn(features, sample)`.

    Features are [1, C, h, w], or end in the channels: [1, N, C], [1, C].
    """

    copies = 2
    is_known = False

    def __init__(
        self, encoder: Callable[[Tensor], Tensor], score_fn: Callable[[Tensor, Any], Tensor]
    ) -> None:
        self.encoder = encoder
        self.score_fn = score_fn

    @torch.no_grad()
    def encode(self, sample: Any) -> Tensor:
        image = sample.image[None].to(_device_of(self.encoder, sample.image))
        features = self.encoder(image)
        is_right = isinstance(features, Tensor) and features.dim() in (2, 3, 4)
        if not is_right or len(features) != 1 or not features.numel():
            raise TypeError(
                "search: model must give features [1, C, h, w], [1, N, C] or [1, C], gave a"
                f" {type(features).__name__} {list(getattr(features, 'shape', ()))}"
            )
        return features

    def prepare(self, sample: Any, features: Tensor) -> tuple[Tensor, Any]:
        return features, sample

    @torch.no_grad()
    def scores(self, prepared: tuple[Tensor, Any], overwritten: Tensor, read: Tensor) -> Tensor:
        features, sample = prepared
        channels = features.shape[channel_dim(features)]
        index = torch.arange(channels, device=read.device).repeat(len(read), 1)
        index.scatter_add_(1, overwritten, read - overwritten)  # equal channels add nothing
        repeated = features.expand(len(read), *features.shape[1:])
        candidates = ops.channel_remap(repeated, index, dim=channel_dim(features))
        scores = self.score_fn(candidates, sample)
        if not isinstance(scores, Tensor) or scores.shape != (len(read),):
            raise ValueError(
                f"search: score_fn must give a tensor, a float for each of {len(read)}"
                f" candidates, gave a {type(scores).__name__} {list(getattr(scores, 'shape', ()))}"
            )
        return scores

    @torch.enable_grad()
    def gain_estimates(self, prepared: tuple[Tensor, Any]) -> Tensor:
        features, sample = prepared
        features = features.detach().clone().requires_grad_()
        score = self.score_fn(features, sample)
        gradient = None
        if score.requires_grad:
            (gradient,) = torch.autograd.grad(score.sum(), features, allow_unused=True)
        if gradient is None:
            raise ValueError('search: strategy="screened" needs a score_fn with a gradient')
        return _first_order_gains(gradient, features, channel_dim(features))


def _first_order_gains(gradient: Tensor, features: Tensor, dim: int) -> Tensor:
    """⟨gradient of channel i, channel j − channel i⟩ for every pair: [C, C]."""
    gradient, features = (t.movedim(dim, 0).flatten(1) for t in (gradient, features))
    return gradient @ features.T - (gradient * features).sum(1, keepdim=True)


def chunk_size(features: Tensor, copies: int) -> int:
    """How many candidates to score at once, from the features of one and `Scorer.copies`."""
    budget = CPU_BYTES
    if features.is_cuda:
        free, _ = torch.cuda.mem_get_info(features.device)
        cached = torch.cuda.memory_reserved(features.device)
        free += cached - torch.cuda.memory_allocated(features.device)
        budget = min(CUDA_BYTES, int(CUDA_SHARE * free))
    return max(1, budget // (copies * features.nbytes))


def channel_dim(features: Tensor) -> int:
    return 1 if features.dim() == 4 else features.dim() - 1


def _device_of(encoder: Any, image: Tensor) -> torch.device:
    """The encoder's, or the image's for one without parameters."""
    parameters = encoder.parameters() if isinstance(encoder, nn.Module) else iter(())
    return next((parameter.device for parameter in parameters), image.device)
