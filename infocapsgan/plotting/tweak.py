"""How the reconstruction follows each number of the class capsule."""

import torch
from matplotlib.figure import Figure

from infocapsgan.engine.loaded_run import LoadedRun
from infocapsgan.engine.settings import Whole
from infocapsgan.plotting.figures import Sheet, sheet_figure
from infocapsgan.plotting.rotate import labelled_image

TWEAKS = torch.arange(-5, 6) * 0.05


def tweak(run: LoadedRun, *, image: Whole = 0) -> Figure:
    """Each number of an image's class capsule changed by −0.25 to 0.25, a row for each, and reconstructed.

    Args:
        image: number of the test image, from 0 on.
    """
    system = run.system
    pixels, label = labelled_image(run, "decode", "tweak", image)
    capsules = system.capsules(pixels).classes
    predicted = system.classify(pixels).argmax(dim=1)
    D, count = capsules.shape[2], len(TWEAKS)
    changed = capsules.repeat(D * count, 1, 1)
    change = torch.kron(torch.eye(D), TWEAKS[:, None]).to(run.device)  # [D · count, D]
    changed[:, int(predicted)] += change
    rebuilt = system.decode(changed, predicted.expand(len(changed))).unflatten(0, (D, count))
    images = torch.cat([pixels.expand(D, 1, *pixels.shape[1:]), rebuilt], dim=1).flatten(0, 1)
    heads = ["image", *(f"{value:+.2f}" if value else "0" for value in TWEAKS.tolist())]
    labels = "what is added to it", "number of the class capsule"
    sheet = Sheet(images, count + 1, [str(d) for d in range(D)], heads, *labels)
    subject = f"test image {image} ({system.class_name(label)}, predicted {system.class_name(predicted)})"
    return sheet_figure(f"{run.title}\n{subject}: each number of its class capsule changed", sheet)
