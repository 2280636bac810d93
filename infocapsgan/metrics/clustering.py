"""How well class codes, which were learned without labels, agree with the labels."""

from infocapsgan.data import Dataset
from infocapsgan.metrics import Measured, register, unless_labelled
from infocapsgan.metrics.classification import confusion
from infocapsgan.metrics.matching import clustering_metrics, match_clusters
from infocapsgan.systems.system import System


@register("clustering", unless_labelled("cluster"))
def clustering(system: System, dataset: Dataset, samples: int) -> Measured:
    """Unsupervised accuracy, NMI and ARI of the test split; clusters are matched on the training split."""
    classes = system.image_shape.classes
    train, test = system.cluster(dataset.train_images), system.cluster(dataset.test_images)
    matched = match_clusters(train, dataset.train_labels, system.codes, classes)
    details = {"label_of_cluster": matched.tolist()}
    details |= confusion(matched[test.cpu()], dataset.test_labels.cpu(), classes)
    return clustering_metrics(matched, test, dataset.test_labels), details
