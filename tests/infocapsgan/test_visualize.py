import itertools
import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from infocapsgan import data, metrics, visualize
from infocapsgan.data.multi_mnist import of_digits
from infocapsgan.engine import loaded_run as trained
from infocapsgan.engine.checkpoint import save_best
from infocapsgan.engine.loaded_run import LoadedRun, Weights
from infocapsgan.engine.rng import ShardedGenerator
from infocapsgan.metrics.codes import traversal
from infocapsgan.models.decoders import FullyConnectedDecoder
from infocapsgan.plotting import kinds
from infocapsgan.plotting import primary as primary_module
from infocapsgan.plotting.animate import animate, kept_pictures
from infocapsgan.plotting.curves import curves
from infocapsgan.plotting.figures import sheet_figure
from infocapsgan.plotting.grid import grid
from infocapsgan.plotting.mistakes import mistakes
from infocapsgan.plotting.morph import morph
from infocapsgan.plotting.primary import couplings_to_predicted, primary, primary_decoder
from infocapsgan.plotting.reconstruct import reconstruct
from infocapsgan.plotting.rotate import rotate, rotated
from infocapsgan.plotting.sheet import Sheet
from infocapsgan.plotting.traverse import traverse
from infocapsgan.plotting.tweak import tweak
from infocapsgan.systems import SYSTEMS, CapsNet, NotApplicableError
from tests.tiers import slow

APPLIES = {
    "infocapsgan": {"grid", "traverse", "morph", "mistakes", "animate", "curves"},
    "infogan": {"grid", "traverse", "morph", "mistakes", "animate", "curves"},
    "mimic": {"morph", "reconstruct", "animate", "curves"},
    "capsulegan": {"grid", "traverse", "morph", "animate", "curves"},
    "dcgan": {"grid", "traverse", "morph", "animate", "curves"},
    "capsnet": {"tweak", "reconstruct", "rotate", "primary", "mistakes", "animate", "curves"},
    "encoder": {"rotate", "mistakes", "animate", "curves"},
}


def sheets(figure):
    """The pictures in a figure, each uint8 [H, W, 3]."""
    images = [np.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.images]
    return [np.round(image * 255).astype(np.uint8) if image.dtype != np.uint8 else image for image in images]


def cells(figure, columns, size=28, gap=2, number=0):
    """The images of a sheet without captions [rows][columns]."""
    picture, step = sheets(figure)[number][:, :, 0], size + gap
    rows = picture.shape[0] // step
    assert picture.shape[1] == columns * step
    return [
        [picture[r * step : r * step + size, c * step : c * step + size] for c in range(columns)]
        for r in range(rows)
    ]


def ticks(axes):
    found = axes.get_xticklabels(), axes.get_yticklabels()
    return [[label.get_text() for label in labels] for labels in found]


@pytest.mark.parametrize(
    ("system", "kind"),
    [
        # A mimic, CapsuleGAN and DCGAN draw as InfoGAN does, and curves are the same for all.
        slow(system, kind)
        if system in ("mimic", "capsulegan", "dcgan") or (kind == "curves" and system != "capsnet")
        else (system, kind)
        for system, kind in itertools.product(SYSTEMS, kinds())
    ],
)
def test_every_kind_is_drawn_or_says_why_not(system, kind, trained_as, tmp_path):
    run = trained_as(system)
    path = tmp_path / f"{kind}.png"
    options = {"steps": 2} if kind == "primary" else {}
    if kind not in APPLIES[system]:
        with pytest.raises(NotApplicableError, match=kind):
            visualize.visualize(run, kind, path, **options)
        assert not path.exists()
        return
    assert visualize.visualize(run, kind, path, **options) == path
    picture = Image.open(path)
    assert min(picture.size) > 150
    assert np.asarray(picture.convert("L")).std() > 10


def test_a_sheet_by_hand():
    images = torch.zeros(3, 1, 4, 4)
    images[1] = 1.0
    figure = sheet_figure("title", Sheet(images, 2, ["a", "b"], ["x", "y"], xlabel="across"))
    (picture,) = sheets(figure)
    assert picture.shape == (12, 12, 3)
    assert (picture[:4, :4] == 0).all()
    assert (picture[:4, 6:10] == 255).all()
    assert (picture[6:10, :4] == 0).all()
    assert (picture[6:, 6:] == 255).all()  # no fourth image
    (axes,) = figure.axes
    assert ticks(axes) == [["x", "y"], ["a", "b"]]
    assert (axes.get_xlabel(), axes.get_title()) == ("across", "title")


def test_rows_of_the_grid_are_class_codes(trained_as):
    run = trained_as("infocapsgan")
    figure = grid(run)
    images = cells(figure, 10)
    assert not np.array_equal(images[0][0], images[1][0])
    assert not np.array_equal(images[0][0], images[0][1])
    assert figure.axes[0].get_ylabel() == "class code (class)"
    assert run.title in figure.axes[0].get_title()
    again, other = sheets(grid(run))[0], sheets(grid(run, seed=1))[0]
    assert np.array_equal(again, sheets(figure)[0])
    assert not np.array_equal(other, again)


def test_each_continuous_code_has_a_sheet(trained_as):
    run = trained_as("infogan")
    figure = traverse(run)
    assert len(figure.axes) == 2
    for index, axes in enumerate(figure.axes):
        assert f"continuous code {index}" in axes.get_xlabel()
        assert ticks(axes)[0] == ["-2", "-1.5", "-1", "-0.5", "0", "0.5", "1", "1.5", "2"]
        images = cells(figure, 9, number=index)
        assert not np.array_equal(images[3][0], images[3][8])
    # In the middle of its range a code is 0, and the rest of the row is as in the first column.
    system = run.system
    rows = torch.arange(10)
    latents = traversal(system, 1, torch.tensor([-1.0, 0.0, 1.0]), rows, ShardedGenerator(0))
    latents = latents.view(10, 3, -1)
    assert torch.equal(latents[:, :, -1], torch.tensor([-1.0, 0, 1]).expand(10, 3))
    assert torch.equal(latents[:, 0, :-1], latents[:, 2, :-1])


def test_noise_is_traversed_where_there_is_no_continuous_code(trained_as):
    run = trained_as("infocapsgan")
    first, other = (traverse(run, code=code) for code in (0, 7))
    images = cells(first, 9)
    assert not np.array_equal(images[0][0], images[0][8])
    assert not np.array_equal(sheets(first)[0], sheets(other)[0])
    assert "class code 7" in other.axes[0].get_title()
    with pytest.raises(NotApplicableError, match="--code: got 10, takes 0 to 9"):
        traverse(run, code=10)


def test_lines_go_from_one_class_code_to_the_next(trained_as):
    figure = morph(trained_as("infocapsgan"))
    images = cells(figure, 11)
    for j in range(10):
        assert np.array_equal(images[j][10], images[(j + 1) % 10][0])
        assert not np.array_equal(images[j][0], images[j][5])
    names = trained_as("infocapsgan").system.code_names
    assert [name.split(" ")[0] for name in names] == list("0123456789")  # each with its class
    assert ticks(figure.axes[0])[1][9] == f"{names[9]} → {names[0]}"
    assert ticks(figure.axes[0])[0][3] == "0.3"


def test_tweaks_leave_the_middle_column_as_it_was(trained_as):
    run = trained_as("capsnet")
    figure = tweak(run, image=3)
    images = cells(figure, 12)
    assert len(images) == 16
    assert all(np.array_equal(row[6], images[0][6]) for row in images)
    assert any(not np.array_equal(row[1], row[11]) for row in images)
    with torch.no_grad():
        pixels = run.dataset.test_images[3:4].float() / 255
        rebuilt = run.system.model(pixels)[1]
    assert np.abs(images[0][6].astype(int) - (rebuilt[0, 0].numpy() * 255)).max() <= 1
    assert np.array_equal(images[5][0], run.dataset.test_images[3, 0].numpy())
    assert ticks(figure.axes[0])[0][1] == "-0.25"
    with pytest.raises(NotApplicableError, match="--image: got 360, takes 0 to 359"):
        tweak(run, image=360)


def test_a_tweak_is_added_as_its_head_says(trained_as):
    run = trained_as("capsnet")
    given = []
    run.system.model.decoder.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    heads = ticks(tweak(run).axes[0])[0]
    changed = given[0].view(16, 11, 10, 16)
    change = changed - changed[:, 5:6]
    predicted = changed[0, 5].norm(dim=1).argmax()
    for number in range(16):
        wanted = torch.tensor([float(head) for head in heads[1:]])
        torch.testing.assert_close(change[number, :, predicted, number], wanted)
    assert change.count_nonzero() == 16 * 10


def test_an_image_is_turned_counter_clockwise():
    image = torch.zeros(1, 1, 3, 3)
    image[0, 0, 0, 1] = 1  # above the middle
    turned = rotated(image, torch.tensor([0, 90, 180, 270]))[:, 0]
    for place, (row, column) in enumerate([(0, 1), (1, 0), (2, 1), (1, 2)]):
        assert turned[place, row, column] == pytest.approx(1, abs=1e-5)


def test_every_angle_is_drawn(trained_as):
    figure = rotate(trained_as("capsnet"), degrees=30)
    curve, axes = figure.axes
    assert len(curve.lines[0].get_xdata()) == 12
    first = cells(figure, 12)
    assert len(first) == 2
    assert not np.array_equal(first[0][0], first[0][3])
    assert [text.split("°")[0] for text in ticks(axes)[0]] == [str(angle) for angle in range(0, 360, 30)]
    assert len(rotate(trained_as("encoder"), degrees=25).axes) == 3


def test_a_primary_capsule_is_scaled_from_left_to_right(run_of, tmp_path, monkeypatch, capsys):
    run = trained.load(shutil.copytree(run_of("capsnet"), tmp_path / "run"), device="cpu")
    figure = primary(run, steps=30)
    assert "training the decoder of primary capsules: 100%" in capsys.readouterr().err
    images = cells(figure, 11)
    assert len(images) == 10
    assert np.array_equal(images[0][1], images[9][1])  # scaled by 0, all are the same
    assert not np.array_equal(images[0][1], images[0][10])
    assert not np.array_equal(images[0][10], images[9][10])
    # The decoder is kept; another number of steps is another decoder.
    monkeypatch.setattr(primary_module, "_train", None)
    assert np.array_equal(sheets(primary(run, steps=30))[0], sheets(figure)[0])
    with pytest.raises(TypeError):
        primary(run, steps=31)


@pytest.mark.parametrize("stem", ["single", "stacked"])
def test_primary_capsules_are_named_by_their_place(stem, tmp_path, monkeypatch):
    system = CapsNet(width=16, stem=stem).eval().requires_grad_(False)
    run = LoadedRun(tmp_path, "capsnet", system, Weights(tmp_path, 1), torch.device("cpu"))
    u = system.model.encoder(torch.rand(1, 1, 28, 28)).primary
    decoder = FullyConnectedDecoder(u[0].numel(), 1, 28).eval().requires_grad_(False)
    monkeypatch.setattr(primary_module, "primary_decoder", lambda *given: (decoder, 1.0))
    coupling = torch.zeros(u.shape[:2])
    # On a grid of 6 × 6: the first type's last place, then the second type's in row 1, column 2.
    coupling[0, 35], coupling[0, 36 + 6 + 2] = 0.9, 0.5
    monkeypatch.setattr(
        primary_module, "couplings_to_predicted", lambda *given: (coupling, torch.zeros(1).long())
    )
    monkeypatch.setattr(primary_module, "lengths", lambda u: torch.ones(u.shape[:-1]))
    rows = ticks(primary(run).axes[0])[1]
    assert rows[:2] == ["type 0, row 5, column 5: 0.90", "type 1, row 1, column 2: 0.50"]


def test_other_weights_of_the_same_name_have_another_decoder(run_of, tmp_path, monkeypatch):
    path = shutil.copytree(run_of("capsnet"), tmp_path / "run")
    trainings = []
    monkeypatch.setattr(primary_module, "_train", lambda *given: trainings.append(given) or 0.5)
    for step, count in ((1, 1), (1, 1), (2, 2)):
        system = trained.load(path, device="cpu").system
        system.model.encoder.conv.bias.fill_(step)
        save_best(path / "checkpoints", system, step, 1 / step)
        run = trained.load(path, device="cpu")
        primary_decoder(run, 30)
        assert len(trainings) == count


def test_couplings_to_the_predicted_class(trained_as):
    system, u = trained_as("capsnet").system, torch.randn(3, 36, 8)
    run, predicted = couplings_to_predicted(system, u)
    layer = system.model.encoder.classes
    u_hat = torch.einsum("ijdk,bik->bijd", layer.weight, u)
    logits, wanted = torch.zeros(3, 36, 10), None
    for _ in range(3):
        wanted = logits.softmax(2)
        s = (wanted[..., None] * u_hat).sum(1) + layer.bias
        r = s.norm(dim=-1, keepdim=True)
        v = s * r / (1 + r**2)
        logits = logits + (u_hat * v[:, None]).sum(-1)
    assert torch.equal(predicted, v.norm(dim=-1).argmax(1))
    torch.testing.assert_close(run, wanted[torch.arange(3), :, predicted])


def test_a_primary_decoder_is_trained_on_capsules_scaled_by_their_coupling(trained_as, monkeypatch):
    run, given, capsules = trained_as("capsnet"), [], []

    def couplings_to(system, u):
        capsules.append(u)
        return torch.full(u.shape[:2], 0.25), None

    monkeypatch.setattr(primary_module, "couplings_to_predicted", couplings_to)
    decoder = FullyConnectedDecoder(36 * 8, 1, 28)
    decoder.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    assert primary_module._train(decoder, run, 1) == 0.25
    chosen = given[0].norm(dim=2) > 0
    assert (chosen.sum(dim=1) == 1).all()
    torch.testing.assert_close(given[0][chosen], 0.25 * capsules[0][chosen])


def test_reconstructions_come_from_the_label_of_their_row(trained_as, monkeypatch):
    run = trained_as("capsnet")
    labels = run.dataset.test_labels[:3]
    guess = (labels + 1) % 10
    monkeypatch.setattr(run.system, "predicted", lambda capsules, labels: guess)
    given = []
    run.system.model.decoder.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    heads, rows = ticks(reconstruct(run, images=3).axes[0])
    assert heads == [f"{true}\n{taken}" for true, taken in zip(labels, guess, strict=True)]
    assert rows == ["image", "from the true label", "from the predicted label"]
    true, taken = (capsule.view(3, 10, 16).norm(dim=2).argmax(dim=1) for capsule in given)
    assert torch.equal(true, labels)
    assert torch.equal(taken, guess)


def test_reconstructions_name_both_labels(trained_as):
    run = trained_as("capsnet")
    figure = reconstruct(run, images=7)
    assert len(cells(figure, 7)) == 3
    labels = run.dataset.test_labels[:7].tolist()
    assert [text.split("\n")[0] for text in ticks(figure.axes[0])[0]] == [str(label) for label in labels]
    copies = reconstruct(trained_as("mimic"), images=4)
    assert ticks(copies.axes[0])[1] == ["image", "reconstruction"]


def test_pairs_of_digits(tmp_path, monkeypatch):
    digits = data.load("digits")
    splits = digits.train_images, digits.train_labels, digits.test_images, digits.test_labels
    pairs = of_digits(*splits, test_pairs=20)
    monkeypatch.setattr(LoadedRun, "dataset", pairs)
    system = CapsNet(dataset="multi-mnist", width=8).eval().requires_grad_(False)
    run = LoadedRun(tmp_path, "capsnet", system, Weights(tmp_path, 1), torch.device("cpu"))
    figure = reconstruct(run, images=3)
    assert len(cells(figure, 3, size=36)) == 5
    assert "+" in ticks(figure.axes[0])[0][0]
    assert "20 test images" in mistakes(run).axes[0].get_title()
    for view in (tweak, rotate, primary):
        with pytest.raises(NotApplicableError, match="does not apply to pairs of digits"):
            view(run)


def test_mistakes_are_those_of_the_confusion_matrix(trained_as):
    run = trained_as("encoder")
    figure = mistakes(run, images=12)
    dataset = run.dataset
    predicted = run.system.test_predictions(dataset)["predicted"]
    wrong = (predicted != dataset.test_labels).nonzero()[:, 0]
    axes = figure.axes[0]
    assert f"{len(wrong)} of 360 test images" in axes.get_title()
    captions = [text.get_text() for text in axes.texts]
    assert captions == [f"{dataset.test_labels[i]} → {predicted[i]}" for i in wrong[:12]]


def test_mistakes_of_clusters_that_are_matched_on_the_training_split(trained_as, monkeypatch):
    run = trained_as("infogan")
    images = torch.tensor([0, 0, 1, 1], dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 28, 28)
    splits = images, torch.tensor([1, 1, 0, 0]), images, torch.tensor([0, 0, 1, 0])
    monkeypatch.setattr(LoadedRun, "dataset", data.Dataset("small", *splits))
    monkeypatch.setattr(run.system, "cluster", lambda images: images[:, 0, 0, 0].long())
    captions = [text.get_text() for text in mistakes(run).axes[0].texts]
    assert captions == ["0 → 1", "0 → 1", "1 → 0"]


def test_labels_are_words_where_the_data_have_words(trained_as, monkeypatch):
    encoder, capsnet = trained_as("encoder"), trained_as("capsnet")
    for run in (encoder, capsnet):
        monkeypatch.setattr(run.system, "class_names", ("a long word",) * 10)
    captions = [text.get_text() for text in mistakes(encoder).axes[0].texts]
    assert set(captions) == {"a long word\n→ a long word"}
    assert set(ticks(reconstruct(capsnet).axes[0])[0]) == {"a long word\na long word"}


def test_no_mistake_is_no_picture(trained_as, monkeypatch):
    run = trained_as("encoder")
    right = {"predicted": run.dataset.test_labels}
    monkeypatch.setattr(run.system, "test_predictions", lambda dataset: right)
    with pytest.raises(NotApplicableError, match="the prediction is right for every test image"):
        mistakes(run)


def test_an_animation_has_a_frame_for_each_picture(run_of, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(run_of("infogan"), tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["visualize", str(run), "animate", "--device", "cpu"])
    visualize.main()
    assert "animate.gif" in capsys.readouterr().out
    gif = Image.open(run / "pictures" / "animate.gif")
    assert gif.n_frames == 2
    frames = []
    for number in range(2):
        gif.seek(number)
        frames.append(np.asarray(gif.convert("L")).astype(int))
    assert np.abs(frames[0] - frames[1]).max() > 50

    run = trained.load(run, device="cpu")
    assert list(kept_pictures(run.path)) == ["continuous_code_0", "continuous_code_1", "samples"]
    frames = animate(run, pictures="continuous_code_1")
    assert len(frames) == 2
    assert len({frame.size for frame in frames}) == 1
    with pytest.raises(NotApplicableError, match="--pictures: got x, takes one of continuous_code_0, "):
        animate(run, pictures="x")
    shutil.rmtree(run.path / "samples")
    with pytest.raises(NotApplicableError, match="samples holds no pictures"):
        animate(run)


def test_curves_hold_every_number(trained_as):
    run = trained_as("infocapsgan")
    figure = curves(run)
    labels = {line.get_label() for axes in figure.axes for line in axes.lines}
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    names = {name for row in rows for name in row} - {"kind", "step", "epoch"}
    labels |= {label.split(" ↑")[0].split(" ↓")[0].split(" (")[0] for label in labels}
    assert {name.replace("_", " ") for name in names} <= labels
    assert any(label.startswith("information ↑") for label in labels)
    assert any(label.startswith("k-means") for label in labels)


def test_runs_are_compared(trained_as, run_of, tmp_path, monkeypatch):
    others = []
    for name, values in (("dcgan", (30.0, 9.0, 12.0)), ("dcgan", (40.0, 20.0, 15.0)), ("capsulegan", (8.0,))):
        path = tmp_path / f"{name}-{len(others)}"
        path.mkdir()
        shutil.copy(run_of(name) / "config.json", path)
        rows = [
            {"kind": "evaluation", "step": 2 * n, "epoch": n / 2, "distance": d} for n, d in enumerate(values)
        ]
        rows.append({"kind": "train", "step": 9, "epoch": 9.0, "loss": 0.5, "distance": 1.0})
        (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        others.append(path)
    monkeypatch.setattr(metrics, "LOWER_IS_BETTER", {"distance"})
    run = replace(trained_as("dcgan"), path=others[0])
    figure = curves(run, metric="distance", beside=others[1:], reach=[10, 2])
    (axes,) = figure.axes
    assert [list(line.get_ydata()) for line in axes.lines[:3]] == [[30, 9, 12], [40, 20, 15], [8]]
    assert list(axes.lines[0].get_xdata()) == [0, 0.5, 1]
    assert len({line.get_color() for line in axes.lines[:2]}) == 1
    assert len({line.get_linestyle() for line in axes.lines[:2]}) == 2
    assert axes.lines[2].get_color() != axes.lines[0].get_color()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "dcgan on digits: dcgan-0\n10 in epoch 0.5\n2 in epoch –",
        "dcgan on digits: dcgan-1\n10 in epoch –\n2 in epoch –",
        "capsulegan on digits: capsulegan-2\n10 in epoch 0\n2 in epoch –",
    ]
    (axes,) = curves(run, metric="distance", beside=others[1:2]).axes
    assert len({line.get_color() for line in axes.lines}) == 2  # of one system, a colour a run
    with pytest.raises(NotApplicableError, match="--reach: neither more nor less of loss is better"):
        curves(run, metric="loss", reach=[1])
    with pytest.raises(NotApplicableError, match="--metric: .* holds no size"):
        curves(run, metric="size")
    with pytest.raises(NotApplicableError, match="--beside, --reach: take --metric"):
        curves(run, reach=[1])


def test_errors_of_the_command(tmp_path, run_of, monkeypatch, capsys):
    def fails(*words):
        monkeypatch.setattr(sys, "argv", ["visualize", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            visualize.main()
        return f"{caught.value.code} {capsys.readouterr().err}"

    assert "error: " in fails(tmp_path, "grid")
    assert "is not a run directory" in fails(tmp_path, "grid")
    out = tmp_path / "none" / "x.png"
    (tmp_path / "none").write_text("a file")
    assert f"error: {tmp_path / 'none'} cannot be written: " in fails(run_of("dcgan"), "grid", "--out", out)
    message = "error: grid does not apply to this capsnet: it generates no images from noise"
    assert message in fails(run_of("capsnet"), "grid")
    assert "invalid choice: 'photo'" in fails(tmp_path, "photo")
    assert "--image: got x, takes a whole number" in fails(tmp_path, "tweak", "--image", "x")
    assert "--degrees: got 0, takes a whole number of at least 1" in fails(
        tmp_path, "rotate", "--degrees", "0"
    )
    for kind, out, takes in (
        ("grid", "a.jpg", "png"),
        ("animate", "a.png", "gif"),
        ("grid", tmp_path, "png"),
    ):
        assert f"--out: got {out}, takes a file that ends in .{takes}" in fails(tmp_path, kind, "--out", out)


def test_images_without_labels_hold_no_mistakes(trained_as, monkeypatch):
    digits = data.load("digits")
    labels = torch.zeros_like(digits.train_labels)
    monkeypatch.setattr(LoadedRun, "dataset", replace(digits, train_labels=labels))
    with pytest.raises(NotApplicableError, match="mistakes does not apply .* its images have no labels"):
        mistakes(trained_as("infogan"))


def test_held_out_images_have_curves_of_their_own(trained_as, tmp_path):
    rows = [
        {"kind": kind, "step": step, "epoch": step / 9, "squared_error": 3.0}
        for step in (1, 2)
        for kind in ("train", "validation", "evaluation")
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figure = curves(replace(trained_as("capsnet"), path=tmp_path))
    assert [axes.get_title() for axes in figure.axes if axes.get_visible()] == [
        "training batches: losses",
        "held-out training images: losses",
        "test images: losses",
    ]
    assert all(len(line.get_xdata()) == 2 for axes in figure.axes for line in axes.lines)
