"""What people train SAM with, on an accelerated encoder: LoRA, checkpoints, autocast, compile,
several processes."""

from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import vfmk
from tests.operator_checks import relative_error
from vfmk.sam.load import build_tiny_sam

FP32_LIMIT = 1e-4  # gradients through six blocks
CONFIG = vfmk.VFMAdapterConfig(rank=8, token_dim=16, low_dim=4, num_queries=4, dropout=0.0)
PROCESSES = 2


@pytest.fixture
def sam():
    return tiny_sam()


def tiny_sam() -> nn.Module:
    """Relative positions start at zero in SAM, where they would hide what they do."""
    torch.manual_seed(0)
    sam = build_tiny_sam().eval()
    with torch.no_grad():
        for name, parameter in sam.named_parameters():
            if "rel_pos" in name:
                parameter.normal_(std=0.3)
    return sam


def random_images(count: int) -> Tensor:
    return torch.randn(count, 3, 128, 128, generator=torch.Generator().manual_seed(1))


def loss_of(embeddings: Tensor) -> Tensor:
    """A mean over the batch, so that the processes' mean is the whole batch's."""
    weight = torch.linspace(-1, 1, embeddings[0].numel()).view(embeddings.shape[1:])
    return (weight * embeddings).square().mean()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def check_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], limit: float) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative_error(actual[name], gradient) <= limit, name


def adapted_encoder(sam: nn.Module) -> vfmk.AdaptedSam:
    """Accelerated, with adapters that are not zero.

    Their ReLUs stay clear of 0, where rounding would decide which gradient there is.
    """
    adapted = vfmk.get_adapted_model(vfmk.accelerate(sam), CONFIG)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in adapted.adapters.named_parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
            if name.endswith("to_tokens.0.bias"):
                parameter.sign_().mul_(8)
    return adapted


@pytest.mark.parametrize("accelerated_first", [False, True])
def test_lora_of_peft(sam, accelerated_first):
    """The same output and gradients on both encoders, and the gradients lead downhill."""
    import peft  # imports transformers, which takes its time

    if accelerated_first:
        vfmk.accelerate(sam)
    model = peft.get_peft_model(sam, peft.LoraConfig(r=4, target_modules=["qkv"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first
                parameter.normal_(std=0.1)
    if not accelerated_first:
        vfmk.accelerate(sam)
    images = random_images(2)
    output = sam.image_encoder(images)
    ours = gradients(model, loss_of(output))
    before = loss_of(vfmk.restore(sam).image_encoder(images))
    theirs = gradients(model, before)
    assert relative_error(output, sam.image_encoder(images)) <= FP32_LIMIT
    assert all("lora_" in name for name in theirs)
    assert all(gradient.any() for gradient in theirs.values())
    check_equal(ours, theirs, FP32_LIMIT)

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    optimizer.step()
    assert loss_of(vfmk.accelerate(sam).image_encoder(images)) < before


def test_checkpointing_of_every_block(sam):
    encoder = adapted_encoder(sam).sam.image_encoder
    images = random_images(1)
    expected = gradients(encoder, loss_of(encoder(images)))
    for block in encoder.blocks:
        plain = block.forward
        block.forward = lambda x, plain=plain: checkpoint(plain, x, use_reentrant=False)
    check_equal(gradients(encoder, loss_of(encoder(images))), expected, FP32_LIMIT)


def test_training_under_autocast(sam):
    """As far from float32 as bfloat16 takes eager SAM, and no farther."""
    images = random_images(2)
    sam.requires_grad_(False)
    for block in sam.image_encoder.blocks:
        block.attn.requires_grad_(True)
    truth = gradients(sam, loss_of(sam.image_encoder(images)))
    with torch.autocast("cpu", torch.bfloat16):
        theirs = gradients(sam, loss_of(sam.image_encoder(images)))
        ours = gradients(sam, loss_of(vfmk.accelerate(sam).image_encoder(images)))

    def error(results: dict[str, Tensor]) -> float:
        return max(relative_error(results[name], gradient) for name, gradient in truth.items())

    assert error(ours) <= 1.5 * error(theirs)


def test_training_compiled(sam):
    adapted = adapted_encoder(sam)
    images = random_images(1)
    expected = gradients(adapted, loss_of(sam.image_encoder(images)))
    compiled = torch.compile(sam.image_encoder, fullgraph=True, backend="aot_eager")
    check_equal(gradients(adapted, loss_of(compiled(images))), expected, FP32_LIMIT)


class EncoderOf(nn.Module):
    """What each process trains: images to embeddings."""

    def __init__(self, adapted: vfmk.AdaptedSam) -> None:
        super().__init__()
        self.adapted = adapted

    def forward(self, images: Tensor) -> Tensor:
        return self.adapted.sam.image_encoder(images)


def test_distributed_data_parallel(sam, tmp_path):
    """Two processes with half of the batch each, and every trained parameter in use."""
    model = EncoderOf(adapted_encoder(sam))
    expected = gradients(model, loss_of(model(random_images(2 * PROCESSES))))
    torch.multiprocessing.spawn(train_in_process, (tmp_path,), nprocs=PROCESSES)
    for rank in range(PROCESSES):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        found = {name.removeprefix("module."): gradient for name, gradient in found.items()}
        check_equal(found, expected, FP32_LIMIT)


def train_in_process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES
    )
    model = DistributedDataParallel(EncoderOf(adapted_encoder(tiny_sam())))
    for _ in range(2):  # the second step fails if the first left a parameter without gradient
        images = random_images(2 * PROCESSES).chunk(PROCESSES)[rank]
        found = gradients(model, loss_of(model(images)))
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()
