from dataclasses import replace

import pytest
import torch

from infocapsgan import data
from infocapsgan.metrics import features
from infocapsgan.metrics.features import feature_extractor


def test_a_classifier_is_trained_once_and_always_the_same(cache, monkeypatch):
    monkeypatch.setattr(features, "IMAGES_SEEN", 1_600)
    digits = data.load("digits").head(400)
    state = torch.get_rng_state()
    first = feature_extractor(digits, 10)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.accuracy > 0.3
    found = first.classifier.of_all(digits.test_images)
    assert found.shape == (360, 64)
    assert torch.equal(found, first.classifier.of_all(digits.test_images.float() / 255))

    (kept,) = (cache / "features").iterdir()
    written = (kept / "weights.safetensors").stat().st_mtime_ns
    assert feature_extractor(digits, 10).checksum == first.checksum
    assert (kept / "weights.safetensors").stat().st_mtime_ns == written

    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "other"))
    assert feature_extractor(digits, 10).checksum == first.checksum


def test_of_two_that_train_at_once_the_first_to_finish_keeps_its_classifier(cache, monkeypatch):
    digits = data.load("digits").head(100)
    train, made = features._train, []

    def second(classifier, dataset):
        monkeypatch.setattr(features, "_train", train)
        made.append(feature_extractor(dataset, 10))  # another process, from its first step to its last
        train(classifier, dataset)
        classifier.classify.bias.data.fill_(7)

    monkeypatch.setattr(features, "_train", second)
    found = feature_extractor(digits, 10)
    assert (found.checksum, found.accuracy) == (made[0].checksum, made[0].accuracy)
    assert torch.equal(found.classifier.classify.bias, made[0].classifier.classify.bias)
    assert len(list((cache / "features").iterdir())) == 1


def test_other_images_have_another_classifier(cache):
    digits = data.load("digits").head(100)
    feature_extractor(digits, 10)
    feature_extractor(data.load("digits").head(101), 10)
    assert len(list((cache / "features").iterdir())) == 2


def test_from_the_cache_features_are_what_they_were(cache):
    digits = data.load("digits").head(100)
    first, second = (feature_extractor(digits, 10).classifier.of_all(digits.test_images) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("part", ["train_images", "train_labels", "test_images", "test_labels"])
def test_no_part_of_the_data_is_left_out_of_the_key(part, cache):
    digits = data.load("digits").head(100)
    feature_extractor(digits, 10)
    feature_extractor(replace(digits, **{part: getattr(digits, part).flip(0)}), 10)
    assert len(list((cache / "features").iterdir())) == 2


def test_its_accuracy_is_that_of_the_kept_weights(cache):
    digits = data.load("digits").head(200)
    extractor = feature_extractor(digits, 10)
    classifier = extractor.classifier
    found = classifier.classify(classifier.of_all(digits.test_images)).argmax(dim=1)
    assert extractor.accuracy == pytest.approx((found == digits.test_labels).double().mean().item())
