"""The candidates' decoder against the plain one, pair by pair."""

import pytest
import torch

import vfmk
from vfmk.channels import ChannelMap
from vfmk.channels.decoder import CandidateDecoder


@pytest.fixture(scope="module")
def sam():
    return vfmk.load_sam("tiny")


def prompt(sam, points):
    coords = torch.tensor([[[60.0, 50.0], [10.0, 90.0]]])[:, :points]
    return sam.prompt_encoder((coords, torch.tensor([[1, 0]])[:, :points]), None, None)


@torch.no_grad()
@pytest.mark.parametrize("points", [1, 2])
def test_equals_the_plain_decoder(sam, points):
    generator = torch.Generator().manual_seed(0)
    embedding = sam.image_encoder(torch.randn(1, 3, 128, 128, generator=generator))[0]
    sparse, dense = prompt(sam, points)
    sets = [(), ((3, 8),), ((8, 3),), ((3, 8), (8, 3), (0, 1)), ((63, 0), (0, 63))]
    filled = torch.tensor([[*pairs, *[(40, 40)] * (3 - len(pairs))] for pairs in sets])
    decoder = CandidateDecoder(sam)
    prompted = decoder.prepare(embedding, sparse, dense)
    actual = decoder.logits(prompted, *filled.unbind(-1))
    for pairs, logits in zip(sets, actual, strict=True):
        expected, _ = sam.mask_decoder(
            image_embeddings=embedding[ChannelMap(pairs, 64).index][None],
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        error = (logits - expected[0, 0]).norm() / expected.norm()
        assert error < 2e-6


@torch.no_grad()
def test_takes_lora_in_the_decoder(sam):
    import peft

    adapted = vfmk.load_sam("tiny")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, adapted.mask_decoder)
    adapted.eval()
    embedding = torch.randn(64, 16, 16, generator=torch.Generator().manual_seed(0))
    sparse, dense = prompt(adapted, 1)
    decoder = CandidateDecoder(adapted)
    pair = torch.tensor([[4]]), torch.tensor([[9]])
    logits = decoder.logits(decoder.prepare(embedding, sparse, dense), *pair)
    expected, _ = adapted.mask_decoder(
        image_embeddings=embedding[ChannelMap(((4, 9),), 64).index][None],
        image_pe=adapted.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=False,
    )
    assert (logits - expected[:, 0]).norm() / expected.norm() < 1e-5


def test_refuses_another_decoder(sam):
    sam = vfmk.load_sam("tiny")
    sam.mask_decoder = torch.nn.Identity()
    with pytest.raises(TypeError, match="not segment_anything's MaskDecoder"):
        CandidateDecoder(sam)
