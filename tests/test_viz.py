"The drawings that several chapters share: they draw what they are told, whatever the text holds, and cost nothing to import."
import subprocess
import sys

import pytest
from PIL import Image

from nanollada.core import append_jsonl
from nanollada.viz import COLOURS, can_draw, chinese_font, draw_frame, draw_order, plot_losses, save_gif, save_loss_plot

ODD = ["$x", "y$", "a\ufffd", "\x1b[0m", "\\frac{", "猫", "two words and more", "", "\n"]


@pytest.fixture
def axis():
    from matplotlib.figure import Figure
    return Figure().subplots()


def test_importing_it_loads_no_plotting_library():
    code = "import sys, nanollada.viz; assert not [name for name in sys.modules if name.startswith('matplotlib')]"
    subprocess.run([sys.executable, "-c", code], check=True)


def colours(axis) -> list[str]:
    from matplotlib.colors import to_hex
    return [to_hex(patch.get_facecolor()) for patch in axis.patches]


def test_a_frame_shows_masks_and_what_is_new(axis):
    draw_frame(axis, ["a", None, "c", None], columns=3, before=["a", None, None, "d"])
    assert colours(axis) == ["#ffffff", "#c8c8c8", COLOURS[4].lower(), "#c8c8c8"]
    assert [text.get_text() for text in axis.texts] == ["a", "", "c", ""]
    axis.clear()
    draw_frame(axis, ["a", None])
    assert colours(axis) == ["#ffffff", "#c8c8c8"]


def test_an_order_is_dark_to_light_and_numbered(axis):
    draw_order(axis, ["late", "early", "middle"], [9, 1, 5])
    assert [text.get_text() for text in axis.texts] == ["late\n9", "early\n1", "middle\n5"]
    late, early, middle = (sum(patch.get_facecolor()[:3]) for patch in axis.patches)
    assert early < middle < late
    axis.clear()
    draw_order(axis, [], [])
    assert not axis.patches


def test_any_text_can_be_drawn(axis, tmp_path):
    "Formula signs, control characters, and letters that the fonts of this machine may lack."
    draw_order(axis, ODD, list(range(1, len(ODD) + 1)))
    axis.figure.savefig(tmp_path / "order.png")
    shown = [text.get_text() for text in axis.texts]
    assert shown[0] == "$x\n1" and shown[3] == "[0m\n4" and shown[5] == ("猫\n6" if chinese_font() else "·")
    assert can_draw("猫") == (chinese_font() is not None) and can_draw("cat")


def test_a_film_is_a_gif_and_a_file_that_fails_is_not_left(tmp_path):
    path = save_gif([[None, None], ["a", None], ["a", "$b"]], tmp_path / "film.gif")
    with Image.open(path) as gif:
        assert gif.format == "GIF" and gif.n_frames >= 3
    with pytest.raises(AttributeError):
        save_gif([[None], [3]], tmp_path / "bad.gif")
    assert [file.name for file in tmp_path.iterdir()] == ["film.gif"]


def test_losses_and_their_floor(axis, tmp_path):
    records = [{"split": split, "step": step, "seconds": 2 * step, "loss": 5 - step}
               for split in ("train", "valid") for step in range(3)]
    plot_losses(axis, {"ar": records, "diffusion": records[:3]}, floor=1.5, x="seconds")
    assert [line.get_label() for line in axis.lines] == [
        "ar, training", "ar", "diffusion, training", "entropy of the language"]
    assert list(axis.lines[1].get_xdata()) == [0, 2, 4] and list(axis.lines[-1].get_ydata()) == [1.5, 1.5]
    for record in records:
        append_jsonl(tmp_path / "metrics.jsonl", record)
    with Image.open(save_loss_plot(tmp_path, floor=1.5)) as picture:
        assert (picture.format, picture.size) == ("PNG", (700, 400))
