"""The adapter against the method's equations, written out by hand."""

import functools
import math
import sys

import pytest
import torch
import torch.nn.functional as F

from bench.harness import calls, cuda_peak_bytes
from bench.peak import peak_bytes
from vfmk.nn.config import VFMAdapterConfig
from vfmk.nn.vfm_adapter import VFMAdapterStack

WIDTH, GRID, BATCH = 24, (5, 7), 3
CONFIGS = {
    "dynamic": VFMAdapterConfig(rank=8, token_dim=12, low_dim=4, num_queries=5, num_heads=2),
    "dynamic, local": VFMAdapterConfig(
        rank=8, token_dim=12, low_dim=4, num_queries=5, kernel_size=5, global_branch=False
    ),
    "dense": VFMAdapterConfig(
        rank=8, token_dim=12, low_dim=4, num_queries=5, num_heads=2, conv="dense"
    ),
    "dense, local": VFMAdapterConfig(
        rank=6, token_dim=12, low_dim=4, num_queries=5, conv="dense", global_branch=False
    ),
    "static": VFMAdapterConfig(rank=8, conv="static", scale=0.5),
}


def random_stack(config: VFMAdapterConfig) -> VFMAdapterStack:
    """In float64 and eval mode, with no parameter at zero."""
    torch.manual_seed(0)
    stack = VFMAdapterStack(WIDTH, (0, 1), config).double().eval()
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return stack


def tokens(batch: int = BATCH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, *GRID, WIDTH, dtype=torch.float64, generator=generator)


def quick_gelu(x):
    return x / (1 + torch.exp(-1.702 * x))


def linear(x, layer):
    return x @ layer.weight.T + layer.bias


def by_hand(stack: VFMAdapterStack, u: torch.Tensor, layer: str, sublayer: str) -> torch.Tensor:
    """One sample at a time, each equation on its own line."""
    config, adapter = stack.config, stack.layers[layer][sublayer]
    outputs = []
    for sample in u:
        if config.conv == "static":
            kernels = adapter.kernels[0].flatten(1)
        else:
            hypernetwork = stack.hypernetworks[sublayer]
            flat = sample.reshape(-1, WIDTH)
            p = linear(torch.relu(linear(flat, adapter.to_tokens[0])), adapter.to_tokens[2])
            a = torch.exp(p @ stack.queries.T)
            a = a / a.sum(0, keepdim=True)  # over the N tokens
            z = sum(a[n, m] * p[n] for m in range(a.shape[1]) for n in range(a.shape[0]))
            codes = linear(z, hypernetwork.channel_codes).reshape(config.rank, config.low_dim)
            kernels = linear(codes, hypernetwork.kernels)  # [r, k²], dense [r, r·k²]
        h = quick_gelu(linear(sample, adapter.down))  # [H, W, r]
        g = F.conv2d(
            h.permute(2, 0, 1)[None],
            kernels.reshape(config.rank, -1, config.kernel_size, config.kernel_size),
            padding=config.kernel_size // 2,
            groups=1 if config.conv == "dense" else config.rank,
        )[0].permute(1, 2, 0)
        if config.global_branch:
            query, key, value = linear(h.reshape(-1, config.rank), adapter.qkv).chunk(3, dim=1)
            heads = []
            for q, k, v in zip(
                *(t.chunk(config.num_heads, dim=1) for t in (query, key, value)), strict=True
            ):
                scores = q @ k.T / math.sqrt(config.rank / config.num_heads)
                heads.append(torch.softmax(scores, dim=1) @ v)
            g = g + torch.cat(heads, dim=1).reshape(g.shape)
        outputs.append(linear(quick_gelu(g), adapter.up))
    return torch.stack(outputs)


@pytest.mark.parametrize("sublayer", ["attn", "mlp"])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_equations(name, sublayer):
    config = CONFIGS[name]
    stack, u = random_stack(config), tokens()
    x = torch.randn_like(u)
    with torch.no_grad():
        expected = x + config.scale * by_hand(stack, u, "1", sublayer)
        torch.testing.assert_close(stack(x, u, 1, sublayer), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradcheck(name):
    stack = random_stack(CONFIGS[name])
    u = tokens(1)[:, :3, :2].requires_grad_()
    parameters = dict(stack.layers["0"]["attn"].named_parameters(prefix="layers.0.attn"))
    parameters |= {k: p for k, p in stack.named_parameters() if not k.startswith("layers")}
    parameters = {k: p for k, p in parameters.items() if not k.startswith("hypernetworks.mlp")}

    def adapter(u, *values):
        replaced = dict(zip(parameters, values, strict=True))
        zero = torch.zeros_like(u)
        return torch.func.functional_call(stack, replaced, (zero, u, 0, "attn"))

    torch.manual_seed(0)
    assert torch.autograd.gradcheck(adapter, (u, *parameters.values()), fast_mode=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_sample_does_not_depend_on_its_batch(name):
    stack, u = random_stack(CONFIGS[name]), tokens()
    with torch.no_grad():
        together = stack(u, u, 0, "attn")
        alone = torch.cat([stack(s[None], s[None], 0, "attn") for s in u])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_starts_as_the_zero_function(name):
    stack = VFMAdapterStack(WIDTH, (0,), CONFIGS[name])
    u = tokens().float()
    assert torch.equal(stack(u, u, 0, "mlp"), u)


@pytest.mark.parametrize("scale", [1.0, 0.37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_first", [False, True])
def test_a_new_adapter_changes_no_bit_and_no_layout(channels_first, dtype, scale):
    stack = VFMAdapterStack(WIDTH, (0,), VFMAdapterConfig(rank=8, scale=scale)).to(dtype).eval()
    x, u = 30 * tokens().to(dtype), tokens().to(dtype)
    if channels_first:  # in memory, as SAM's patch embedding leaves it
        x = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    output = stack(x, u, 0, "attn")
    assert torch.equal(output, x)
    assert output.stride() == x.stride()


def test_autocast_leaves_the_residual_in_float32():
    stack = random_stack(CONFIGS["dynamic"]).float()
    x = tokens().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = stack(x, x, 0, "attn")
    assert output.dtype == torch.float32
    exact = stack(x, x, 0, "attn")
    assert (output - exact).norm() < 0.02 * exact.norm()


def adapt(x, u, *parameters, stack):
    replaced = dict(zip((name for name, _ in stack.named_parameters()), parameters, strict=True))
    return torch.func.functional_call(stack, replaced, (x, u, 0, "mlp"))


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("direction", "sizes"), [("forward", 1), ("both", 2)])
def test_holds_nothing_of_its_size_but_the_output(direction, sizes, device):
    """And in training, the gradient of u; all else has far fewer channels, and is 0.1 and 0.3."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU is visible")
    width, grid = 2048, 56
    config = VFMAdapterConfig(rank=8, token_dim=8, sublayers=("mlp",))
    stack = VFMAdapterStack(width, (0,), config).to(device)
    x, u = (torch.zeros(1, grid, grid, width, device=device) for _ in range(2))
    function = functools.partial(adapt, stack=stack)
    make = functools.partial(calls, function, direction, [(x, u, *stack.parameters())])
    if device == "cuda":
        call = make()
        call()
        peak = cuda_peak_bytes(call)
    else:
        peak = peak_bytes(make)
    assert peak < (sizes + 0.5) * x.nbytes


@pytest.mark.parametrize("name", CONFIGS)
def test_everything_trains_from_the_second_step(name):
    """In the first, all but the up-projection waits for it to leave zero."""
    torch.manual_seed(0)
    config = CONFIGS[name]
    stack = VFMAdapterStack(WIDTH, (0, 1), config)
    u, target = tokens().float(), torch.randn(BATCH, *GRID, WIDTH)
    optimizer = torch.optim.SGD(stack.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        x = u
        for layer in (0, 1):
            for sublayer in config.sublayers:
                x = stack(x, u, layer, sublayer)
        (x - target).square().mean().backward()
        optimizer.step()
    for parameter_name, parameter in stack.named_parameters():
        assert parameter.grad.any(), parameter_name


@pytest.mark.parametrize(("low_dim", "percent"), [(8, 2.81), (64, 3.11)])
def test_share_of_the_released_variant(low_dim, percent):
    """Of the encoder of SAM ViT-B, as its authors count."""
    config = VFMAdapterConfig(conv="dense", global_branch=False, low_dim=low_dim)
    with torch.device("meta"):
        stack = VFMAdapterStack(768, tuple(range(12)), config)
    trainable = sum(parameter.numel() for parameter in stack.parameters())
    assert round(100 * trainable / 89_670_912, 2) == percent


def test_only_the_chosen_places_have_adapters():
    stack = VFMAdapterStack(WIDTH, (1,), VFMAdapterConfig(rank=8, sublayers=("mlp",)))
    u = tokens().float()
    assert stack(u, u, 0, "mlp") is u
    assert stack(u, u, 1, "attn") is u
    assert stack(u, u, 1, "mlp") is not u
