"What is said of a result"
import math, re

import matplotlib.pyplot as plt, pytest
from hypothesis import given, strategies as st

from fastai_bs_finder.all import *
from fastai_bs_finder.demo import digits_learner
from fastai_bs_finder.result import keep_result
from fastai_bs_finder.words import as_lr
from fastai.learner import Recorder
from results import result

inf,nan = math.inf,math.nan
linear = {b: .004 + 2e-5*b for b in (16, 64, 256, 1024)}   # seconds: half of the throughput at 200 examples
known = (350, 300, 400),(400, 300, 500),(450, 350, 600)


def small(*rows, n=1500, bs=16, **facts): return result(*rows, n=n, bs=bs, **facts)


@pytest.mark.parametrize('found,bs,words', [
    (small((90, nan, nan), (95, 60, 130), (100, 80, 130)), 96,
     'is 100 examples (95% interval 80 to 130), measured with bs=16 at lr=0.1. bs=96 should reach the same loss in about 0.29 of the steps'),
    (small(*[(5, 3, 9)]*3), 6, 'bs=6 should reach the same loss with about 0.52 of the examples of bs=16, in about 1.4 times as many steps'),
    (small(*[(15, 10, 20)]*3), 16, 'bs=16 is about right: larger'),
    (small(*[(99, 80, 120)]*3, bs=100), 96, 'bs=100 is about right, and so is bs=96: larger'),
    (small(*[(500_000, 400_000, 600_000)]*3, bs=1024), 1024, 'A larger batch would do, but the training set has only 1,500 examples.'),
    (small(*[(500_000, 400_000, 600_000)]*3, bs=1), 1024, 'in about less than 0.01 of the steps of bs=1, '),
    (small(*[(90, nan, nan)]*30, beta=0.), 96,
     'is about 90 examples, measured with bs=16 at lr=0.1. beta=0.0 keeps too few of the 30 measurements to say how sure that is: raise beta'),
    (small(*[(-90, nan, nan)]*30, beta=0.), None, 'is not known yet'),
    (small(*[(90_000, 70_000, 110_000)]*3), 1024, 'is 90,000 examples'),
    (small(*[(90_000, 70_000, 110_000)]*3, n=None), 98304, 'bs=98304'),
    (small(*[(700, 100, inf)]*3), 96, 'is at least 100 examples (95% sure)'),
    (small(*[(-700, 100, inf)]*3), 96, 'num_it=400) or take more batches per measurement (n_batch=40)'),
    (small(*[(-700, 100, inf)]*30), 96, 'cannot tell: take more batches per measurement (n_batch=40)'),
    (small(*[(700, 100, inf)]*30, bs=64), 96, 'cannot tell: take more batches per measurement (n_batch=23)'),
    (small(*[(700, 200, inf)]*30, bs=150), 192, 'cannot tell: average over more measurements (beta=0.975, num_it=400)'),
    (small(*[(700, 12, inf)]*3), 12, 'Nothing speaks against bs=16 so far; bs=12 is where the interval begins.'),
    (small(*[(700, 0, inf)]*3), None, 'cannot be told yet'),
    (small(*[(-700, nan, nan)]*3), None, 'came out negative, and not by chance; either the training set is fitted'),
    (small((90, nan, nan)), 96, '1 measurement is too few to say how sure that is: spend more batches (num_it=200). Until then, bs=96 is a guess.'),
    (small((-90, nan, nan), (-80, nan, nan)), None, 'is not known yet'),
    (small(*[(900, 700, 1100)]*3, biased=True), 1024, 'measured with bs=16 at lr=0.1. This is a biased number, for comparison only: every batch stepped.'),
    (small(), None, 'no measurement of 10 batches was completed'),
    (small(missing='no gradient'), None, 'no measurement of 10 batches was completed: no batch gave a gradient.'),
    (small(*[(100, 80, 130)]*3, stopped='ended', spent=61), 96, 'Stopped after 61 of 100 batches: a callback, or the end of the data, ended the training. '),
])
def test_of_the_noise_scale(found, bs, words):
    said = str(found)
    assert critical(found) == bs and words in said
    assert not re.search(r'-\d', said) and 'nan' not in said and 'inf' not in said
    assert said.count('. ') <= 4


@pytest.mark.parametrize('found,words', [
    (result(*known, step_time=linear, max_bs=3000),
     "bs=256 should reach the same loss in 0.61 of the time of bs=64 (0.58-0.65), seeing 1.4 times the examples: use lr≈0.28, about 1.4 times the epochs."),
    (result(*[(6, 5, 7)]*3, step_time=linear), "On this machine, no batch size should be much faster than bs=64: bs=32 takes 0.95 of its time."),
    (result(*[(-5, 400, inf)]*3, step_time=linear),
     "bs=256 should reach the same loss in 0.61 of the time of bs=64 (at most 0.61), seeing 1.4 times the examples (at most 1.4)"),
    (result(*[(600, 200, inf)]*3, step_time=linear),
     "bs=384 should reach the same loss in 0.55 of the time of bs=64 (at most 0.82), seeing 1.5 times the examples (at most 2.2)"),
    (result(*known), "bs=512 should reach the same loss in about 0.25 of the steps of bs=64"),
    (result(*known, trouble='ignored'), "How fast other batch sizes are on this machine is not known: the training loader does not take another batch size."),
    (result(*known, trouble='failed', failed=256, error='no such size'), "is not known: a step with bs=256 fails (no such size)."),
    (result(*known, no_memory='ValueError: odd'), "What fits in memory is not known: ValueError: odd."),
    (result(*known, step_time=linear, max_bs=200), "A larger batch would do, but only about 200 examples fit in memory: accumulate the gradients of several."),
    (result(*known, step_time=linear, n=200), "A larger batch would do, but the training set has only 200 examples."),
    (result(*known, step_time=linear, cut_short=True), "Larger batches may be faster still, but there was no time to try them: raise num_it, or profile."),
    (result(*known, step_time=linear, lr_given=slice(.01, .1)), "use lr≈slice(0.028, 0.28)"),
    (result(*[(300, 10, 9000)]*3, step_time=linear),
     "bs=256 may reach the same loss in 0.66 of the time of bs=64 (0.44-1.6), but the interval is too wide to rely on it: spend more batches (num_it=400)"),
    (result(*[(3000, 10, 20000)]*3, step_time={64: .01, 256: .01}), "in 0.27 of the time of bs=64 (0.25-0.90), seeing 1.1 times the examples (1.0-3.6): use"),
    (result(*known, step_time=linear, n=900), "That leaves about 5 steps of what is an epoch with bs=64, and a schedule needs a hundred or so"),
    (result(*known, step_time=linear, n=900, batch_norm=True),
     "That leaves about 5 steps of what is an epoch with bs=64, and a schedule and batch-norm's averages need a hundred"),
    (result(*known, step_time=linear, suggested=dict(mine=8)), "bs=8 should reach the same loss in 5.5 times the time of bs=64 (5.4-5.7)"),
    (result(*known, suggested=dict(mine=70)), "bs=70 makes little difference from bs=64."),
    (result(*known, suggested=dict(mine=10**6)), "bs=1000000 is more than the 50,000 examples of the training set."),
    (result(*[(-50, 0, inf)]*3, suggested=dict(mine=80)), "What bs=80 would gain is not known."),
])
def test_of_the_advice(found, words):
    said = str(found)
    assert words in said and 'nan' not in said and 'inf' not in said


def test_of_several_processes():
    assert '(num_it=200), or fewer per measurement (n_batch=2).' in str(result((400, nan, nan), processes=4))
    assert 'fewer' not in str(result((400, nan, nan)))
    few = str(result(*known, bs=60, processes=4, step_time={60: .01, 250: .011}))
    assert 'bs=60 (4 processes × 15)' in few and 'bs=192 (4 processes × 48)' in few
    assert 'bs=64 (3 processes × 22, 66 in all)' in str(result(*known, bs=64, processes=3))
    assert 'the loss is not finite: lower lr (rank 2).' in str(result(processes=4, stopped='loss', stopped_by=2))


sizes = st.none() | st.integers(1, 3000) | st.just(nan)
ends = st.floats(0, 1e5) | st.sampled_from([nan, inf])


@st.composite
def results(draw):
    "Of measurements, times, memory and suggestions of all kinds; some suggestions are those of the package"
    rows = draw(st.lists(st.tuples(st.floats(.5, 1e5), st.floats(0, 1), st.sampled_from([nan, inf]) | st.floats(1, 10)), min_size=1, max_size=5))
    rows = [(x, nan if math.isnan(w) else x*lo, w*x) for x,lo,w in rows]
    facts = dict(bs=draw(st.sampled_from([1, 16, 55, 64, 1000])), n=draw(st.none() | st.integers(1000, 10**5)), max_bs=draw(st.none() | st.integers(1, 10**4)),
                 step_time=draw(st.sampled_from([{}, linear, {64: .01, 256: .0101}])), batch_norm=draw(st.booleans()))
    found = result(*rows, **facts)
    if draw(st.booleans()): return found
    mine = draw(st.dictionaries(st.sampled_from(['mine', 'yours', 'cautious', 'critical', 'fastest']), sizes, min_size=1))
    return found.changed(suggested=mine)


@given(results())
def test_sentence_tuple_picture_and_set_bs_name_the_same_size(found):
    said,advised,bs0 = str(found),found.advised,found.run.bs
    named = {int(v) for v in re.findall(r'bs=(\d+)', said)}
    assert named - {bs0} <= {advised}, said
    if advised and found.in_use.noise.iloc[-1] > 0: assert advised in named, said
    fig,axs = plt.subplots(1, 2)
    recorder = Recorder()
    keep_result(recorder, 'bs_result', found)
    for ax,panel in zip(axs, ('noise', 'gain')):
        recorder.plot_bs_find(ax, panel)
        if advised and ax.get_legend(): assert any(t.get_text().endswith(f': {advised}') and not t.get_text().startswith('in use') for t in ax.get_legend().get_texts())
    plt.close(fig)
    if advised and found.table is not None: assert advised in found.table.index or advised > found.table.index[-1]
    learn = digits_learner(bs=16)
    with learn.no_logging():
        if (advised or 0) <= 1500 and (advised or 'fastest' in found.suggested): assert learn.set_bs(found).dls.bs == (advised or 16)
        else:
            with pytest.raises(ValueError, match='There is no batch size in|more than the 1,500 examples'): learn.set_bs(found)


def test_the_table_reads_well():
    found = result(*known, step_time=linear, max_bs=3000)
    text = found.table_as_text().to_string()
    assert '64 (in use)' in text and 'accumulate 2' in text and '_lo' not in text
    row = next(l for l in text.splitlines() if l.startswith('512 '))
    assert row.split()[1:3] == ['0.25', '(0.23-0.27)']
    assert 'nan' not in result(*known).table_as_text().to_string() and result((-50, 0, inf)).table_as_text() is None


def test_a_notebook_shows_sentence_table_and_picture():
    html = result(*known, step_time=linear)._repr_html_()
    assert 'bs=256 should reach' in html and '64 (in use)' in html and '<img src="data:image/png;base64,' in html
    assert 'no measurement of 10 batches' in result()._repr_html_() and '<img' not in result()._repr_html_()


@pytest.mark.parametrize('lr,text', [(.00123, '0.0012'), (slice(1e-4, .1), 'slice(0.0001, 0.1)'), ([.1, .2], '[0.1, 0.2]')])
def test_learning_rates(lr, text): assert as_lr(lr) == text
