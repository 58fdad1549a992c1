import pytest

from vfmk.train.config import TrainConfig


def test_recipe():
    """METHODS.md: lr 1e-4, 12 epochs, a tenth from epochs 8 and 11 on."""
    config = TrainConfig()
    rates = [config.rate(step, 1200) for step in range(1200)]
    assert rates[0] == rates[799] == 1e-4
    assert rates[800] == rates[1099] == pytest.approx(1e-5)
    assert rates[1100] == rates[1199] == pytest.approx(1e-6)
    assert (config.weight_decay, config.betas, config.batch_size) == (0.1, (0.9, 0.999), 2)


def test_cosine_with_warm_up():
    config = TrainConfig(schedule="cosine", warmup_steps=10)
    rates = [config.rate(step, 200) for step in range(200)]
    assert 0 < rates[0] < 1.1e-5
    assert rates.index(max(rates)) == 10
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 1e-7


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("accumulation", 0),
        ("learning_rate", float("nan")),
        ("betas", (0.9,)),
        ("schedule", "linear"),
        ("precision", "fp8"),
        ("ema", 1.0),
        ("workers", -1),
    ],
)
def test_refuses_by_name(field, value):
    with pytest.raises(ValueError, match=f"^TrainConfig: {field} must be"):
        TrainConfig(**{field: value})
