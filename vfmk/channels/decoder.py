"""SAM's mask decoder for many candidates at once: one image, one prompt, other channels.

A candidate is the image embedding X with some channels overwritten by others. Little of what the
decoder computes depends on which:

* The first self-attention of the prompt's tokens, and all that meets only X or the positional
  encoding, is the same for every candidate and computed once.
* Until pixels first attend to tokens, a candidate is X plus a matrix of rank P, the number of its
  pairs; so its scores are those of X plus a product of inner dimension P.
* T tokens meet N ≫ T pixels. So the projections of the pixels are moved to the tokens:
  q · (W k) = (Wᵀ q) · k, and Σ p (W v) = W Σ p v. No pixel is ever projected.
* Of the masks only the first is wanted: the networks of the others and the IoU head do not run.

A layer takes 4·heads·T·N·C multiply-adds for each candidate, where the plain decoder spends
2·N·C² on projections alone.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from segment_anything.modeling import Sam
    from segment_anything.modeling.transformer import Attention


class Prompted(NamedTuple):
    """What one prompt on one image means to all its candidates."""

    embedding: Tensor  # X, [C, N]
    pixels: Tensor  # X and the dense prompt, [N, C]
    placed: Tensor  # the same with the positional encoding, [C, N]
    grid: tuple[int, int]
    tokens: Tensor  # [T, C]
    queries: Tensor  # the tokens after the first self-attention, [T, C]
    asked: Tensor  # what the first read multiplies pixels with, [heads·T, C]
    scores: Tensor  # and what comes of it on X, [heads·T, N]


class CandidateDecoder:
    """The mask decoder of `sam` in eval mode; call it under no_grad.

    Raises:
        TypeError: the decoder is not built as segment_anything's.
    """

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
        self.reads = [_Attention(layer.cross_attn_token_to_image) for layer in self.layers]
        self.writes = [_Attention(layer.cross_attn_image_to_token) for layer in self.layers]
        self.last_read = _Attention(decoder.transformer.final_attn_token_to_image)
        self.position = sam.prompt_encoder.get_dense_pe()[0].flatten(1)  # [C, N]

    def prepare(self, embedding: Tensor, sparse: Tensor, dense: Tensor) -> Prompted:
        """embedding [C, h, w]; sparse [1, S, C] and dense [1, C, h, w] of the prompt encoder."""
        outputs = torch.cat([self.decoder.iou_token.weight, self.decoder.mask_tokens.weight])
        tokens = torch.cat([outputs, sparse[0]])
        layer = self.layers[0]
        queries = layer.norm1(layer.self_attn(q=tokens[None], k=tokens[None], v=tokens[None]))[0]
        pixels = (embedding + dense[0]).flatten(1)
        placed = pixels + self.position
        asked = self.reads[0].ask((queries + tokens)[None])[0]
        return Prompted(
            embedding.flatten(1),
            pixels.T.contiguous(),
            placed,
            (embedding.shape[1], embedding.shape[2]),
            tokens,
            queries,
            asked,
            asked @ placed,
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
            attended = self._read(reading, queries + prompted.tokens, pixels)
            queries = layer.norm2(queries + attended)
            queries = layer.norm3(queries + layer.mlp(queries))
            asked, constant = writing.ask_back(queries + prompted.tokens)
            scores = self._scores(asked, pixels) + constant
            pixels = layer.norm4(writing.write(scores, queries, pixels))
        queries = queries + self._read(self.last_read, queries + prompted.tokens, pixels)
        queries = self.decoder.transformer.norm_final_attn(queries)
        return self._masks(pixels, queries[:, 1], prompted.grid)

    def _first_layer(
        self, prompted: Prompted, overwritten: Tensor, read: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens [K, T, C] and pixels [K, N, C] after the first layer."""
        layer, reading, writing = self.layers[0], self.reads[0], self.writes[0]
        change = prompted.embedding[read] - prompted.embedding[overwritten]  # [K, P, N]

        def columns(like: Tensor) -> Tensor:  # where the change goes among C channels, of [K, R, C]
            return overwritten[:, None].expand(-1, like.shape[1], -1)

        coefficients = prompted.asked[:, overwritten].transpose(0, 1)  # [K, heads·T, P]
        attention = torch.baddbmm(prompted.scores, coefficients, change).softmax(-1)
        mean = (attention.flatten(0, 1) @ prompted.pixels).view(*attention.shape[:2], -1)
        mean.scatter_add_(2, columns(mean), attention @ change.transpose(1, 2))
        queries = layer.norm2(prompted.queries + reading.combine(mean))
        queries = layer.norm3(queries + layer.mlp(queries))

        asked, constant = writing.ask_back(queries + prompted.tokens)
        scores = (asked.flatten(0, 1) @ prompted.placed).view(*asked.shape[:2], -1) + constant
        scores = torch.baddbmm(scores, asked.gather(2, columns(asked)), change)
        pixels = writing.write(scores, queries, prompted.pixels)
        pixels.scatter_add_(2, columns(pixels), change.transpose(1, 2))
        return queries, layer.norm4(pixels)

    def _read(self, reading: "_Attention", tokens: Tensor, pixels: Tensor) -> Tensor:
        """Tokens attend to pixels: [K, T, C]."""
        attention = self._scores(reading.ask(tokens), pixels).softmax(-1)
        return reading.combine(attention @ pixels)

    def _scores(self, asked: Tensor, pixels: Tensor) -> Tensor:
        """asked · (pixels + position): [K, heads·T, N]."""
        on_position = (asked.flatten(0, 1) @ self.position).view(*asked.shape[:2], -1)
        return torch.baddbmm(on_position, asked, pixels.transpose(1, 2))

    def _masks(self, pixels: Tensor, token: Tensor, grid: tuple[int, int]) -> Tensor:
        """The transposed convolutions, 2×2 at stride 2, as products; the mask token's network."""
        first, norm, activation, second, last_activation = self.decoder.output_upscaling
        x = F.linear(pixels, *_as_linear(first)).unflatten(-1, (4, -1))  # [K, N, 4, C / 4]
        x = activation(F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps))
        x = last_activation(F.linear(x, *_as_linear(second)))  # [K, N, 4, 4 · C / 8]
        weights = self.decoder.output_hypernetworks_mlps[0](token)  # [K, C / 8]
        height, width = grid
        logits = x.view(len(x), -1, weights.shape[1]) @ weights[..., None]
        logits = logits.view(-1, height, width, 2, 2, 2, 2).permute(0, 1, 3, 5, 2, 4, 6)
        return logits.reshape(-1, 4 * height, 4 * width)


class _Attention:
    """An attention of the decoder between tokens and pixels, the pixels' side moved to the tokens.

    Rows of [K, heads·T, …] are ordered by head, then token.
    """

    def __init__(self, attention: "Attention") -> None:
        self.attention = attention
        self.heads = attention.num_heads
        self.scale = (attention.internal_dim // attention.num_heads) ** -0.5
        width = attention.embedding_dim
        self.query_weight, self.query_bias = self._by_head(attention.q_proj, width)
        self.key_weight, _ = self._by_head(attention.k_proj, width)
        self.value_weight, self.value_bias = self._by_head(attention.v_proj, width)
        out_weight, self.out_bias = _affine(attention.out_proj, attention.internal_dim)
        self.out_weight = out_weight.T.unflatten(0, (self.heads, -1))  # [heads, I / heads, C]

    def ask(self, tokens: Tensor) -> Tensor:
        """What pixels are multiplied with to get the tokens' scores: [K, heads·T, C].

        Less what the keys' bias adds, which is the same for every pixel.
        """
        query = self._split(self.attention.q_proj(tokens))
        return (query @ self.key_weight * self.scale).flatten(1, 2)

    def combine(self, mean: Tensor) -> Tensor:
        """Each token's mean pixel [K, heads·T, C] → the attention's output [K, T, C]."""
        values = mean.unflatten(1, (self.heads, -1)) @ self.value_weight.transpose(1, 2)
        values = (values + self.value_bias[:, None]).transpose(1, 2).flatten(2)
        return self.attention.out_proj(values)

    def ask_back(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What pixels, as queries, are multiplied with to get their scores for the tokens:
        [K, heads·T, C], and what the queries' bias adds: [K, heads·T, 1]."""
        key = self._split(self.attention.k_proj(tokens)) * self.scale
        constant = key @ self.query_bias[..., None]
        return (key @ self.query_weight).flatten(1, 2), constant.flatten(1, 2)

    def write(self, scores: Tensor, tokens: Tensor, pixels: Tensor) -> Tensor:
        """pixels [.., N, C] and what each gets from the tokens, by scores [K, heads·T, N]."""
        by_head = scores.unflatten(1, (self.heads, -1))
        attention = by_head.softmax(2).flatten(1, 2)
        values = self._split(self.attention.v_proj(tokens)) @ self.out_weight
        values = values + self.out_bias / self.heads  # each head's attention sums to 1
        return torch.baddbmm(pixels, attention.transpose(1, 2), values.flatten(1, 2))

    def _by_head(self, projection: nn.Module, width: int) -> tuple[Tensor, Tensor]:
        """weight [heads, I / heads, C], bias [heads, I / heads]."""
        weight, bias = _affine(projection, width)
        return weight.unflatten(0, (self.heads, -1)), bias.unflatten(0, (self.heads, -1))

    def _split(self, x: Tensor) -> Tensor:
        """[K, T, I] → [K, heads, T, I / heads]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _affine(module: nn.Module, width: int) -> tuple[Tensor, Tensor]:
    """Weight [out, width] and bias of a module that is affine: a Linear, or LoRA around one."""
    if type(module) is nn.Linear:
        return module.weight, module.bias
    like = next(module.parameters())
    bias = module(like.new_zeros(1, width))[0]
    return (module(torch.eye(width, dtype=like.dtype, device=like.device)) - bias).T, bias


def _as_linear(convolution: nn.ConvTranspose2d) -> tuple[Tensor, Tensor]:
    """Weight [4·out, in] and bias of a 2×2 transposed convolution at stride 2; rows (y, x, out)."""
    weight = convolution.weight.permute(2, 3, 1, 0).flatten(0, 2)
    bias = convolution.bias
    assert bias is not None  # as SAM makes them
    return weight, bias.repeat(4)
