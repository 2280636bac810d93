"""What the systems that are trained with labels have in common."""

from dataclasses import dataclass

from torch import Tensor

from infocapsgan.data import DataError, Dataset
from infocapsgan.engine.settings import Settings
from infocapsgan.models.capsule_encoder import lengths
from infocapsgan.systems.system import CapsuleSystem


@dataclass(frozen=True, kw_only=True)
class SupervisedSettings(Settings):
    """The options of all systems that are trained with labels."""

    validation: bool = False
    """Hold out a tenth of the training images, and keep the weights with the lowest loss on them."""


class Supervised(CapsuleSystem):
    """A capsule classifier."""

    headline = "accuracy"

    def load_data(self) -> Dataset:
        """The data set in the settings; raises DataError where its images have no labels to learn."""
        dataset = super().load_data()
        if not dataset.labelled:
            none = f"the images in {self.settings.data_dir} have none: takes a folder for each of two classes"
            raise DataError(f"this system is trained with labels, and {none} or more")
        return dataset

    def classify(self, images: Tensor) -> Tensor:
        """Lengths of the class capsules [N, J]: the probability, from 0 to 1, of each class in the image.

        Several may be, so lengths do not add up to 1 (Sabour et al. 2017, section 2).
        """
        return lengths(self.capsules(images).classes).float()

    def evaluate(self, dataset: Dataset) -> dict[str, float]:
        """Accuracy and mean losses of the test split; of pairs also the share where either label is wrong."""
        values = self.test_predictions(dataset)
        right = values.pop("predicted") == dataset.test_labels
        metrics = {"accuracy": right.double().mean().item()}
        metrics |= {name: loss.mean().item() for name, loss in values.items()}
        if right.dim() == 2:
            metrics["pair_error"] = 1 - right.all(dim=1).double().mean().item()
        return metrics

    def validation_loss(self, held_out: Dataset) -> float:
        """Margin loss; with a decoder plus α times the squared error."""
        metrics, weight = self.evaluate(held_out), getattr(self.settings, "reconstruction_weight", 0.0)
        return metrics["margin_loss"] + weight * metrics.get("squared_error", 0.0)
