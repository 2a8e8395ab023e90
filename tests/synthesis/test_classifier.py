import numpy as np
import torch
from safetensors.torch import load_file

from sfumato.data.glyphs import GLYPHS, render_glyphs
from sfumato.encoders.classifier import query_network, train_classifier
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


def test_the_query_is_the_shared_loop_on_its_own_network_and_its_file_holds_its_state(tmp_path):
    images, labels, _ = render_glyphs(size=16, per_class=2, seed=0)
    saved = tmp_path / "folder" / "query.safetensors"
    network = train_query(images, labels, len(GLYPHS), steps=3, seed=6, saved=saved, batch=32)
    torch.manual_seed(6)
    wanted = query_network(1, len(GLYPHS))
    train_classifier(wanted, images, labels, steps=3, seed=6, batch=32, lr=3e-3, description="x")
    stored = load_file(saved)
    assert set(stored) == set(wanted.state_dict()) == set(network.state_dict())
    for name, value in wanted.state_dict().items():
        assert torch.equal(value, stored[name]) and torch.equal(value, network.state_dict()[name])
    assert not network.training and [path.name for path in saved.parent.iterdir()] == [saved.name]
