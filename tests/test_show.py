"""Tables, bars and figures."""

import pytest

from mlpool.show import aligned, figure, progress, save_figure


def test_a_table_is_aligned():
    text = aligned(["model", "score"], [["a", "0.5"], ["longer", "10.25"]])
    assert text.splitlines() == ["model   score", "a         0.5", "longer  10.25"]
    assert aligned(["a", "b"], [["x", "yy"]], left=2).splitlines() == ["a  b", "x  yy"]
    with pytest.raises(ValueError):  # noqa: PT011  (zip's own)
        aligned(["a", "b"], [["x"]])


def test_a_bar_is_silent_where_it_is_not_asked_for(capsys):
    with progress("work", "text", 3, shown=False) as bar:
        bar.update(3)
    assert capsys.readouterr().err == ""
    with progress("work", "text", 3, shown=True) as bar:
        bar.update(3)
    assert "work" in capsys.readouterr().err


def test_a_figure_is_written_whole(tmp_path):
    pytest.importorskip("matplotlib")
    fig = figure(2, 1)
    fig.subplots().plot([0, 1])
    save_figure(fig, tmp_path / "new/plot.png")
    assert (tmp_path / "new/plot.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["plot.png"]
