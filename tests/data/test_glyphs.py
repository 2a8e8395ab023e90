import numpy as np

from sfumato.data.glyphs import GLYPHS, _thin, class_names, render_glyphs


def test_shapes_labels_and_names():
    images, labels, names = render_glyphs(size=28, per_class=2, seed=0)
    assert images.shape == (2 * len(GLYPHS), 28, 28, 1) and images.dtype == np.uint8
    assert np.bincount(labels).tolist() == [2] * len(GLYPHS)
    assert names == class_names() and names[:10] == tuple("0123456789")


def test_every_glyph_is_drawn_and_varies():
    images, _, _ = render_glyphs(size=16, per_class=3, seed=1)
    ink = images.reshape(len(GLYPHS), 3, -1).astype(int)
    assert (ink.max(2) > 100).all(), "an empty drawing"
    assert (np.abs(ink[:, 0] - ink[:, 1]).sum(1) > 0).all(), "two drawings of a glyph are the same"


def test_same_seed_same_images():
    one, again, other = (render_glyphs(size=12, per_class=1, seed=s)[0] for s in (3, 3, 4))
    assert np.array_equal(one, again) and not np.array_equal(one, other)


def test_thinning_keeps_a_bar_as_a_line_and_a_ring_as_a_ring():
    bar = np.zeros((1, 20, 20), bool)
    bar[0, 4:16, 8:13] = True
    line = _thin(bar)[0]
    assert 6 <= line.sum() <= 14 and (line.sum(1) <= 1).all()
    y, x = np.mgrid[:30, :30] - 15
    ring = ((np.hypot(x, y) < 12) & (np.hypot(x, y) > 6))[None]
    thin = _thin(ring)[0]
    assert not thin[15, 15] and thin.sum() < 90
