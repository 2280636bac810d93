"""What the systems that are trained with labels have in common."""

from dataclasses import dataclass

from infocapsgan.data import DataError, Dataset
from infocapsgan.engine.settings import Settings
from infocapsgan.systems.system import System


@dataclass(frozen=True, kw_only=True)
class SupervisedSettings(Settings):
    """The options of all systems that are trained with labels."""

    validation: bool = False
    """Hold out a tenth of the training images, and keep the weights with the lowest loss on them."""


class Supervised(System):
    """A classifier."""

    headline = "accuracy"

    def load_data(self) -> Dataset:
        """The data set that the settings name; raises DataError where its images have no labels to learn."""
        dataset = super().load_data()
        if not dataset.labelled:
            raise DataError(
                f"this system is trained with labels, and the images in {self.settings.data_dir} have none: "
                "takes a folder for each of two classes or more"
            )
        return dataset

    @property
    def validation_share(self) -> float:
        """A tenth, where --validation asks for it."""
        return 0.1 if self.settings.validation else 0.0
