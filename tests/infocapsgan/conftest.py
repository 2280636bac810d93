import pytest

from infocapsgan.engine import loaded_run as trained
from infocapsgan.engine.loop import train
from infocapsgan.metrics import features
from infocapsgan.systems import SYSTEMS

TINY = {"width": 8, "batch_size": 8, "max_steps": 4, "evaluate_every": 2}
OWN = {
    "dcgan": {"generator_width": 8},
    "capsulegan": {"generator_width": 8, "iterations": 2},
    "infocapsgan": {"warm_up": 2},
    "infogan": {"warm_up": 2},
}


@pytest.fixture(scope="session")
def run_of(tmp_path_factory):
    """A run of four steps of a system, made once."""
    made = {}

    def run(name):
        if name not in made:
            path = tmp_path_factory.mktemp("runs") / name
            system = SYSTEMS[name](out=path, device="cpu", **TINY, **OWN.get(name, {}))
            with pytest.MonkeyPatch.context() as patch:
                # k-means takes longer than the run
                patch.setattr("infocapsgan.systems.class_code.kmeans_accuracy", lambda *_: 0.8)
                train(SYSTEMS[name], system.settings)
            made[name] = path
        return made[name]

    return run


@pytest.fixture
def trained_as(run_of):
    """The system of such a run, loaded."""
    return lambda name: trained.load(run_of(name), device="cpu")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and feature classifiers that are trained for a moment only."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(features, "EPOCHS", 1)
    monkeypatch.setattr(features, "IMAGES_SEEN", 0)
    return tmp_path / "cache" / "infocapsgan"


@pytest.fixture(scope="session")
def kept_cache(tmp_path_factory):
    """The path of one cache for all tests that do not ask how it is filled."""
    return tmp_path_factory.mktemp("cache")
