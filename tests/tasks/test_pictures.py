"""Pictures show the numbers that they are given."""

import numpy as np
import pytest

from vfmk.tasks import pictures


@pytest.fixture
def drawn(monkeypatch):
    """The figures, before they are written."""
    figures = []
    monkeypatch.setattr(pictures, "_save", lambda figure, path, **options: figures.append(figure))
    return figures


def gains(channels):
    """Some not known, others on the diagonal that mean nothing."""
    values = np.random.default_rng(0).normal(0, 0.1, (channels, channels))
    values[1, 2:] = np.nan
    return values


def test_a_histogram_counts_each_known_pair_once(drawn, tmp_path):
    values = gains(16)
    pictures.draw_gains(tmp_path / "gains.png", values)
    (axes,) = drawn[0].axes
    known = ~np.isnan(values) & ~np.eye(16, dtype=bool)
    bars = axes.patches
    assert sum(bar.get_height() for bar in bars) == known.sum()
    edges = [bars[0].get_x(), bars[-1].get_x() + bars[-1].get_width()]
    assert edges == pytest.approx([values[known].min(), values[known].max()])


def test_a_heat_map_has_rows_overwritten_and_columns_read(drawn, tmp_path):
    values = gains(16)
    pictures.draw_heat_map(tmp_path / "heat_map.png", values)
    axes, _ = drawn[0].axes
    (image,) = axes.images
    np.testing.assert_array_equal(image.get_array().filled(np.nan), values)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("channel read", "channel overwritten")
    low, high = image.get_clim()
    assert low == -high == -np.nanmax(np.abs(values))


def test_a_heat_map_of_no_gain_is_drawn(drawn, tmp_path):
    pictures.draw_heat_map(tmp_path / "heat_map.png", np.zeros((4, 4)))
    assert drawn[0].axes[0].images[0].get_clim() == (-1, 1)
