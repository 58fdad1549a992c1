"""SAM's mask decoder for many candidates at once: one image, one prompt, other channels.

A candidate is the image embedding X with some channels overwritten by others. Little of what the
decoder computes depends on which:

* The first self-attention of the prompt's tokens, and all that meets only X or the positional
  encoding, is the same for every candidate and computed once.
* Until pixels first attend to tokens, a candidate is X plus a matrix of rank P, the number of its
  pairs; so its scores are those of X plus a product of inner dimension P.
* T tokens meet N ≫ T pixels. So the projections of the pixels are moved to the tokens:
  q · (W k) = (Wᵀ q) · k, and Σ p (W v) = W Σ p v. No pixel is ever projected; and on the tokens two
  projections in a row, of a query and of the keys, or of the values and the output, are one.
* Of the masks only the first is wanted: the networks of the others and the IoU head do not run, and
  in the last attention its token alone asks.

A layer takes 4·heads·T·N·C multiply-adds for each candidate, where the plain decoder spends
2·N·C² on projections alone.

Rows written T·heads are ordered by token, then head.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from segment_anything.modeling import Sam
    from segment_anything.modeling.transformer import Attention

FIRST_MASK = 1  # its token; before it comes that of the predicted IoU


class Prompted(NamedTuple):
    """What one prompt on one image means to all its candidates."""

    embedding: Tensor  # X, [C, N]
    pixels: Tensor  # X and the dense prompt, [N, C]
    placed: Tensor  # the same with the positional encoding, [N, C]
    tokens: Tensor  # [T, C]
    queries: Tensor  # the tokens after the first self-attention, [T, C]
    asked: Tensor  # what the first read multiplies pixels with, [T·heads, C]
    scores: Tensor  # and what comes of it on X, [T·heads, N]


class CandidateDecoder:
    """The mask decoder of `sam`, whose weights are read here, in eval mode; call it under no_grad.

    Raises:
        TypeError: the decoder is not built as segment_anything's.
    """

    @torch.no_grad()
    def __init__(self, sam: "Sam") -> None:
        from segment_anything.modeling.mask_decoder import MaskDecoder
        from segment_anything.modeling.transformer import TwoWayTransformer

        decoder = sam.mask_decoder
        if not isinstance(decoder, MaskDecoder) or not isinstance(
            decoder.transformer, TwoWayTransformer
        ):
            raise TypeError(
                "search: the mask decoder is not segment_anything's MaskDecoder on its"
                f" TwoWayTransformer, but a {type(decoder).__name__}; give a score_fn"
            )
        self.decoder = decoder
        self.layers = list(decoder.transformer.layers)
        self.reads = [_Read(layer.cross_attn_token_to_image) for layer in self.layers]
        self.writes = [_Write(layer.cross_attn_image_to_token) for layer in self.layers]
        self.last_read = _Read(decoder.transformer.final_attn_token_to_image)
        first, _, _, second, _ = decoder.output_upscaling
        self.upscaling = _as_linear(first), _as_linear(second)
        position = sam.prompt_encoder.get_dense_pe()[0]
        self.position = position.flatten(1).T.contiguous()  # [N, C]
        height, width = position.shape[1:]
        self.mask_size, self.order = _mask_order(height, width, position.device)

    def prepare(self, embedding: Tensor, sparse: Tensor, dense: Tensor) -> Prompted:
        """embedding [C, h, w]; sparse [1, S, C] and dense [1, C, h, w] of the prompt encoder."""
        outputs = torch.cat([self.decoder.iou_token.weight, self.decoder.mask_tokens.weight])
        tokens = torch.cat([outputs, sparse[0]])
        layer = self.layers[0]
        queries = layer.norm1(layer.self_attn(q=tokens[None], k=tokens[None], v=tokens[None]))[0]
        pixels = (embedding + dense[0]).flatten(1).T.contiguous()
        placed = pixels + self.position
        asked = self.reads[0].ask((queries + tokens)[None])[0]
        return Prompted(
            embedding.flatten(1),
            pixels,
            placed,
            tokens,
            queries,
            asked,
            asked @ placed.T,
        )

    def logits(self, prompted: Prompted, overwritten: Tensor, read: Tensor) -> Tensor:
        """Low-resolution logits of the first mask: [K, 4h, 4w].

        overwritten, read: int64 [K, P]. In candidate k channel overwritten[k, p] is replaced by
        channel read[k, p] of X, for every p; a pair of equal channels changes nothing.
        """
        queries, pixels = self._first_layer(prompted, overwritten, read)
        for layer, reading, writing in zip(
            self.layers[1:], self.reads[1:], self.writes[1:], strict=True
        ):
            q = queries + prompted.tokens
            queries = layer.norm1(queries + layer.self_attn(q=q, k=q, v=queries))
            placed = pixels + self.position
            attended = reading.read(queries + prompted.tokens, pixels, placed)
            queries = layer.norm2(queries + attended)
            queries = layer.norm3(queries + layer.mlp(queries))
            asked, constant = writing.ask(queries + prompted.tokens)
            scores = torch.baddbmm(constant, asked, placed.transpose(1, 2))
            pixels = layer.norm4(writing.write(scores, queries, pixels))
        query = queries[:, FIRST_MASK, None]
        q = query + prompted.tokens[FIRST_MASK]
        query = query + self.last_read.read(q, pixels, pixels + self.position)
        query = self.decoder.transformer.norm_final_attn(query)
        return self._mask(pixels, query[:, 0])

    def _first_layer(
        self, prompted: Prompted, overwritten: Tensor, read: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens [K, T, C] and pixels [K, N, C] after the first layer."""
        layer, reading, writing = self.layers[0], self.reads[0], self.writes[0]
        change = prompted.embedding[read] - prompted.embedding[overwritten]  # [K, P, N]

        def columns(like: Tensor) -> Tensor:  # where the change goes among C channels, of [K, R, C]
            return overwritten[:, None].expand(-1, like.shape[1], -1)

        coefficients = prompted.asked[:, overwritten].transpose(0, 1)  # [K, T·heads, P]
        attention = torch.baddbmm(prompted.scores, coefficients, change).softmax(-1)
        mean = (attention.flatten(0, 1) @ prompted.pixels).view(*attention.shape[:2], -1)
        mean.scatter_add_(2, columns(mean), attention @ change.transpose(1, 2))
        queries = layer.norm2(prompted.queries + reading.combine(mean))
        queries = layer.norm3(queries + layer.mlp(queries))

        asked, constant = writing.ask(queries + prompted.tokens)
        scores = (asked.flatten(0, 1) @ prompted.placed.T).view(*asked.shape[:2], -1) + constant
        scores = torch.baddbmm(scores, asked.gather(2, columns(asked)), change)
        pixels = writing.write(scores, queries, prompted.pixels)
        pixels.scatter_add_(2, columns(pixels), change.transpose(1, 2))
        return queries, layer.norm4(pixels)

    def _mask(self, pixels: Tensor, token: Tensor) -> Tensor:
        """The transposed convolutions, 2×2 at stride 2, as products; the mask token's network."""
        _, norm, activation, _, last_activation = self.decoder.output_upscaling
        first, second = self.upscaling
        x = F.linear(pixels, *first).unflatten(-1, (4, -1))  # [K, N, 4, C / 4]
        x = activation(F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps))
        x = last_activation(F.linear(x, *second))  # [K, N, 4, 4 · C / 8]
        weights = self.decoder.output_hypernetworks_mlps[0](token)  # [K, C / 8]
        logits = weights[:, None] @ x.view(len(x), -1, weights.shape[1]).mT  # [K, 1, N · 16]
        return logits[:, 0].index_select(1, self.order).unflatten(1, self.mask_size)


class _Read:
    """An attention in which tokens ask and pixels answer."""

    def __init__(self, attention: "Attention") -> None:
        query, key, value, out = _projections(attention)
        scale = query.weight.shape[1] ** -0.5
        # scale · Wkᵀ (Wq t + bq); what the keys' bias adds is the same for every pixel
        self.ask_weight, self.ask_bias = _like(
            attention,
            scale * (key.weight.mT @ query.weight).flatten(0, 1),
            scale * (key.weight.mT @ query.bias[..., None]).flatten(),
        )
        # Σ Wo (Wv mean + bv) over the heads, + bo
        self.combine_weight, self.combine_bias = _like(
            attention,
            (out.weight @ value.weight).transpose(0, 1).flatten(1),
            (out.weight @ value.bias[..., None]).sum(0)[:, 0] + out.bias,
        )

    def ask(self, tokens: Tensor) -> Tensor:
        """What pixels are multiplied with to get the tokens' scores: [K, T·heads, C]."""
        return _rows(F.linear(tokens, self.ask_weight, self.ask_bias), tokens)

    def combine(self, mean: Tensor) -> Tensor:
        """Each token's mean pixel [K, T·heads, C] → the attention's output [K, T, C]."""
        width = self.combine_weight.shape[1]
        return F.linear(mean.view(len(mean), -1, width), self.combine_weight, self.combine_bias)

    def read(self, tokens: Tensor, pixels: Tensor, placed: Tensor) -> Tensor:
        """[K, T, C], from pixels [K, N, C] and the same with the positional encoding."""
        attention = (self.ask(tokens) @ placed.transpose(1, 2)).softmax(-1)
        return self.combine(attention @ pixels)


class _Write:
    """An attention in which pixels ask and tokens answer."""

    def __init__(self, attention: "Attention") -> None:
        query, key, value, out = _projections(attention)
        scale = query.weight.shape[1] ** -0.5
        self.heads = len(query.weight)
        # scale · Wqᵀ (Wk t + bk), and what the queries' bias adds
        self.ask_weight, self.ask_bias = _like(
            attention,
            scale * (query.weight.mT @ key.weight).flatten(0, 1),
            scale * (query.weight.mT @ key.bias[..., None]).flatten(),
        )
        self.constant_weight, self.constant_bias = _like(
            attention,
            scale * (query.bias[:, None] @ key.weight)[:, 0],
            scale * (query.bias * key.bias).sum(-1),
        )
        # Wo (Wv t + bv) + bo / heads: each head's attention sums to 1
        self.value_weight, self.value_bias = _like(
            attention,
            (out.weight @ value.weight).flatten(0, 1),
            ((out.weight @ value.bias[..., None])[..., 0] + out.bias / self.heads).flatten(),
        )

    def ask(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What pixels are multiplied with to get their scores for the tokens, [K, T·heads, C], and
        what is added, [K, T·heads, 1]."""
        asked = F.linear(tokens, self.ask_weight, self.ask_bias)
        constant = F.linear(tokens, self.constant_weight, self.constant_bias)
        return _rows(asked, tokens), constant.flatten(1)[..., None]

    def write(self, scores: Tensor, tokens: Tensor, pixels: Tensor) -> Tensor:
        """pixels [.., N, C] and what each gets from the tokens, by scores [K, T·heads, N]."""
        attention = scores.unflatten(1, (-1, self.heads)).softmax(1).flatten(1, 2)
        values = _rows(F.linear(tokens, self.value_weight, self.value_bias), tokens)
        return torch.baddbmm(pixels, attention.transpose(1, 2), values)


class _Affine(NamedTuple):
    weight: Tensor
    bias: Tensor


def _projections(attention: "Attention") -> tuple[_Affine, _Affine, _Affine, _Affine]:
    """Of query, key and value: weight [heads, I / heads, C], bias [heads, I / heads]; of the
    output: weight [heads, C, I / heads], bias [C]. In float64, as products are made of them."""
    heads, width = attention.num_heads, attention.embedding_dim

    def by_head(projection: nn.Module) -> _Affine:
        weight, bias = _affine(projection, width)
        return _Affine(weight.unflatten(0, (heads, -1)), bias.unflatten(0, (heads, -1)))

    weight, bias = _affine(attention.out_proj, attention.internal_dim)
    out = _Affine(weight.unflatten(1, (heads, -1)).transpose(0, 1), bias)
    return (
        by_head(attention.q_proj),
        by_head(attention.k_proj),
        by_head(attention.v_proj),
        out,
    )


def _affine(module: nn.Module, width: int) -> _Affine:
    """Weight [out, width] and bias of a module that is affine: a Linear, or LoRA around one."""
    if type(module) is nn.Linear:
        return _Affine(module.weight.double(), module.bias.double())
    like = next(module.parameters())
    bias = module(like.new_zeros(1, width))[0].double()
    points = module(torch.eye(width, dtype=like.dtype, device=like.device)).double()
    return _Affine((points - bias).T, bias)


def _like(attention: "Attention", *tensors: Tensor) -> tuple[Tensor, ...]:
    """In the dtype that the attention computes in."""
    dtype = next(attention.parameters()).dtype
    return tuple(tensor.to(dtype) for tensor in tensors)


def _rows(x: Tensor, tokens: Tensor) -> Tensor:
    """[K, T, heads·C] → [K, T·heads, C]."""
    return x.view(len(x), -1, tokens.shape[-1])


def _as_linear(convolution: nn.ConvTranspose2d) -> tuple[Tensor, Tensor]:
    """Weight [4·out, in] and bias of a 2×2 transposed convolution at stride 2; rows (y, x, out)."""
    weight = convolution.weight.permute(2, 3, 1, 0).flatten(0, 2)
    bias = convolution.bias
    assert bias is not None  # as SAM makes them
    return weight, bias.repeat(4)


def _mask_order(height: int, width: int, device: torch.device) -> tuple[tuple[int, int], Tensor]:
    """The mask's size, and where each of its cells, row by row, lies among what the two transposed
    convolutions make of each pixel, one 2×2 within the other."""
    cells = torch.arange(16 * height * width, device=device).view(height, width, 2, 2, 2, 2)
    return (4 * height, 4 * width), cells.permute(0, 2, 4, 1, 3, 5).flatten()
