"""What the labels of a data set mean, in words."""

from pathlib import Path

from infocapsgan.data import folder
from infocapsgan.data.registry import image_shape

NAMES = {
    "fashion-mnist": (
        "T-shirt",
        "trousers",
        "pullover",
        "dress",
        "coat",
        "sandal",
        "shirt",
        "sneaker",
        "bag",
        "boot",
    ),
    "cifar10": ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "smallnorb": ("animal", "human", "plane", "truck", "car"),
}


def class_names(name: str, data_dir: str | Path | None = None) -> list[str]:
    """A short name for each label of the data set `name`: of a digit the digit, of a folder its name."""
    if name in NAMES:
        return list(NAMES[name])
    if name == "folder" and (named := folder.label_names(data_dir)):
        return named
    return [str(label) for label in range(image_shape(name, data_dir).classes)]
