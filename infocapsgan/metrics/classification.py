"""How well a system that was trained with labels predicts them."""

import numpy as np
from sklearn.metrics import confusion_matrix
from torch import Tensor

from infocapsgan.data import Dataset
from infocapsgan.metrics import Measured, register, unless_labelled
from infocapsgan.systems.system import System


@register("classification", unless_labelled("classify"))
def classification(system: System, dataset: Dataset, samples: int) -> Measured:
    """Accuracy, error and losses of the test split, its confusion matrix; the error of pairs of labels."""
    values, labels = system.test_predictions(dataset), dataset.test_labels
    predicted = values.pop("predicted")
    right = predicted == labels
    accuracy = right.double().mean().item()
    metrics = {"accuracy": accuracy, "error": 1 - accuracy}
    if labels.dim() == 2:
        metrics["pair_error"] = 1 - right.all(dim=1).double().mean().item()
    metrics |= {name: loss.double().mean().item() for name, loss in values.items()}
    return metrics, confusion(predicted, labels, system.image_shape.classes)


def confusion(predictions: Tensor, labels: Tensor, classes: int) -> dict[str, list]:
    """How often a label (row) was predicted as a class (column), and the share recognised of each label.

    Predictions and labels are [N] or, of several labels an image, [N, M] in the same order. The share of a
    label without images is None.
    """
    both = (values.cpu().numpy().ravel() for values in (labels, predictions))
    count = confusion_matrix(*both, labels=np.arange(classes))
    per_class = [int(count[j, j]) / int(row.sum()) if row.any() else None for j, row in enumerate(count)]
    return {"confusion": count.tolist(), "per_class_accuracy": per_class}
