import dataclasses
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import accuracy_score, confusion_matrix

from infocapsgan import data, evaluate
from infocapsgan.data.dataset import to_unit
from infocapsgan.data.multi_mnist import of_digits
from infocapsgan.engine.loaded_run import LoadedRun, Weights
from infocapsgan.metrics import codes as code_metrics
from infocapsgan.metrics.classification import classification
from infocapsgan.metrics.codes import codes, mean_rank_correlation
from infocapsgan.metrics.matching import match_clusters
from infocapsgan.models.capsule_encoder import lengths
from infocapsgan.models.decoders import masked
from infocapsgan.systems import CapsNet, NotApplicableError
from tests.tiers import fast_only


def run_command(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, words)])
    evaluate.main()
    return capsys.readouterr().out


@pytest.fixture
def few_rows(monkeypatch):
    """Codes are measured along twenty rows, not two hundred."""
    monkeypatch.setattr(code_metrics, "ROWS_PER_CLASS", 2)


def test_classification_is_that_of_sklearn(trained_as):
    run = trained_as("capsnet")
    result = evaluate.evaluate(run)
    model, test = run.system.model, run.dataset
    images, labels = to_unit(test.test_images), test.test_labels
    capsules = model.encoder(images).classes
    predicted = lengths(capsules).argmax(dim=1)
    rebuilt = model.decoder(masked(capsules, predicted))
    metrics = result["metrics"]
    assert metrics["accuracy"] == accuracy_score(labels, predicted)
    assert metrics["error"] == 1 - metrics["accuracy"]
    wanted = (rebuilt - images).square().sum((1, 2, 3)).mean().item()
    assert metrics["squared_error"] == pytest.approx(wanted, rel=1e-4)
    assert metrics["margin_loss"] == pytest.approx(run.system.margin_loss(capsules, labels).mean().item())
    count = np.array(result["classification"]["confusion"])
    assert (count == confusion_matrix(labels, predicted)).all()
    wanted = count.diagonal() / count.sum(1)
    assert result["classification"]["per_class_accuracy"] == wanted.tolist()


def test_the_command_agrees_with_the_training(trained_as):
    for name in ("capsnet", "encoder", "infocapsgan", "infogan"):
        run = trained_as(name)
        summary = json.loads((run.path / "summary.json").read_text())["metrics"]
        groups = ["classification" if name in ("capsnet", "encoder") else "clustering"]
        metrics = evaluate.evaluate(run, groups)["metrics"]
        for metric in set(summary) & set(metrics):
            assert metrics[metric] == pytest.approx(summary[metric], rel=1e-6), (name, metric)
        assert set(metrics) & {"accuracy", "unsupervised_accuracy"}


def test_pairs_are_counted_by_digit_and_by_pair(monkeypatch):
    system = CapsNet(dataset="multi-mnist", width=8, device="cpu").eval()
    digits = data.load("digits")
    splits = digits.train_images, digits.train_labels, digits.test_images, digits.test_labels
    dataset = of_digits(*splits, test_pairs=8)
    labels = dataset.test_labels

    def predicted(capsules, labels):
        guess = labels.clone()
        guess[0, 0] = (guess[0] + 1).max() % 10  # one digit of the first pair
        guess[1] = (guess[1] + 1) % 10  # both of the second
        return guess

    monkeypatch.setattr(system, "predicted", predicted)
    wrong = (predicted(None, labels) != labels).sum().item()
    with torch.no_grad():
        metrics, details = classification(system, dataset, 0)
    assert metrics["error"] == pytest.approx(wrong / 16)
    assert metrics["pair_error"] == 2 / 8
    assert sum(map(sum, details["confusion"])) == 16


def test_clusters_are_matched_on_the_training_split(trained_as):
    run = trained_as("infocapsgan")
    result = evaluate.evaluate(run, ["clustering"])
    dataset, details = run.dataset, result["clustering"]
    clusters = run.system.cluster(dataset.train_images)
    matched = match_clusters(clusters, dataset.train_labels, 10, 10)
    assert details["label_of_cluster"] == matched.tolist()
    count = np.array(details["confusion"])
    assert result["metrics"]["unsupervised_accuracy"] == pytest.approx(count.trace() / count.sum())
    assert count.sum(1).tolist() == dataset.test_labels.bincount().tolist()


def test_repeated_evaluations_agree_to_the_byte(run_of, cache, few_rows, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(run_of("infogan"), tmp_path / "run")
    out = run_command(monkeypatch, capsys, run, "--device", "cpu", "--samples", 100)
    first = (run / "evaluation.json").read_bytes()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))  # the classifier is trained anew
    run_command(monkeypatch, capsys, run, "--device", "cpu", "--samples", 100)
    assert (run / "evaluation.json").read_bytes() == first

    result = json.loads(first)
    assert (result["weights"], result["step"]) == ("step-00000004", 4)
    assert "frechet distance" in out
    assert set(result["metrics"]) == {
        "unsupervised_accuracy",
        "nmi",
        "ari",
        "frechet_distance",
        "sample_precision",
        "sample_recall",
        "slant_rank_correlation",
        "stroke_width_rank_correlation",
        "digit_width_rank_correlation",
    }
    assert "not Inception" in result["generation"]["features"]
    assert result["generation"]["samples"] == 100
    training = result["generation"]["frechet_distance_of_training_images"]
    assert 0 < training < result["metrics"]["frechet_distance"]  # four steps make no digits
    assert len(result["codes"]["slant_of_each_code"]) == 2


@pytest.mark.parametrize("name", fast_only(["infocapsgan"], ["capsulegan", "dcgan", "infocapsgan", "mimic"]))
def test_every_generator_is_measured(name, trained_as, cache, kept_cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept_cache))
    result = evaluate.evaluate(trained_as(name), ["generation"], samples=100)
    assert result["metrics"]["frechet_distance"] > 0
    assert 0 <= result["metrics"]["sample_precision"] <= 1


def test_copies_of_one_digit_are_precise_and_recall_little(trained_as, cache, kept_cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept_cache))
    run = trained_as("dcgan")
    copies = to_unit(run.dataset.test_images[run.dataset.test_labels == 0])
    monkeypatch.setattr(run.system, "generate", lambda latents: copies)
    metrics = evaluate.evaluate(run, ["generation"])["metrics"]
    assert metrics["sample_precision"] == 1
    assert metrics["sample_recall"] < 0.5


def test_rank_correlation_by_hand():
    values = torch.tensor([-1.0, 0, 1])
    rows = torch.tensor([[1.0, 2, 9], [3, 2, 1], [5, 5, 5], [1, 3, 2]])
    assert mean_rank_correlation(values, rows) == pytest.approx((1 - 1 + 0 + 0.5) / 4)
    several = torch.randn(20, 11)
    values = torch.linspace(-1, 1, 11)
    wanted = np.mean([spearmanr(values, row)[0] for row in several])
    assert mean_rank_correlation(values, several) == pytest.approx(wanted)


def test_a_code_that_shears_is_found(trained_as, few_rows, monkeypatch):
    system = trained_as("infogan").system
    grid = torch.arange(28.0) - 13.5

    def bars(latents):
        # Code 0 leans a bar, code 1 makes it wider.
        lean, width = latents[:, -2, None, None], 2 + latents[:, -1, None, None]
        return ((grid + lean * grid[:, None]).abs() < width).float()[:, None]

    monkeypatch.setattr(system, "generate", bars)
    metrics, details = codes(system, None, 0)
    assert metrics["slant_rank_correlation"] > 0.99
    assert metrics["stroke_width_rank_correlation"] > 0.95
    assert metrics["digit_width_rank_correlation"] > 0.95
    assert abs(details["slant_of_each_code"][1]) < 0.5
    assert details["slant_of_each_code"][0] > 0.99


def test_metrics_that_do_not_apply(trained_as):
    for name, group, message in (
        ("capsnet", "clustering", "clustering does not apply to this run of capsnet: it has no class code; "),
        ("capsnet", "generation", "it has no generator; it takes classification"),
        ("infocapsgan", "codes", "it has no continuous codes; it takes clustering and generation"),
        ("dcgan", "classification", "it is not trained with labels; it takes generation"),
    ):
        with pytest.raises(NotApplicableError, match=f"--metrics: .*{message}"):
            evaluate.evaluate(trained_as(name), [group])


def test_a_run_without_a_trained_generator(trained_as):
    run = trained_as("infocapsgan")
    settings = type(run.system)(adversarial_weight=0.0, width=8)
    without = LoadedRun(run.path, run.name, settings.eval(), Weights(run.path, 4), run.device)
    assert "frechet_distance" not in evaluate.evaluate(without)["metrics"]
    with pytest.raises(NotApplicableError, match="generator was not trained"):
        evaluate.evaluate(without, ["generation"])


def test_a_generator_that_has_not_come_in_yet(trained_as, capsys):
    for name in ("infocapsgan", "infogan"):
        run = trained_as(name)
        run.warn()
        assert not capsys.readouterr().err
        dataclasses.replace(run, weights=Weights(run.weights.checkpoint, 2)).warn()
        assert "warning: the generator is not trained: it comes in after" in capsys.readouterr().err


def test_images_without_labels(trained_as, few_rows, cache, monkeypatch):
    unlabelled = dataclasses.replace(
        data.load("digits"),
        train_labels=torch.zeros(1437, dtype=int),
        test_labels=torch.zeros(360, dtype=int),
    )
    monkeypatch.setattr(LoadedRun, "dataset", unlabelled)
    result = evaluate.evaluate(trained_as("infogan"), samples=100)
    assert result["generation"]["features"].startswith("64 of a classifier of rotations of digits")
    assert (
        0
        < result["generation"]["frechet_distance_of_training_images"]
        < result["metrics"]["frechet_distance"]
    )
    assert set(result["metrics"]) == {
        "frechet_distance",
        "sample_precision",
        "sample_recall",
        "slant_rank_correlation",
        "stroke_width_rank_correlation",
        "digit_width_rank_correlation",
    }
    for name in ("capsnet", "encoder"):
        with pytest.raises(NotApplicableError, match="classification: its images have no labels"):
            evaluate.evaluate(trained_as(name), ["classification"])


def test_too_few_test_images_for_precision_and_recall(trained_as, monkeypatch):
    digits = data.load("digits")
    few = dataclasses.replace(digits, test_images=digits.test_images[:3], test_labels=digits.test_labels[:3])
    monkeypatch.setattr(LoadedRun, "dataset", few)
    with pytest.raises(NotApplicableError, match="generation: .* takes 4 training and test images"):
        evaluate.evaluate(trained_as("dcgan"), ["generation"])


def test_errors_are_one_line(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match=r"^error: .* is not a run directory"):
        run_command(monkeypatch, capsys, tmp_path)
    for words, message in (
        (["--samples", "7"], "--samples: got 7, takes a whole number of at least 100"),
        (["--metrics", "beauty"], "invalid choice: 'beauty'"),
    ):
        with pytest.raises(SystemExit):
            run_command(monkeypatch, capsys, tmp_path, *words)
        assert message in capsys.readouterr().err
