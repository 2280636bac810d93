import importlib
import json
import shutil
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import infocapsgan
from infocapsgan import evaluate, export, predict, visualize
from infocapsgan.data import DataError
from infocapsgan.engine import loaded_run as trained
from infocapsgan.engine.checkpoint import checkpoints, save_best
from infocapsgan.engine.loop import train
from infocapsgan.engine.run_directory import RunError
from infocapsgan.systems import CapsNet, NotApplicableError
from tests.onnx_exporter import needs_newer_exporter
from tests.tiers import slow


@pytest.fixture
def copy(run_of, tmp_path):
    return shutil.copytree(run_of("capsnet"), tmp_path / "copy")


def test_the_weights_are_those_of_the_last_checkpoint(run_of, trained_as):
    found, last = trained_as("capsnet"), checkpoints(run_of("capsnet") / "checkpoints")[-1]
    assert found.weights == (last, 4)
    saved = load_file(last / "weights.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in found.system.state_dict().items())
    assert not found.system.training
    assert len(found.dataset.test_labels) == 360


def test_weights_that_a_validation_chose_come_first(copy, trained_as):
    best = copy / "checkpoints" / "best"
    system = trained_as("capsnet").system
    system.model.encoder.conv.bias.fill_(7)
    save_best(copy / "checkpoints", system, 1200, 0.5)
    found = trained.load(copy, device="cpu")
    assert found.weights == (best, 1200)
    assert found.title == "capsnet on digits (recipe tuned, seed 0), best weights, step 1,200"
    assert (found.system.model.encoder.conv.bias == 7).all()
    save_file(load_file(best / "weights.safetensors"), best / "weights.safetensors")
    with pytest.raises(RunError, match="was written by another version of infocapsgan"):
        trained.load(copy, device="cpu")


def test_what_is_no_run_or_not_readable(copy, tmp_path):
    with pytest.raises(RunError, match="is not a run directory"):
        trained.load(tmp_path)
    config = json.loads((copy / "config.json").read_text())
    for changed, message in (
        (config | {"system": "resnet"}, "holds a run of 'resnet', which is none of capsnet"),
        ({**config, "settings": config["settings"] | {"depth": 3}}, "by another version.*depth"),
        ({**config, "settings": config["settings"] | {"width": 16}}, "do not fit this system.*size mismatch"),
        ({**config, "settings": config["settings"] | {"dataset": "x"}}, "by another version.*--dataset"),
    ):
        (copy / "config.json").write_text(json.dumps(changed))
        with pytest.raises(RunError, match=f"(?s){message}"):
            trained.load(copy)
    folder = config["settings"] | {"dataset": "folder", "data_dir": str(tmp_path / "gone")}
    (copy / "config.json").write_text(json.dumps(config | {"settings": folder}))
    run = trained.load(copy)  # which needs no data
    with pytest.raises(DataError, match="--data-dir: got .*gone, takes the directory of images"):
        _ = run.dataset
    (copy / "config.json").write_text(json.dumps(config))
    if not torch.cuda.is_available():
        with pytest.raises(RunError, match="--device: got cuda, but torch finds no GPU"):
            trained.load(copy, device="cuda")
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(RunError, match="has no checkpoint yet; train on with --resume"):
        trained.load(copy)


def test_images_that_were_moved_since_the_training(tmp_path, monkeypatch, capsys):
    for name, value in (("dark", 0), ("light", 255)):
        (tmp_path / "before" / name).mkdir(parents=True)
        for number in range(10):
            Image.new("L", (32, 32), value).save(tmp_path / "before" / name / f"{number}.png")
    path = tmp_path / "run"
    options = {"dataset": "folder", "data_dir": tmp_path / "before", "device": "cpu", "width": 8}
    train(CapsNet, CapsNet(batch_size=4, max_steps=1, out=path, **options).settings)
    (tmp_path / "before").rename(tmp_path / "now")
    for main, words in ((evaluate.main, [path]), (visualize.main, [path, "reconstruct"])):
        monkeypatch.setattr("sys.argv", ["program", *map(str, words)])
        with pytest.raises(SystemExit, match="error: --data-dir: got .*before, takes the directory"):
            main()
        monkeypatch.setattr("sys.argv", ["program", *map(str, words), "--data-dir", str(tmp_path / "now")])
        main()
        assert "written to" in capsys.readouterr().out


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A folder of grey squares and crosses, and a run of capsnet that tells them apart."""
    root = tmp_path_factory.mktemp("shapes")
    rng = np.random.default_rng(0)
    for name in ("cross", "square"):
        (root / "images" / name).mkdir(parents=True)
        for number in range(30):
            picture = np.zeros((40, 40), np.uint8)
            row, column = rng.integers(4, 16, 2)
            picture[row : row + 20, column + 8 : column + 12] = 255
            picture[row + 8 : row + 12, column : column + 20] = 255
            if name == "square":
                picture[row : row + 20, column : column + 20] = 255
            Image.fromarray(picture).save(root / "images" / name / f"{number}.png")
    options = {"dataset": "folder", "data_dir": root / "images", "image_size": 28, "device": "cpu"}
    infocapsgan.train(
        "capsnet",
        out=root / "run",
        width=16,
        batch_size=12,
        epochs=30,
        learning_rate=3e-3,
        shift=0,
        **options,
    )
    (root / "images").rename(root / "moved")
    return root


def test_a_run_is_used_without_its_data(shapes):
    run = infocapsgan.load(str(shapes / "run"), device="cpu")
    assert run.class_names == ("cross", "square")
    assert run.system.image_shape == (1, 28, 2)
    paths = [shapes / "moved" / name / f"{number}.png" for name in run.class_names for number in range(4)]
    found = run.predict(paths)
    assert found.names == ["cross"] * 4 + ["square"] * 4
    assert found.labels.tolist() == [0] * 4 + [1] * 4
    assert found.probabilities.shape == (8, 2)
    assert found.class_names == run.class_names
    assert (found.probabilities >= 0).all()
    assert (found.probabilities < 1).all()
    assert torch.equal(found.probabilities.argmax(dim=1), found.labels)
    assert run.reconstruct(paths).shape == (8, 1, 28, 28)
    primary, classes = run.capsules(paths[0])
    assert (primary.shape[::2], classes.shape) == ((1, 8), (1, 2, 16))
    torch.testing.assert_close(classes.norm(dim=2), found.probabilities[:1])


def test_images_of_every_kind_are_the_same_images(shapes):
    run, path = infocapsgan.load(shapes / "run", device="cpu"), shapes / "moved" / "square" / "3.png"
    wanted = run.predict(path).probabilities
    picture = Image.open(path)
    array = np.asarray(picture)
    colour = np.repeat(array[None], 3, axis=0)
    unit = torch.from_numpy(array / 255)
    for images in (
        str(path),
        picture,
        picture.convert("RGB"),
        array,
        torch.from_numpy(array.copy()),
        [path],
        colour,
        unit,
    ):
        torch.testing.assert_close(run.predict(images).probabilities, wanted, atol=2e-3, rtol=0)
    assert run.predict([path, picture, array[None]]).names == ["square"] * 3
    with pytest.raises(DataError, match="none.png cannot be read as an image"):
        run.predict("none.png")
    with pytest.raises(TypeError, match="images: got dict"):
        run.predict({})


def test_the_split_and_the_folder_are_in_the_run(shapes):
    config = json.loads((shapes / "run" / "config.json").read_text())
    assert config["settings"]["data_dir"] == str(shapes / "images")
    assert {part: len(files) for part, files in config["split"].items()} == {"train": 48, "test": 12}
    assert set(config["split"]["test"]) < {f"{c}/{n}.png" for c in ("cross", "square") for n in range(30)}


def test_predict_prints_a_table_or_json(shapes, monkeypatch, capsys):
    paths = [str(shapes / "moved" / name / "0.png") for name in ("square", "cross")]

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["predict", str(shapes / "run"), *words, "--device", "cpu"])
        predict.main()
        return capsys.readouterr().out

    lines = run(*paths).splitlines()
    assert [line.split()[:2] for line in lines] == [[paths[0], "square"], [paths[1], "cross"]]
    rows = json.loads(run(*paths, "--json"))
    assert [row["class"] for row in rows] == ["square", "cross"]
    assert rows[0]["probabilities"].keys() == {"cross", "square"}
    assert f"{rows[0]['probabilities']['square']:.3f}" in lines[0]
    with pytest.raises(SystemExit, match="^error: none.png cannot be read as an image"):
        run("none.png")


@pytest.mark.parametrize("name", ["infocapsgan", "infogan"])
def test_class_codes_have_the_names_of_the_classes_they_were_matched_with(name, trained_as):
    run = trained_as(name)
    matched = run.system.label_of_code.tolist()
    assert sorted(matched) == list(range(10))
    images = run.dataset.test_images[:20]
    found = run.predict(images)
    codes = run.system.cluster(images)
    assert found.labels.tolist() == [matched[code] for code in codes.tolist()]
    assert found.names == [str(label) for label in found.labels.tolist()]
    for code in range(10):
        assert torch.equal(
            found.probabilities[:, matched[code]], run.system.code_probabilities(images)[:, code]
        )
    summary = json.loads((run.path / "summary.json").read_text())["metrics"]
    accuracy = (run.predict(run.dataset.test_images).labels == run.dataset.test_labels).double().mean()
    assert accuracy == pytest.approx(summary["unsupervised_accuracy"])
    # Without a label for each code, codes are what is predicted.
    run.system.label_of_code[3] = -1
    found = run.predict(images)
    assert found.labels.tolist() == codes.tolist()
    names = [str(label) for label in matched]
    assert found.class_names == (*names[:3], "code 3", *names[4:])


def test_samples_of_a_label_are_those_of_its_code(trained_as):
    run = trained_as("infogan")
    matched = run.system.label_of_code.tolist()
    threes = run.sample(5, label=3)
    assert threes.shape == (5, 1, 28, 28)
    assert 0 <= threes.min() <= threes.max() <= 1
    assert torch.equal(threes, run.sample(5, code=matched.index(3)))
    assert torch.equal(threes, run.sample(5, label="3"))
    assert not torch.equal(threes, run.sample(5, label=3, seed=1))
    assert not torch.equal(threes, run.sample(5, label=4))
    left, right = (run.sample(2, code=1, codes=[value, 0.0]) for value in (-1, 1))
    assert not torch.equal(left, right)
    assert torch.equal(left, run.sample(2, code=1, codes=torch.tensor([[-1.0, 0.0]] * 2)))
    assert run.sample().shape == (1, 1, 28, 28)
    run.system.label_of_code[:] = -1
    for options, message in (
        ({"label": 3}, "label: got 3, takes none: its codes were matched with no labels"),
        ({"code": 10}, "code: got 10, takes 0 to 9"),
        ({"code": 1.5}, "code: got 1.5, takes 0 to 9"),
        ({"codes": [float("nan"), 0.0]}, r"codes: got shape \[2\], takes .* of finite numbers"),
        ({"code": 1, "label": 1}, "label and code exclude one another"),
        ({"codes": [1.0]}, r"codes: got shape \[1\], takes \[2\] or \[1, 2\]"),
        ({"number": 0}, "number: got 0, takes at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            run.sample(**options)


def test_what_a_system_cannot_do_says_which_can(trained_as):
    image = torch.zeros(1, 1, 28, 28)
    for name, call, message in (
        ("capsnet", lambda run: run.sample(), "sample does not apply to this capsnet: .* infogan"),
        (
            "mimic",
            lambda run: run.sample(),
            "sample does not apply to this mimic: it generates no images from noise",
        ),
        ("dcgan", lambda run: run.sample(code=1), "label, code: this dcgan has no class code"),
        ("infocapsgan", lambda run: run.sample(codes=[0]), "codes: this infocapsgan has no continuous codes"),
        (
            "dcgan",
            lambda run: run.predict(image),
            "it is not trained with labels and it has no class code; it applies to capsnet, .*infogan",
        ),
        ("encoder", lambda run: run.reconstruct(image), "reconstruct does not apply .* capsnet, mimic"),
        (
            "infogan",
            lambda run: run.capsules(image),
            "capsules does not apply to this infogan: it has no capsules",
        ),
    ):
        with pytest.raises(NotApplicableError, match=message):
            call(trained_as(name))
    assert trained_as("mimic").reconstruct(image).shape == image.shape


def test_pictures_without_labels(tmp_path, cache, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for number in range(40):
        picture = rng.integers(0, 255, (48, 40, 3)).astype(np.uint8)
        Image.fromarray(picture).save(tmp_path / "pictures" / f"{number}.png")
    options = {
        "categorical_codes": 2,
        "values": 5,
        "warm_up": 1,
        "width": 8,
        "batch_size": 8,
        "device": "cpu",
    }
    run = infocapsgan.train(
        "infogan",
        dataset="folder",
        data_dir=tmp_path / "pictures",
        out=tmp_path / "run",
        max_steps=2,
        **options,
    )
    assert "no labels" in capsys.readouterr().err
    summary = json.loads((run.path / "summary.json").read_text())
    assert not {"unsupervised_accuracy", "nmi", "ari"} & summary["metrics"].keys()
    assert not summary["baselines"]
    assert run.system.image_shape[:2] == (3, 32)
    found = run.predict(tmp_path / "pictures" / "0.png")
    assert found.names == [f"code {found.labels.item()}"]
    assert found.class_names == ("code 0", "code 1", "code 2", "code 3", "code 4")
    assert run.sample(3, code=4).shape == (3, 3, 32, 32)
    metrics = evaluate.evaluate(run, samples=100)["metrics"]
    assert metrics.keys() == {"frechet_distance", "sample_precision", "sample_recall"}
    for kind in ("grid", "traverse", "morph", "curves"):
        assert visualize.visualize(run, kind).exists()


def test_pairs_of_digits_are_predicted_as_pairs(tmp_path):
    system = CapsNet(dataset="multi-mnist", width=8).eval().requires_grad_(False)
    system.class_names = tuple("abcdefghij")
    run = trained.LoadedRun(tmp_path, "capsnet", system, trained.Weights(tmp_path, 1), torch.device("cpu"))
    found = run.predict(torch.rand(3, 1, 36, 36))
    two = found.probabilities.topk(2, dim=1).indices.sort(dim=1).values
    assert torch.equal(found.labels, two)
    assert found.names == ["+".join("abcdefghij"[j] for j in pair) for pair in two.tolist()]


def test_train_in_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"width": 8, "batch_size": 8, "device": "cpu"}
    run = infocapsgan.train("encoder", max_steps=2, out="run", **options)
    assert (run.name, run.weights.step, run.path.name) == ("encoder", 2, "run")
    assert infocapsgan.train(resume="run", max_steps=3).weights.step == 3
    importlib.import_module("infocapsgan.train")  # after which the name is that of a module

    assert infocapsgan.train("encoder", max_steps=1, out=tmp_path / "other", **options).weights.step == 1
    assert infocapsgan.load("other", device="cpu").weights.step == 1
    for options, error, message in (
        ({"system": "resnet"}, ValueError, "system: got 'resnet', takes one of capsnet"),
        ({"depth": 3}, TypeError, "depth"),
        ({"width": 2.5}, ValueError, "--width: got 2.5"),
        ({"resume": "run", "width": 8}, TypeError, "width: cannot be changed when a run is resumed"),
        ({"resume": "none"}, RunError, "none is not a run directory"),
    ):
        with pytest.raises(error, match=message):
            infocapsgan.train(**options)


def test_a_run_is_loaded_in_a_process_that_imports_nothing_else(run_of):
    code = (
        "import infocapsgan, sys; print(infocapsgan.load(sys.argv[1], device='cpu').sample(2, label=3).shape)"
    )
    command = [sys.executable, "-c", code, str(run_of("infogan"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "torch.Size([2, 1, 28, 28])\n"


@needs_newer_exporter
@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("capsnet", "images → probabilities"),
        slow("encoder", "images → probabilities"),
        slow("infocapsgan", "images → probabilities"),
        slow("infogan", "images → probabilities"),
        slow("dcgan", "latents → images"),
        slow("capsulegan", "latents → images"),
        ("mimic", "images → reconstructions"),
    ],
)
def test_export_computes_what_torch_does(name, line, run_of, tmp_path, monkeypatch, capsys):
    path = tmp_path / "model.onnx"
    monkeypatch.setattr(sys, "argv", ["export", str(run_of(name)), "--out", str(path)])
    export.main()
    assert line in capsys.readouterr().out
    run = trained.load(run_of(name), device="cpu")
    network = export.Inference(run.system)
    inputs = network.example(5, 2)
    session = onnxruntime.InferenceSession(path.read_bytes())
    (result,) = session.run(None, {network.input: inputs.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(result), network(inputs), atol=1e-4, rtol=0)


@needs_newer_exporter
def test_a_wrong_export_is_not_written(trained_as, run_of, tmp_path, monkeypatch):
    network = export.Inference(trained_as("encoder").system)
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(export.ExportError, match="differs from torch's by .*: not written"):
        export.export(network, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_an_export_that_cannot_be(run_of, trained_as, tmp_path, monkeypatch):
    network = export.Inference(trained_as("encoder").system)

    def fails(*_, **__):
        raise torch.onnx.OnnxExporterError("too old")

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(export.ExportError, match="torch .* cannot export it: too old"):
        export.export(network, tmp_path / "model.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(export.ExportError, match=r"pip install 'capsops\[onnx\]'"):
        export.export(network, tmp_path / "model.onnx")
    monkeypatch.setattr(sys, "argv", ["export", str(run_of("encoder")), "--out", str(tmp_path / "x.onnx")])
    with pytest.raises(SystemExit, match=r"^error: .* install it by `pip install 'capsops\[onnx\]'`$"):
        export.main()
