import numpy as np

from sfumato.data.glyphs import GLYPHS, render_glyphs
from sfumato.synthesis.classifier import scores, train_query


def test_learns_the_public_classes_and_treats_each_image_by_itself(tmp_path):
    images, labels, _ = render_glyphs(size=28, per_class=12, seed=0)
    kept = np.isin(labels, [0, 1, 4])
    images, labels = images[kept], np.searchsorted([0, 1, 4], labels[kept])
    saved = tmp_path / "query.safetensors"
    classify = scores(train_query(images, labels, 3, steps=60, seed=0, saved=saved))
    answers = classify(images)
    assert np.mean(answers.argmax(1) == labels) > 0.9
    alone = np.concatenate([classify(image[None]) for image in images[:5]])
    np.testing.assert_allclose(alone, answers[:5], rtol=1e-4, atol=1e-4)
    again = scores(train_query(images, labels, 3, steps=60, seed=0, saved=saved))
    np.testing.assert_array_equal(again(images[:5]), classify(images[:5]))


def test_glyph_classes_are_distinct_signs():
    assert len(set(GLYPHS)) == len(GLYPHS)
