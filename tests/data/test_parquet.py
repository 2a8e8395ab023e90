from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sfumato.data.decoding import UnreadableImage
from sfumato.data.sources import open_source
from sfumato.errors import InputError

Png = Callable[..., bytes]


def table(
    images: list[bytes | None], features: dict[str, object] | None = None, **columns: list[object]
) -> pa.Table:
    cells = pa.array([{"bytes": image, "path": None} for image in images])
    made = pa.table({"image": cells, **{name: pa.array(values) for name, values in columns.items()}})
    if features is None:
        return made
    return made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def refused(spec: object, problem: str) -> None:
    with pytest.raises(InputError, match=problem) as caught:
        source = open_source(spec)  # type: ignore[arg-type]
        [record.read() for record in source.records]
    assert str(caught.value).count("no budget was spent") == 1
    assert "\n" not in str(caught.value)


CLASSES = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["zebra", "ape"]}}


def test_the_layout_of_hugging_face(tmp_path: Path, png: Png) -> None:
    images = [png(value) for value in range(5)]
    written = table(
        images,
        CLASSES,
        label=[0, 1, 1, 0, 1],
        group_id=["a", "b", None, "a", 3 and "c"],
        caption=list("vwxyz"),
    )
    pq.write_table(written, tmp_path / "a.parquet", row_group_size=2)
    source = open_source(tmp_path / "a.parquet")
    assert source.label_names == ("zebra", "ape"), "class names keep the order of their numbers"
    assert [r.label for r in source.records] == ["zebra", "ape", "ape", "zebra", "ape"]
    assert [r.group for r in source.records] == ["a", "b", None, "a", "c"]
    assert [r.caption for r in source.records] == list("vwxyz")
    for row in [0, 1, 2, 3, 4, 1, 3, 0, 4]:
        assert source.records[row].read() == images[row]


def test_many_batches_row_groups_and_shards(tmp_path: Path, png: Png) -> None:
    images = [png(value % 256) + value.to_bytes(2, "big") for value in range(400)]
    (tmp_path / "data").mkdir()
    for shard, part in enumerate((images[:250], images[250:])):
        pq.write_table(
            table(part), tmp_path / "data" / f"train-0000{shard}-of-00002.parquet", row_group_size=150
        )
    source = open_source(tmp_path)
    assert source.kind == "parquet"
    assert source.label_names is None
    assert [record.read() for record in source.records] == images
    for row in (399, 0, 151, 150, 249, 250):
        assert source.records[row].read() == images[row]


def test_plain_columns(tmp_path: Path, png: Png) -> None:
    pq.write_table(pa.table({"img": [png(1), png(2)], "label": [10, 9]}), tmp_path / "a.parquet")
    source = open_source(tmp_path / "a.parquet")
    assert source.label_names == ("9", "10")
    assert source.records[1].read() == png(2)
    pq.write_table(pa.table({"image": [png(1), png(2)], "label": ["b", "a"]}), tmp_path / "b.parquet")
    assert open_source(tmp_path / "b.parquet").label_names == ("a", "b")


def test_a_test_split_without_labels_is_unlabelled(tmp_path: Path, png: Png) -> None:
    pq.write_table(table([png(1), png(2)], CLASSES, label=[-1, -1]), tmp_path / "a.parquet")
    assert open_source(tmp_path / "a.parquet").label_names is None


def test_tables_of_another_kind(tmp_path: Path, png: Png) -> None:
    path = tmp_path / "a.parquet"
    for made, problem in [
        (pa.table({"text": ["a"]}), r"no image column \(it has text\)"),
        (pa.table({"image": ["a"]}), "no image column"),
        (table([None]).slice(1), "no image column"),
        (table([png(1)]).slice(1), "holds no images"),
        (table([png(1)] * 2, label=[1, None]), "labels that are missing"),
        (table([png(1)] * 2, label=[1.0, 2.0]), "not all integers"),
        (table([png(1)], CLASSES, label=[2]), "outside its 2"),
    ]:
        pq.write_table(made, path)
        refused(path, problem)


def test_a_cell_without_bytes_can_be_skipped(tmp_path: Path, png: Png) -> None:
    pq.write_table(table([png(1), None]), tmp_path / "a.parquet")
    with pytest.raises(UnreadableImage, match="'image 2' has no image bytes"):
        open_source(tmp_path / "a.parquet").records[1].read()


def test_damaged_files(tmp_path: Path, png: Png) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(table([png(value) for value in range(200)]), path, compression="zstd")
    raw = bytearray(path.read_bytes())
    path.write_bytes(raw[: len(raw) // 2])
    refused(path, "not a readable parquet file")
    path.write_bytes(b"")
    refused(path, "not a readable parquet file")
    raw[4:60] = bytes([255]) * 56  # the header of the first page
    path.write_bytes(raw)
    refused(path, "is damaged near image 1")


def test_several_splits_or_different_columns(tmp_path: Path, png: Png) -> None:
    pq.write_table(table([png(1)]), tmp_path / "train-00000-of-00001.parquet")
    pq.write_table(table([png(2)]), tmp_path / "test-00000-of-00001.parquet")
    refused(tmp_path, "several splits")
    other = tmp_path / "other"
    other.mkdir()
    pq.write_table(table([png(1)]), other / "a.parquet")
    pq.write_table(table([png(1)], label=[1]), other / "b.parquet")
    refused(other, "different columns")


def test_malformed_class_names_are_no_obstacle(tmp_path: Path, png: Png) -> None:
    for metadata in (b"{", b"[1]", b'{"info": 3}', b'{"info": {"features": [1]}}'):
        made = table([png(1)], label=[4]).replace_schema_metadata({"huggingface": metadata})
        pq.write_table(made, tmp_path / "a.parquet")
        assert open_source(tmp_path / "a.parquet").label_names == ("4",)


def test_the_hub(monkeypatch: pytest.MonkeyPatch, png: Png, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "on disk.png").write_bytes(png(3))
    cells = [{"bytes": png(1), "path": None}, {"bytes": None, "path": str(tmp_path / "on disk.png")}]
    cells.append({"bytes": None, "path": str(tmp_path / "gone.png")})
    features = datasets.Features(picture=datasets.Image(), label=datasets.ClassLabel(names=["z", "a"]))
    made = datasets.Dataset.from_dict({"picture": cells, "label": [1, 0, 1]}, features=features)
    asked: list[tuple[str, str]] = []

    def load(name: str, split: str) -> object:
        asked.append((name, split))
        if name == "nobody/nothing":
            raise FileNotFoundError("no such\ndata set")
        return made

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = open_source("hf:somebody/zoo")
    open_source("hf:somebody/zoo:test")
    assert asked == [("somebody/zoo", "train"), ("somebody/zoo", "test")]
    assert source.label_names == ("z", "a")
    assert [r.label for r in source.records] == ["a", "z", "a"]
    assert [r.read() for r in source.records[:2]] == [png(1), png(3)]
    with pytest.raises(UnreadableImage, match="cannot be opened"):
        source.records[2].read()
    refused("hf:nobody/nothing", "FileNotFoundError: no such")
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(
        "hf:somebody/zoo", "needs the 'datasets' library; no budget was spent; type: pip install datasets"
    )
