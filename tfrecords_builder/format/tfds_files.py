"""What TensorFlow Datasets reads beside the shards: `tfds.builder_from_directory(DATASET)` needs nothing of ours.

Three small files in the formats of TFDS 4.9 (`dataset_info.proto`, `feature.proto`, both as JSON). Written here and
not by `tfds.folder_dataset.write_metadata`, which starts TensorFlow: that takes longer than building some thousand
images. A test reads them with TFDS. Pure.
"""

import json
from typing import Any

from tfrecords_builder.format.manifest import Manifest
from tfrecords_builder.format.record import IMAGE, INDEX, LABEL, MASK, PATH
from tfrecords_builder.format.sharding import DATASET_NAME
from tfrecords_builder.splitting.splits import SPLITS

DATASET_INFO = "dataset_info.json"
FEATURES = "features.json"
LABELS = f"{LABEL}.labels.txt"
FILES = (DATASET_INFO, FEATURES, LABELS)

VERSION = "1.0.0"
DESCRIPTION = (
    "Chest X-rays, each a gray square of {size} pixels. Near-duplicates are in one group, and a group is in "
    "one split unless the split rule says otherwise (here: {rule}); manifest.parquet has a row for every source file. "
    "Not for diagnosis."
)
CITATION = """\
If the images are those of the COVID-19 Radiography Database:
@article{chowdhury2020can,
  title={Can {AI} help in screening viral and {COVID-19} pneumonia?},
  author={Chowdhury, Muhammad E. H. and Rahman, Tawsifur and Khandakar, Amith and others},
  journal={IEEE Access}, volume={8}, pages={132665--132676}, year={2020}, doi={10.1109/ACCESS.2020.3010287}
}
@article{rahman2021exploring,
  title={Exploring the effect of image enhancement techniques on {COVID-19} detection using chest {X}-ray images},
  author={Rahman, Tawsifur and Khandakar, Amith and Qiblawey, Yazan and others},
  journal={Computers in Biology and Medicine}, volume={132}, pages={104319}, year={2021},
  doi={10.1016/j.compbiomed.2021.104319}
}"""

_PYTHON_CLASS = "pythonClassName"
_FEATURES = "tensorflow_datasets.core.features"


def tfds_files(manifest: Manifest) -> dict[str, bytes]:
    """The content of each of `FILES`."""
    return {
        DATASET_INFO: _json(_dataset_info(manifest)),
        FEATURES: _json(_features(manifest)),
        LABELS: "".join(f"{name}\n" for name in manifest.class_names).encode(),
    }


def _json(tree: dict[str, Any]) -> bytes:
    return (json.dumps(tree, indent=2, sort_keys=True) + "\n").encode()


def _dataset_info(manifest: Manifest) -> dict[str, Any]:
    shards = {split: [shard for shard in manifest.shards if shard.split == split] for split in SPLITS}
    return {
        "name": DATASET_NAME,
        "version": VERSION,
        "description": DESCRIPTION.format(size=manifest.image_size, rule=manifest.settings.split_rule),
        "citation": CITATION,
        "fileFormat": "tfrecord",
        "supervisedKeys": {"tuple": {"items": [{"featureKey": IMAGE}, {"featureKey": LABEL}]}},
        # 64-bit numbers are strings in protobuf's JSON.
        "splits": [
            {
                "name": split,
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "numBytes": str(sum(shard.bytes for shard in shards[split])),
                "shardLengths": [str(shard.records) for shard in shards[split]],
            }
            for split in SPLITS
        ],
    }


def _features(manifest: Manifest) -> dict[str, Any]:
    shape = {"dimensions": [str(manifest.image_size), str(manifest.image_size), "1"]}
    if manifest.encoding == "raw":
        tensor = {"shape": shape, "dtype": "uint8", "encoding": "bytes"}
        image = {_PYTHON_CLASS: f"{_FEATURES}.tensor_feature.Tensor", "tensor": tensor}
    else:
        picture = {"shape": shape, "dtype": "uint8", "encodingFormat": manifest.encoding}
        image = {_PYTHON_CLASS: f"{_FEATURES}.image_feature.Image", "image": picture}
    mask = {"shape": shape, "dtype": "uint8", "encodingFormat": "png"}
    masks = {MASK: {_PYTHON_CLASS: f"{_FEATURES}.image_feature.Image", "image": mask}}
    number = {"shape": {}, "dtype": "int64", "encoding": "none"}
    return {
        _PYTHON_CLASS: f"{_FEATURES}.features_dict.FeaturesDict",
        "featuresDict": {
            "features": {
                IMAGE: image,
                LABEL: {
                    _PYTHON_CLASS: f"{_FEATURES}.class_label_feature.ClassLabel",
                    "classLabel": {"numClasses": str(len(manifest.class_names))},
                },
                PATH: {_PYTHON_CLASS: f"{_FEATURES}.text_feature.Text", "text": {}},
                INDEX: {_PYTHON_CLASS: f"{_FEATURES}.tensor_feature.Tensor", "tensor": number},
                **(masks if manifest.settings.masks else {}),
            }
        },
    }
