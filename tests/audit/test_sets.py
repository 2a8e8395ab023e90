from __future__ import annotations

import numpy as np
import pytest

from sfumato.audit.sets import _copies, _firsts


@pytest.mark.parametrize(
    ("groups", "without", "firsts", "copies"),
    [
        ([0, 1, 0, 2, 1, 1], [], [0, 1, 3], {2: 0, 4: 1, 5: 1}),
        ([5, 3, 5, 4, 3], [3], [0, 3], {2: 0}),
        ([0, 0, 0], [0], [], {}),
        ([7], [], [0], {}),
    ],
)
def test_every_further_image_belongs_to_the_first_of_its_group(groups, without, firsts, copies):
    groups = np.array(groups)
    rows = _firsts(groups, np.array(without, int))
    assert rows.tolist() == firsts
    further = _copies(np.arange(len(groups)), groups, rows)
    assert {int(image): int(rows[of]) for image, of in zip(further.images, further.of, strict=True)} == copies
