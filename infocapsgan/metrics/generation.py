"""How close generated images come to real ones."""

from infocapsgan.data import Dataset
from infocapsgan.data.dataset import evenly, in_batches
from infocapsgan.engine.rng import ShardedGenerator
from infocapsgan.metrics import Measured, register
from infocapsgan.metrics.features import FEATURES, feature_extractor
from infocapsgan.metrics.frechet_distance import frechet_distance
from infocapsgan.metrics.precision_recall import NEIGHBOURS, precision_recall
from infocapsgan.systems.system import System


def _why_not(system: System, dataset: Dataset) -> str:
    few = min(len(dataset.train_images), len(dataset.test_images)) <= NEIGHBOURS
    too_few = f"it takes {NEIGHBOURS + 1} training and test images" if few else ""
    return system.why_not("generate") or too_few


@register("generation", _why_not)
def generation(system: System, dataset: Dataset, samples: int) -> Measured:
    """Fréchet distance, precision and recall of generated images against test images.

    The distance of training images to the same test images stands beside them: nobody gets far below it.
    """
    number = min(samples, len(dataset.test_images))
    extractor = feature_extractor(dataset, system.image_shape.classes)
    rng = ShardedGenerator(0, system.device)
    latents = system.random_latents(number, rng, images=dataset.train_images)
    test, train = (evenly(images, number) for images in (dataset.test_images, dataset.train_images))
    images = test, train, in_batches(system.generate, latents)
    real, of_training, of_generated = map(extractor.classifier.of_all, images)
    precision, recall = precision_recall(real, of_generated)
    metrics = {"frechet_distance": frechet_distance(real, of_generated)}
    return metrics | {"sample_precision": precision, "sample_recall": recall}, {
        "features": f"{FEATURES} of a classifier of {extractor.task} of {dataset.name}, not Inception",
        "classifier_accuracy": extractor.accuracy,
        "classifier_checksum": extractor.checksum,
        "samples": number,
        "frechet_distance_of_training_images": frechet_distance(real, of_training),
    }
