"The picture"
import math

import matplotlib.pyplot as plt, numpy as np, pytest
from fastai.learner import Recorder
from matplotlib.collections import FillBetweenPolyCollection
from matplotlib.figure import Figure

from fastai_bs_finder.all import *
from fastai_bs_finder.demo import digits_learner
from fastai_bs_finder.result import keep_result
from results import result


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close('all')


@pytest.fixture(scope='module')
def found():
    learn = digits_learner()
    with learn.no_bar(), learn.no_logging(): learn.bs_find(.1, 300, show_plot=False, profile=False)
    return learn


def recorder(*measured, bs=16, **suggested):
    "A recorder whose last result holds `(noise_scale, lo, hi, raw_scale)`"
    rec,(*rows,) = Recorder(),((x, lo, hi) for x,lo,hi,_ in measured)
    keep_result(rec, 'bs_result', result(*rows, raw=[10*raw for *_,raw in measured], bs=bs, suggested=suggested))
    return rec


def labels(ax): return [t.get_text() for t in ax.get_legend().get_texts()]


def test_shows_the_measurements(found):
    fig = found.recorder.plot_bs_find()
    assert isinstance(fig, Figure)
    ax,stats,suggested = fig.axes[0],found.recorder.bs_stats,found.recorder.bs_result.suggested
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_yscale()) == ('Batches seen', 'Noise scale (examples)', 'log')
    line = next(l for l in ax.lines if l.get_label() == 'noise scale')
    np.testing.assert_allclose(line.get_xydata(), stats[['batch', 'noise_scale']])
    points = next(l for l in ax.lines if l.get_label() == 'single measurements')
    shown = stats.raw_scale > 0
    np.testing.assert_allclose(points.get_ydata()[shown], (stats.raw_noise/stats.raw_scale)[shown])
    assert labels(ax) == ['noise scale', '95% interval', 'single measurements', f'critical: {suggested["critical"]}', 'in use: 16']
    heights = {l.get_label(): l.get_ydata()[0] for l in ax.lines if len(l.get_ydata())}
    assert heights['in use: 16'] == 16 and heights[labels(ax)[3]] == suggested['critical']


def test_draws_on_given_axes(found):
    fig,(left,right) = plt.subplots(1, 2)
    assert found.recorder.plot_bs_find(ax=right) is fig
    assert not left.lines and right.lines
    assert found.recorder.plot_bs_find(right) is fig


def test_bs_find_draws_on_request():
    learn = digits_learner()
    with learn.no_bar(), learn.no_logging():
        learn.bs_find(.1, 40, show_plot=False)
        assert plt.get_fignums() == []
        learn.bs_find(.1, 40)
    assert len(plt.get_fignums()) == 1


def band(ax):
    "Lower and upper ends of the band at its x values"
    pts = next(c for c in ax.collections if isinstance(c, FillBetweenPolyCollection)).get_paths()[0].vertices
    return {x: (pts[pts[:, 0] == x, 1].min(), pts[pts[:, 0] == x, 1].max()) for x in np.unique(pts[:, 0])}


def test_an_open_interval_reaches_the_top():
    ax = recorder((50, math.nan, math.nan, .02), (50, math.nan, math.nan, .02), (60, 40, 90, .02), (100, 50, math.inf, .02), critical=96).plot_bs_find().axes[0]
    ends = band(ax)
    assert set(ends) == {30, 40} and ends[30] == (40, 90) and ends[40] == (50, ax.get_ylim()[1])


def test_negative_estimates_leave_the_line_and_stay_in_the_picture():
    ax = recorder((50, math.nan, math.nan, .02), (-50, math.nan, math.nan, -.02), (60, 40, math.inf, 1e-9), critical=48).plot_bs_find().axes[0]
    bottom,top = ax.get_ylim()
    line = next(l for l in ax.lines if l.get_label() == 'noise scale').get_ydata()
    assert np.isnan(line[1]) and (line[[0, 2]] == [50, 60]).all()
    triangles = next(l for l in ax.lines if l.get_marker() == '^')
    assert triangles.get_xdata().tolist() == [20, 30] and (triangles.get_ydata() == top).all()
    assert 0 < bottom < 16 and 96 < top < 1000


@pytest.mark.parametrize('rec', [recorder((50, math.nan, math.nan, .02), critical=48), recorder((-50, math.nan, math.nan, -.02), critical=None), recorder(*[(5, 0, math.inf, .2)]*3, critical=None)])
def test_little_data_still_makes_a_picture(rec, tmp_path):
    fig = rec.plot_bs_find()
    fig.savefig(tmp_path/'x.png')
    assert (tmp_path/'x.png').stat().st_size > 5000


def test_without_a_result():
    with pytest.raises(ValueError, match='run learn.bs_find'): digits_learner().recorder.plot_bs_find()


@pytest.mark.slow
def test_a_notebook_shows_it_once(tmp_path):
    import nbformat
    from nbclient import NotebookClient
    cells = ['%matplotlib inline\nfrom fastai_bs_finder.all import *; from fastai_bs_finder.demo import digits_learner; learn = digits_learner()',
             'learn.bs_find(.1, 40)', 'learn.recorder.plot_bs_find()', 'fig = learn.recorder.plot_bs_find()', 'fig']
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    NotebookClient(nb, timeout=300, kernel_name='python3').execute()
    pictures = [sum('image/png' in o.get('data', {}) for o in c.outputs) for c in nb.cells]
    assert pictures == [0, 1, 1, 1, 1]
    assert 'SuggestedBS(critical=' in str(nb.cells[1].outputs) and 'The noise scale is' in str(nb.cells[1].outputs)
